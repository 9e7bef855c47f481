"""What a collect stage writes is read back as the tokens that were sampled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from rlhf_ray.config.schema import PreferenceData, PromptData, TextData
from rlhf_ray.data.batches import Rollouts, make_sequences, one_version
from rlhf_ray.data.collected import Samples, check_form, pair_table, text_table, written_texts
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.preferences import load_preferences
from rlhf_ray.data.prompts import PromptSet, load_prompts
from rlhf_ray.data.texts import load_texts
from rlhf_ray.errors import DataError
from tests.unit.data.tokenizers_for_tests import BOS_CHAT, CHATML, byte_tokenizer, merging_tokenizer, spaced_tokenizer


def load(folder: Path, tokenizer: Any, prompts: Sequence[object], **settings: Any) -> PromptSet:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    data = PromptData.model_validate({"train": str(folder / "prompts.jsonl"), **settings})
    return load_prompts(data, tokenizer, seed=1, sources="train")


def sampled(prompts: PromptSet, responses: Sequence[Sequence[int]]) -> Samples:
    """As many samples of each prompt as there are responses for it; a text has no special tokens, as an engine's."""
    number = len(responses) // len(prompts)
    batch = prompts.all()
    rows = [row for row in range(len(prompts)) for _ in range(number)]
    tokenizer = prompts.tokenizer
    texts = []
    for row, response in zip(rows, responses, strict=True):
        head = tokenizer.decode(batch.token_ids[row], skip_special_tokens=True)
        texts.append(tokenizer.decode([*batch.token_ids[row], *response], skip_special_tokens=True)[len(head) :])
    sequences = make_sequences([batch.token_ids[row] for row in rows], responses)
    rollouts = Rollouts(
        sequences=sequences,
        generator_logprobs=torch.zeros(sequences.tokens.shape),
        finished=torch.tensor([response[-1] == tokenizer.eos_token_id for response in responses]),
        prompts=[batch.texts[row] for row in rows],
        responses=texts,
        answers=[None] * len(rows),
        prompt_ids=torch.tensor([batch.ids[row] for row in rows]),
        policy_versions=one_version(sequences, 0),
    )
    scores = torch.arange(float(len(rows)))
    return Samples(
        rollouts=rollouts,
        messages=[prompts.messages_of(batch.ids[row]) for row in rows],
        scores=scores,
        parts={"vowels": 2 * scores, "length": -scores},
        seeds=[2**62 + row for row in range(len(rows))],
        origin={"iteration": 3, "policy": "stage:sft", "policy_version": 7},
    )


def ids(tokenizer: Any, text: str) -> list[int]:
    return [*Encoder.of(tokenizer).plain([text])[0], tokenizer.eos_token_id]


CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "And?"},
]
CASES = {
    "text": (byte_tokenizer(), "The film", [" was good", " bad\n"]),
    "bos": (byte_tokenizer(bos=True), "The film", [" was good", "bad "]),
    "special tokens": (byte_tokenizer(bos=True), "The film", [" was<s> good", "<|im_end|>bad"]),
    "special token first": (byte_tokenizer(), "The film", ["<|im_start|> good", " bad"]),
    "spaces of the older kind": (spaced_tokenizer(), "the film", [" was good", " bad"]),
    "merges": (merging_tokenizer(["the cat sat on the mat"] * 9), "the cat", [" sat on", " sat"]),
    "chat": (byte_tokenizer(template=CHATML, eos="<|im_end|>"), CHAT, [" good", "bad<s>"]),
    "chat with bos": (byte_tokenizer(bos=True, template=BOS_CHAT), CHAT[1:2], ["good ", "bad"]),
}


@pytest.mark.parametrize("name", CASES)
def test_preferences_have_the_sampled_tokens(name: str, tmp_path: Path) -> None:
    tokenizer, prompt, texts = CASES[name]
    prompts = load(tmp_path, tokenizer, [prompt])
    responses = [ids(tokenizer, text) for text in texts]
    samples = sampled(prompts, responses)
    written, changed = written_texts(samples, [0, 1], Encoder.of(tokenizer))
    assert changed == 0
    assert [written[0], written[1]] == texts
    pyarrow.parquet.write_table(pair_table(samples, [(1, 0)], written), tmp_path / "part_000001.parquet")
    data = PreferenceData.model_validate({"train": str(tmp_path), "columns": {"margin": "margin"}})
    read = load_preferences(data, tokenizer, seed=1, sources="train")
    assert len(read) == 1
    pair = read.pairs[0]
    assert pair.prompt.tolist() == prompts.tokens[0].tolist()
    assert [pair.chosen.tolist(), pair.rejected.tolist()] == [responses[1], responses[0]]
    assert pair.margin == 1.0


@pytest.mark.parametrize("name", CASES)
def test_texts_have_the_sampled_tokens(name: str, tmp_path: Path) -> None:
    tokenizer, prompt, texts = CASES[name]
    prompts = load(tmp_path, tokenizer, [prompt])
    responses = [ids(tokenizer, text) for text in texts]
    samples = sampled(prompts, responses)
    written, _ = written_texts(samples, [0, 1], Encoder.of(tokenizer))
    table = text_table(samples, [1, 0, 1], written, extra={})
    pyarrow.parquet.write_table(table, tmp_path / "part_000001.parquet")
    data = TextData.model_validate({"train": str(tmp_path)})
    read = load_texts(data, tokenizer, seed=1, sources="train").all()
    assert [row[mask].tolist() for row, mask in zip(read.tokens, read.attention_mask, strict=True)] == [
        [*prompts.tokens[0].tolist(), *responses[row]] for row in (1, 0, 1)
    ]


def test_texts_that_cannot_give_the_tokens_back_are_counted(tmp_path: Path) -> None:
    tokenizer = merging_tokenizer(["the cat sat on the mat"] * 9)
    whole = ids(tokenizer, " sat on")
    letters = [*(ids(tokenizer, letter)[0] for letter in " sat"), tokenizer.eos_token_id]
    cut = whole[:-1]
    samples = sampled(load(tmp_path, tokenizer, ["the cat"]), [whole, letters, cut])
    written, changed = written_texts(samples, [0, 1, 2], Encoder.of(tokenizer))
    assert changed == 2
    assert written == {0: " sat on", 1: " sat", 2: " sat on"}
    assert written_texts(samples, [0], Encoder.of(tokenizer)) == ({0: " sat on"}, 0)


def test_a_template_that_trims_answers_is_counted(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template=CHATML.replace("m.content", "m.content | trim"), eos="<|im_end|>")
    samples = sampled(load(tmp_path, tokenizer, [CHAT]), [ids(tokenizer, " good"), ids(tokenizer, "bad")])
    assert written_texts(samples, [0, 1], Encoder.of(tokenizer)) == ({0: " good", 1: "bad"}, 1)


def test_special_tokens_that_change_nothing_are_not_spelled_out(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    # The length limit cut the response behind a special token: no text gives these tokens back.
    samples = sampled(load(tmp_path, tokenizer, ["The film"]), [[*ids(tokenizer, " was")[:-1], 2]])
    assert written_texts(samples, [0], Encoder.of(tokenizer)) == ({0: " was"}, 1)


def test_columns_of_pairs(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    samples = sampled(load(tmp_path, tokenizer, ["A", "B"]), [ids(tokenizer, text) for text in ("a", "b", "c", "d")])
    texts, _ = written_texts(samples, range(4), Encoder.of(tokenizer))
    rows = pair_table(samples, [(1, 0), (3, 2)], texts).to_pylist()
    assert rows[1] == {
        "prompt": "B",
        "chosen": "d",
        "rejected": "c",
        "margin": 1.0,
        "chosen_score": 3.0,
        "chosen_score_vowels": 6.0,
        "chosen_score_length": -3.0,
        "rejected_score": 2.0,
        "rejected_score_vowels": 4.0,
        "rejected_score_length": -2.0,
        "chosen_seed": 2**62 + 3,
        "rejected_seed": 2**62 + 2,
        "prompt_id": 1,
        "iteration": 3,
        "policy": "stage:sft",
        "policy_version": 7,
    }


def test_columns_of_texts(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template=CHATML, eos="<|im_end|>")
    samples = sampled(load(tmp_path, tokenizer, [CHAT[1:2]]), [ids(tokenizer, "yes")])
    texts, _ = written_texts(samples, [0], Encoder.of(tokenizer))
    (row,) = text_table(samples, [0], texts, extra={"weight": [0.25]}).to_pylist()
    assert row == {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}],
        "prompt": [{"role": "user", "content": "Hi"}],
        "response": "yes",
        "score": 0.0,
        "score_vowels": 0.0,
        "score_length": 0.0,
        "seed": 2**62,
        "weight": 0.25,
        "prompt_id": 0,
        "iteration": 3,
        "policy": "stage:sft",
        "policy_version": 7,
    }
    empty = text_table(samples, [], texts, extra={"weight": []})
    assert (empty.num_rows, empty.schema) == (0, text_table(samples, [0], texts, extra={"weight": [0.25]}).schema)


def test_strings_in_a_template_are_written_as_messages(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template=CHATML, eos="<|im_end|>")
    prompts = load(tmp_path, tokenizer, ["Hi"], chat_template=True)
    samples = sampled(prompts, [ids(tokenizer, "yes"), ids(tokenizer, "no")])
    (row,) = pair_table(samples, [(1, 0)], {0: "yes", 1: "no"}).to_pylist()
    assert row["prompt"] == [{"role": "user", "content": "Hi"}]
    assert row["chosen"] == [{"role": "assistant", "content": "no"}]


def test_prompts_of_two_forms_and_cut_conversations_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template=CHATML)
    with pytest.raises(DataError, match=r"1 of 2 prompts are chat messages .* data\.chat_template to true"):
        check_form(load(tmp_path, tokenizer, ["Hi", CHAT]))
    with pytest.raises(DataError, match=r"1 of 1 prompts are chat messages .* and cut.*data\.too_long to drop"):
        check_form(load(tmp_path, tokenizer, [CHAT], max_prompt_tokens=8, too_long="cut_left"))
    check_form(load(tmp_path, tokenizer, ["Hi", CHAT], chat_template=True))
    check_form(load(tmp_path, tokenizer, ["Hello you"], max_prompt_tokens=8, too_long="cut_left"))
