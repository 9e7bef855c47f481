"""The corpus of wrong preference files: each raises a DataError that names file and row and says what is wanted."""

from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.cli import main
from rlhf_ray.config.schema import PreferenceData
from rlhf_ray.data.preferences import check_preferences, load_preferences
from rlhf_ray.errors import DataError
from tests.unit.data.tokenizers_for_tests import BOS_CHAT, byte_tokenizer
from tests.unit.test_wrong_data import CORPUS, expect

PAIRS = {
    "pair_missing_column.jsonl": ("", "no column 'rejected'", "did you mean 'rejekted'?"),
    "pair_missing_in_row.jsonl": (":2", "no column 'rejected'", "got 'prompt', 'chosen'"),
    "pair_missing_prompt.jsonl": (":1", "no column 'prompt'", "did you mean 'promt'?", "whole dialogues"),
    "pair_equal.jsonl": (":3", "'chosen' and 'rejected' have the same answer, a string (' ran.')", "data.unusable"),
    "pair_equal.csv": (":3", "have the same answer", "wanted two different ones"),
    "pair_all_equal.jsonl": (":1", "have the same answer"),
    "pair_empty_answer.jsonl": (":2", "column 'rejected' has an empty answer", "data.unusable"),
    "pair_empty_prompt.jsonl": (":1", "column 'prompt' is empty"),
    "pair_number.jsonl": (":2", "column 'rejected' is a number (7)", "wanted a string or a list of chat messages"),
    "pair_null_prompt.jsonl": (":2", "column 'prompt' is null", "wanted a string or a list of chat messages"),
    "pair_mixed_in_row.jsonl": (":2", "'chosen' is a list of chat messages and column 'rejected' is a string"),
    "pair_mixed_rows.jsonl": (":2", "'chosen' is a list of chat messages, but a string in the rows before"),
    "pair_mixed_prompt.jsonl": (":1", "'prompt' is a list of chat messages and column 'chosen' a string"),
    "pair_other_dialogue.jsonl": (
        ":2",
        "do not share their prompt",
        "they have 54 and 55 characters, which differ from character 41 on",
    ),
    "pair_no_marker.jsonl": (":2", "no column 'prompt'", "(data.answer_marker)", "got a string ('You.')"),
    "pair_other_messages.jsonl": (":2", "do not share their prompt", "message 1 differs"),
    "pair_other_prompt.jsonl": (":1", "in column 'chosen' are not those of column 'prompt'"),
    "pair_no_answer.jsonl": (":1", "column 'chosen' ends with a message of role 'user'", "wanted the assistant's"),
    "pair_only_answers.jsonl": (":1", "one message only and there is no column 'prompt'"),
    "pair_two_answers.jsonl": (":1", "an assistant's message before the answer", "wanted a user's"),
}  # fmt: skip
DROPPABLE = ("equal.jsonl", "empty_answer", "other_dialogue", "other_messages")


@pytest.mark.parametrize("name", PAIRS)
def test_wrong_pairs(name: str) -> None:
    path = str(CORPUS / name)
    with pytest.raises(DataError) as caught:
        check_preferences(PreferenceData(train=path))
    expect(caught.value, path, PAIRS[name])
    with pytest.raises(DataError) as caught:
        load_preferences(PreferenceData(train=path), byte_tokenizer(template=BOS_CHAT), seed=1, sources="train")
    expect(caught.value, path, PAIRS[name])


def test_the_corpus_has_no_file_without_a_test() -> None:
    assert {path.name for path in CORPUS.iterdir() if path.name.startswith("pair_")} == {*PAIRS, "pair_margin.jsonl"}


def test_a_margin_that_is_no_number_is_named() -> None:
    path = str(CORPUS / "pair_margin.jsonl")
    assert check_preferences(PreferenceData(train=path)) == {"train": 2, "evaluation": 0}
    with pytest.raises(DataError) as caught:
        check_preferences(PreferenceData(train=path, columns={"margin": "margin"}))
    expect(caught.value, path, (":2", "column 'margin' is a string ('much')", "wanted a finite number"))


@pytest.mark.parametrize("name", [name for name in PAIRS if any(part in name for part in DROPPABLE)])
def test_unusable_pairs_can_be_dropped_and_are_counted(name: str) -> None:
    data = PreferenceData(train=str(CORPUS / name), unusable="drop")
    if name == "pair_all_equal.jsonl":
        with pytest.raises(DataError, match=r"pair_all_equal.jsonl: no pair is left of 2: 2 have equal or empty"):
            check_preferences(data)
        return
    count = check_preferences(data)["train"]
    pairs = load_preferences(data, byte_tokenizer(template=BOS_CHAT), seed=1, sources="train")
    assert len(pairs) == count == pairs.report["used"]
    assert pairs.report["dropped"] == pairs.report["unusable"] == pairs.report["rows"] - count == 1


def test_other_mistakes_are_not_dropped() -> None:
    with pytest.raises(DataError, match=r"pair_number.jsonl:2: column 'rejected' is a number"):
        check_preferences(PreferenceData(train=str(CORPUS / "pair_number.jsonl"), unusable="drop"))


@pytest.mark.parametrize("settings", [{"too_long": "drop"}, {"too_long": "cut_left"}, {"too_long": "cut_right"}])
def test_a_source_without_a_pair_that_fits_is_named_with_its_counts(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"prompt": "ab", "chosen": "cdefgh", "rejected": "cdeXYZ"}\n{"prompt": "a", "chosen": "b", "rejected": "b"}\n'
    )
    data = PreferenceData(train=str(path), max_length=5, unusable="drop", **settings)
    with pytest.raises(
        DataError,
        match=r"pairs.jsonl: no pair is left of 2: 1 have equal .*, 1 do not fit into data.max_length \(5 tok",
    ):
        load_preferences(data, byte_tokenizer(), seed=1, sources="train")


def test_messages_where_the_settings_want_strings() -> None:
    path = str(CORPUS / "pair_other_messages.jsonl")
    with pytest.raises(DataError, match=r"messages.jsonl:1: .*data.chat_template is false"):
        check_preferences(PreferenceData(train=path, chat_template=False))


def test_wrong_evaluation_pairs_are_found_too() -> None:
    path = str(CORPUS / "pair_equal.jsonl")
    with pytest.raises(DataError, match=r"pair_equal.jsonl:3: "):
        check_preferences(PreferenceData(train="synthetic:preferences", evaluation=path))
    good = PreferenceData(train={"path": path, "rows": 2}, evaluation="synthetic:preferences")
    assert check_preferences(good) == {"train": 2, "evaluation": 8000}


@pytest.mark.parametrize("method", ["reward_model", "dpo"])
@pytest.mark.parametrize("name", PAIRS)
def test_the_command_line_names_file_and_row_and_exits_with_2(
    name: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        f"run_dir: {tmp_path}/run\nmethod: {method}\npolicy: {{model: somebody/some-model}}\n"
        f"data: {{train: {CORPUS / name}}}\n"
    )
    with pytest.raises(SystemExit) as exit_:
        main(["check", str(file)])
    error = capsys.readouterr().err
    assert exit_.value.code == 2, error
    place, *words = PAIRS[name]
    assert f"{CORPUS / name}{place}: " in error
    assert words[0] in error
    assert "Traceback" not in error


def test_no_pair_left_after_dropping_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = CORPUS / "pair_all_equal.jsonl"
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        f"run_dir: {tmp_path}/run\nmethod: dpo\npolicy: {{model: somebody/some-model}}\n"
        f"data: {{train: {path}, unusable: drop}}\n"
    )
    with pytest.raises(SystemExit) as exit_:
        main(["check", str(file)])
    error = capsys.readouterr().err
    assert exit_.value.code == 2, error
    assert f"{path}: no pair is left of 2" in error
    assert "Traceback" not in error
