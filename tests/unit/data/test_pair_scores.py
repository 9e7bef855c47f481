"""What scorers read of a pair, and what their scores do to the pairs, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from rlhf_ray.config.schema import PairScoring, PreferenceData
from rlhf_ray.data.pair_scores import PairScores, answer_rollouts, choose_pairs, decide, pair_table, read_scores
from rlhf_ray.data.preferences import PreferenceSet, load_preferences
from rlhf_ray.errors import DataError
from tests.unit.data.tokenizers_for_tests import BOS_CHAT, byte_tokenizer

# Margins of 2, -3, 0 and 0.5.
SCORES = PairScores(torch.tensor([2.0, 0.0, 1.0, 1.5]), torch.tensor([0.0, 3.0, 1.0, 1.0]))


def load(folder: Path, **settings: Any) -> tuple[PreferenceData, PreferenceSet]:
    """Two sources of two pairs each."""
    paths = []
    for name in ("one", "two"):
        path = folder / f"{name}.jsonl"
        rows = [{"prompt": f"{name}{i}", "chosen": f" good{i}", "rejected": f" bad{i}"} for i in range(2)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(str(path))
    data = PreferenceData(train=paths, **settings)
    return data, load_preferences(data, byte_tokenizer(bos=True), seed=1, sources="train")


@pytest.mark.parametrize(
    ("settings", "keep", "exchange"),
    [
        ({}, [1, 1, 1, 1], [0, 0, 0, 0]),
        ({"min_margin": 0.5}, [1, 0, 0, 1], [0, 0, 0, 0]),
        ({"min_margin": 0.0}, [1, 0, 1, 1], [0, 0, 0, 0]),
        ({"relabel": True}, [1, 1, 1, 1], [0, 1, 0, 0]),
        ({"relabel": True, "min_margin": 1.0}, [1, 1, 0, 0], [0, 1, 0, 0]),
    ],
)
def test_relabelling_comes_before_dropping(settings: dict[str, Any], keep: list[int], exchange: list[int]) -> None:
    assert decide(SCORES, PairScoring(**settings)) == ([bool(x) for x in keep], [bool(x) for x in exchange])


def test_the_pairs_that_are_left_and_their_counts(tmp_path: Path) -> None:
    data, pairs = load(tmp_path)
    left = choose_pairs(data, pairs, SCORES, PairScoring(relabel=True, min_margin=0.5), seed=1)
    assert left.sizes == [2, 1]
    assert left.report == pairs.report | {"used": 3, "dropped": 1, "exchanged": 1}
    tokenizer = byte_tokenizer()
    answers = [
        [tokenizer.decode(answer.tolist(), skip_special_tokens=True) for answer in (pair.chosen, pair.rejected)]
        for pair in left.pairs
    ]
    assert answers == [[" good0", " bad0"], [" bad1", " good1"], [" good1", " bad1"]]
    assert sorted(left.stream.batch(0, 3)) != []
    # Nothing left out: the order of the batches is that of the pairs as they were.
    same = choose_pairs(data, pairs, SCORES, PairScoring(relabel=True), seed=1)
    assert [same.stream.batch(step, 2) for step in range(4)] == [pairs.stream.batch(step, 2) for step in range(4)]


def test_a_source_of_which_no_pair_is_left_is_named(tmp_path: Path) -> None:
    data, pairs = load(tmp_path)
    with pytest.raises(DataError, match=r"two.jsonl: no pair is left of 2: .*pairs.min_margin"):
        choose_pairs(data, pairs, SCORES, PairScoring(min_margin=1.0), seed=1)


def test_scorers_read_texts_and_tokens_of_both_answers(tmp_path: Path) -> None:
    _, pairs = load(tmp_path, max_length=9, too_long="cut_right")
    chosen, rejected = answer_rollouts(pairs, [2, 1], byte_tokenizer(bos=True))
    assert chosen.prompts == rejected.prompts == ["two0", "one1"]
    # Four tokens are left for an answer: it is cut where it is longer, and then it has not ended.
    assert chosen.responses == [" goo", " goo"]
    assert rejected.responses == [" bad", " bad"]
    assert chosen.finished.tolist() == rejected.finished.tolist() == [False, False]
    _, whole = load(tmp_path)
    chosen, _ = answer_rollouts(whole, [2], byte_tokenizer(bos=True))
    assert chosen.responses == [" good0"]
    assert chosen.finished.tolist() == [True]
    assert chosen.sequences.tokens.tolist() == whole.select([2]).chosen.tokens.tolist()
    assert chosen.prompt_ids.tolist() == [2]


def test_a_chat_prompt_is_read_in_its_template(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    message = {"role": "user", "content": "Hi"}
    answers = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "Yes"), ("rejected", "No"))}
    path.write_text(json.dumps({"prompt": [message], **answers}))
    tokenizer = byte_tokenizer(template=BOS_CHAT)
    pairs = load_preferences(PreferenceData(train=str(path)), tokenizer, seed=1, sources="train")
    chosen, _ = answer_rollouts(pairs, [0], tokenizer)
    assert chosen.prompts == ["<s>[user]Hi[assistant]"]
    assert chosen.responses == ["Yes"]
    assert pairs.prompts(5, tokenizer).texts == chosen.prompts


def test_the_file_of_scores(tmp_path: Path) -> None:
    _, pairs = load(tmp_path)
    scores = PairScores(torch.tensor([1 / 3, 0.0, 1e-20, 2.0]), torch.tensor([0.0, 1 / 7, 0.0, 0.0]))
    table = pair_table(pairs, scores, PairScoring(relabel=True, min_margin=0.1), byte_tokenizer())
    pq.write_table(table, tmp_path / "pairs.parquet")
    assert table.to_pylist()[1] == {
        "prompt": "one1",
        "chosen": " good1",
        "rejected": " bad1",
        "chosen_score": 0.0,
        "rejected_score": pytest.approx(1 / 7),
        "kept": True,
        "exchanged": True,
    }
    assert table["kept"].to_pylist() == [True, True, False, True]
    found = read_scores(tmp_path / "pairs.parquet")
    assert torch.equal(found.chosen, scores.chosen)
    assert torch.equal(found.rejected, scores.rejected)


def test_held_out_prompts_are_different_ones(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [("a", "b", "c"), ("a", "d", "e"), ("x", "b", "c"), ("y", "b", "c")]
    path.write_text(
        "".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) + "\n" for row in rows)
    )
    tokenizer = byte_tokenizer(bos=True)
    pairs = load_preferences(PreferenceData(train=str(path)), tokenizer, seed=1, sources="train")
    prompts = pairs.prompts(2, tokenizer)
    assert prompts.texts == ["a", "x"]
    assert prompts.ids == [0, 2]
    assert prompts.token_ids == [pairs.pairs[row].prompt.tolist() for row in (0, 2)]
    assert prompts.repeats == [0, 0]
    assert len(pairs.prompts(100, tokenizer).ids) == 3
