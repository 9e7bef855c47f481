import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config.schema import PreferenceData
from rlhf_ray.data.batches import PreferencePairs, Sequences
from rlhf_ray.data.preferences import PreferenceSet, check_preferences, load_preferences
from rlhf_ray.errors import DataError
from tests.unit.data.tokenizers_for_tests import BOS_CHAT, CHATML, byte_tokenizer, merging_tokenizer

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
PAIR = {"prompt": "ab", "chosen": " cde", "rejected": " x"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(
    tmp_path: Path, rows: list[dict[str, Any]], *, tokenizer: Any = None, seed: int = 1, **settings: Any
) -> PreferenceSet:
    data = PreferenceData(train=write(tmp_path / "d.jsonl", rows), **settings)
    return load_preferences(data, tokenizer or byte_tokenizer(bos=True), seed=seed, sources="train")


def shown(sequences: Sequences, row: int = 0) -> str:
    """The row's text with special tokens; a bar stands before the first token of the answer, which reaches the end."""
    tokenizer = byte_tokenizer()
    ids = sequences.tokens[row, : int(sequences.lengths()[row])].tolist()
    answer = sequences.response_mask[row].nonzero().flatten().tolist()
    assert answer == list(range(answer[0], len(ids)))
    return f"{tokenizer.decode(ids[: answer[0]])}|{tokenizer.decode(ids[answer[0] :])}"


def both(pairs: PreferencePairs, row: int = 0) -> tuple[str, str]:
    return shown(pairs.chosen, row), shown(pairs.rejected, row)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_answers_stand_behind_the_same_prompt_and_end_in_eos(tmp_path: Path) -> None:
    pairs = load(tmp_path, [PAIR, {"prompt": "a", "chosen": "b</s>", "rejected": "cd"}]).all()
    assert both(pairs) == ("<s>ab| cde</s>", "<s>ab| x</s>")
    assert both(pairs, 1) == ("<s>a|b</s>", "<s>a|cd</s>")
    assert pairs.chosen.lengths().tolist() == [8, 4]
    assert pairs.rejected.lengths().tolist() == [6, 5]
    assert pairs.ids == [0, 1]
    assert pairs.margins.tolist() == [0.0, 0.0]


def test_whole_dialogues_are_split_at_the_last_marker(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Go\n\nAssistant:"
    rows = [{"chosen": start + " Gladly.", "rejected": start + " No."}]
    expected = (f"<s>{start}| Gladly.</s>", f"<s>{start}| No.</s>")
    assert both(load(tmp_path, rows).all()) == expected
    separate = [{"prompt": start, "chosen": " Gladly.", "rejected": " No."}]
    assert both(load(tmp_path, separate).all()) == expected
    other = [{"chosen": "Q: a A: b A:c", "rejected": "Q: a A: b A:d"}]
    assert both(load(tmp_path, other, answer_marker="A:").all()) == ("<s>Q: a A: b A:|c</s>", "<s>Q: a A: b A:|d</s>")


def test_an_answer_with_another_turn_does_not_share_its_prompt(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant:"
    rows = [{"chosen": start + " Yes", "rejected": start + " No\n\nHuman: So\n\nAssistant: Go"}]
    with pytest.raises(DataError, match=r"d.jsonl:1: .*do not share their prompt"):
        load(tmp_path, rows)


QUESTION = [message("system", "S"), message("user", "Hi")]
YES, NO = message("assistant", "Yes"), message("assistant", "No")
CHATS: list[dict[str, Any]] = [
    {"prompt": QUESTION, "chosen": [YES], "rejected": [NO]},
    {"prompt": QUESTION, "chosen": [*QUESTION, YES], "rejected": [*QUESTION, NO]},
    {"prompt": "Hi", "chosen": [*QUESTION, YES], "rejected": [*QUESTION, NO]},
    {"prompt": QUESTION, "chosen": [YES], "rejected": [*QUESTION, NO]},
]


@pytest.mark.parametrize("row", [*CHATS, {name: CHATS[1][name] for name in ("chosen", "rejected")}])
def test_every_form_of_messages_reads_alike(tmp_path: Path, row: dict[str, Any]) -> None:
    pairs = load(tmp_path, [row], tokenizer=byte_tokenizer(bos=True, template=BOS_CHAT)).all()
    head = "<s>[system]S[user]Hi[assistant]"
    assert both(pairs) == (f"{head}|Yes</s>", f"{head}|No</s>")


def test_a_string_is_the_users_message_before_answers_in_messages(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "Hi", "chosen": [YES], "rejected": [NO]}]
    pairs = load(tmp_path, rows, tokenizer=byte_tokenizer(template=BOS_CHAT)).all()
    assert both(pairs) == ("<s>[user]Hi[assistant]|Yes</s>", "<s>[user]Hi[assistant]|No</s>")


def test_strings_can_be_put_into_the_chat_template(tmp_path: Path) -> None:
    pairs = load(tmp_path, [PAIR], tokenizer=byte_tokenizer(template=BOS_CHAT), chat_template=True).all()
    assert both(pairs) == ("<s>[user]ab[assistant]| cde</s>", "<s>[user]ab[assistant]| x</s>")


def test_the_end_of_a_turn_ends_the_answer_or_eos_is_appended(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": [message("user", "Hi")], "chosen": [YES], "rejected": [NO]}]
    chosen = load(tmp_path, rows, tokenizer=byte_tokenizer(template=CHATML, eos="<|im_end|>")).all().chosen
    assert shown(chosen).endswith("assistant\n|Yes<|im_end|>")
    assert shown(load(tmp_path, rows, tokenizer=byte_tokenizer(template=CHATML)).all().chosen).endswith(
        "|Yes<|im_end|>\n</s>"
    )


def test_a_template_that_rewrites_what_it_wrote_is_refused(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": [message("user", "Hi")], "chosen": [YES], "rejected": [NO]}]
    thinking = BOS_CHAT.replace("[assistant]{% endif %}", "[assistant]<think>{% endif %}")
    with pytest.raises(DataError, match=r"d.jsonl:1: .*template changes what it wrote before the answer"):
        load(tmp_path, rows, tokenizer=byte_tokenizer(template=thinking))
    with pytest.raises(DataError, match=r"d.jsonl:1: .*need a chat template"):
        load(tmp_path, rows)


def test_the_prompts_tokens_are_those_of_sampling_where_tokens_would_merge_over_the_seam(tmp_path: Path) -> None:
    tokenizer = merging_tokenizer(["xy xy xy xy"], vocab_size=300)
    rows = [{"prompt": "a x", "chosen": "y", "rejected": "a"}]
    pairs = load(tmp_path, rows, tokenizer=tokenizer).all()
    assert tokenizer("a xy")["input_ids"][: len(tokenizer("a x")["input_ids"])] != tokenizer("a x")["input_ids"]
    for sequences, answer in ((pairs.chosen, "y"), (pairs.rejected, "a")):
        ids, mask = sequences.tokens[0], sequences.response_mask[0]
        assert ids[~mask].tolist() == tokenizer("a x")["input_ids"]
        assert tokenizer.decode(ids[mask]) == f"{answer}<|end|>"


def test_renamed_columns_and_margins(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"q": "ab", "good": "c", "bad": "d", "by": 1.5},
        {"q": "ab", "good": "e", "bad": "f", "by": "-2"},
    ]
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad", "margin": "by"}
    pairs = load(tmp_path, rows, columns=columns).all()
    assert both(pairs) == ("<s>ab|c</s>", "<s>ab|d</s>")
    assert pairs.margins.tolist() == [1.5, -2.0]
    assert pairs.margins.dtype == torch.float32
    with pytest.raises(DataError, match=r"d.jsonl: there is no column 'p'"):
        load(tmp_path, rows, columns={**columns, "prompt": "p"})
    with pytest.raises(DataError, match=r"d.jsonl:1: column 'by' is a number \(inf\)"):
        load(tmp_path, [{**rows[0], "by": float("inf")}], columns=columns)


# With <s> and </s>: 1 + 4 + 4 tokens for the chosen row, 1 + 4 + 3 for the rejected one.
LONG: list[dict[str, Any]] = [
    {"prompt": "abcd", "chosen": "efg", "rejected": "hi"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
]


@pytest.mark.parametrize(
    ("most", "too_long", "expected"),
    [
        (9, "error", ("<s>abcd|efg</s>", "<s>abcd|hi</s>")),
        (7, "cut_left", ("<s>cd|efg</s>", "<s>cd|hi</s>")),
        (5, "cut_left", ("d|efg</s>", "d|hi</s>")),
        (7, "cut_right", ("<s>abcd|ef", "<s>abcd|hi")),
        (8, "cut_right", ("<s>abcd|efg", "<s>abcd|hi</s>")),
    ],
)
def test_too_long_pairs_are_cut_alike(tmp_path: Path, most: int, too_long: str, expected: tuple[str, str]) -> None:
    pairs = load(tmp_path, LONG, max_length=most, too_long=too_long)
    assert both(pairs.all()) == expected
    assert pairs.report == {"rows": 2, "used": 2, "dropped": 0, "unusable": 0, "cut": int(most < 9)}


def test_the_longer_answer_decides_how_far_the_prompt_is_cut(tmp_path: Path) -> None:
    swapped = {"prompt": "abcd", "chosen": "hi", "rejected": "efg"}
    assert both(load(tmp_path, [swapped], max_length=7).all()) == ("<s>cd|hi</s>", "<s>cd|efg</s>")


def test_too_long_pairs_are_dropped_or_an_error(tmp_path: Path) -> None:
    one_left = {"rows": 2, "used": 1, "dropped": 1, "unusable": 0, "cut": 0}
    for too_long, most in (("drop", 8), ("cut_left", 4), ("cut_right", 5)):
        pairs = load(tmp_path, LONG, max_length=most, too_long=too_long)
        assert pairs.report == one_left, too_long
        assert both(pairs.all()) == ("<s>a|b</s>", "<s>a|c</s>")
    with pytest.raises(
        DataError, match=r"d.jsonl:1: prompt and longer answer have 9 tokens, wanted at most 8 \(data.max_length\)"
    ):
        load(tmp_path, LONG, max_length=8, too_long="error")


def test_answers_that_differ_beyond_the_cut_only_are_dropped(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "bcd", "rejected": "bce"}, *LONG[1:]]
    pairs = load(tmp_path, rows, max_length=4, too_long="cut_right")
    assert pairs.report == {"rows": 2, "used": 1, "dropped": 1, "unusable": 0, "cut": 0}


def test_epochs_hold_every_pair_once_and_batches_depend_on_the_step_only(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "chosen": "good", "rejected": "bad"} for i in range(10)]
    pairs = load(tmp_path, rows)
    assert len(pairs) == 10
    assert pairs.steps_per_epoch(4) == 3
    orders = []
    for epoch in range(2):
        batches = [pairs.batch(3 * epoch + step, 4) for step in range(3)]
        assert [len(batch) for batch in batches] == [4, 4, 2]
        orders.append([number for batch in batches for number in batch.ids])
        for batch in batches:
            expected = [(f"<s>{i}|good</s>", f"<s>{i}|bad</s>") for i in batch.ids]
            assert [both(batch, row) for row in range(len(batch))] == expected
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] != orders[1]
    assert load(tmp_path, rows).batch(5, 4).ids == pairs.batch(5, 4).ids
    assert load(tmp_path, rows, seed=2).batch(0, 4).ids != pairs.batch(0, 4).ids
    assert load(tmp_path, rows, shuffle=False).batch(4, 4).ids == [4, 5, 6, 7]


def test_batches_are_cut_and_joined_by_pairs(tmp_path: Path) -> None:
    pairs = load(tmp_path, [PAIR, LONG[0], LONG[1]]).all()
    joined = PreferencePairs.concat([pairs.select([2]), pairs.select([0])])
    assert len(joined) == 2
    assert joined.ids == [2, 0]
    assert [both(joined, row) for row in (0, 1)] == [both(pairs, 2), both(pairs, 0)]


def test_several_sources_are_mixed_and_counted(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [PAIR])
    chat = write(tmp_path / "b.jsonl", CHATS[:2])
    data = PreferenceData(train=[first, chat], evaluation=first)
    assert check_preferences(data) == {"train": 3, "evaluation": 1}
    assert len(load_preferences(data, byte_tokenizer(template=BOS_CHAT), seed=1, sources="train")) == 3
    assert len(load_preferences(data, byte_tokenizer(), seed=1, sources="evaluation")) == 1


def test_messages_are_read_from_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(CHATS[:1]), tmp_path / "d.parquet")
    data = PreferenceData(train=str(tmp_path / "d.parquet"))
    pairs = load_preferences(data, byte_tokenizer(template=BOS_CHAT), seed=1, sources="train").all()
    assert shown(pairs.rejected) == "<s>[system]S[user]Hi[assistant]|No</s>"


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        load(tmp_path, [PAIR], tokenizer=tokenizer)


def test_the_grammars_pairs(tmp_path: Path) -> None:
    source = {"path": "synthetic:preferences", "rows": 20}
    data = PreferenceData(train=source, evaluation={**source, "split": "test"}, columns={"margin": "margin"})
    assert check_preferences(data) == {"train": 20, "evaluation": 20}
    pairs = load_preferences(data, byte_tokenizer(), seed=1, sources="evaluation").all()
    assert len(pairs) == 20
    assert (pairs.margins > 0).all()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared models and pairs are not beside this checkout")
def test_real_tokenizers_and_pairs() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2")
    for name in ("hh-helpful-base.test", "llmbar.test", "pandalm-human.test"):
        data = PreferenceData(train=str(SHARED / "preference" / f"{name}.jsonl.gz"), unusable="drop")
        pairs = load_preferences(data, tokenizer, seed=1, sources="train")
        assert pairs.report["used"] > 0.9 * pairs.report["rows"], pairs.report
        batch = pairs.all()
        for sequences in (batch.chosen, batch.rejected):
            last = sequences.tokens.gather(1, sequences.lengths()[:, None] - 1).flatten()
            assert (last == tokenizer.eos_token_id).all()
        for row in range(0, len(batch), 10):
            prompts = [
                s.tokens[row][s.attention_mask[row] & ~s.response_mask[row]] for s in (batch.chosen, batch.rejected)
            ]
            assert prompts[0].tolist() == prompts[1].tolist()
