"""The corpus of wrong data files: each one raises a DataError that names file and row, and says what is wanted."""

from pathlib import Path
from typing import Self

import pytest

from rlhf_ray.cli import main
from rlhf_ray.config.schema import PromptData, TextData
from rlhf_ray.data.prompts import check_prompts
from rlhf_ray.data.texts import check_texts, texts_for_tokenizer
from rlhf_ray.errors import DataError
from tests.tiny_models import make_llama

CORPUS = Path(__file__).parents[1] / "wrong_files" / "data"

PROMPTS = {
    "missing_column.jsonl": ("", "no column 'prompt'", "got 'promt', 'response'", "did you mean 'promt'?"),
    "missing_in_row.jsonl": (":2", "no column 'prompt'", "did you mean 'Prompt'?"),
    "empty_file.jsonl": ("", "the file is empty"),
    "only_blank_lines.jsonl": ("", "there are no rows"),
    "empty_prompt.jsonl": (":3", "column 'prompt' is empty"),
    "number_prompt.jsonl": (":3", "column 'prompt' is a number (7)", "wanted a string"),
    "null_prompt.jsonl": (":1", "column 'prompt' is null", "wanted a string"),
    "invalid_json.jsonl": (":2", "not valid JSON", "Expecting ',' delimiter", '"A dog"'),
    "not_an_object.jsonl": (":2", "wanted one JSON object per line", "a list"),
    "not_gzip.jsonl.gz": ("", "not a gzip file"),
    "not_utf8.jsonl": (":2", "not UTF-8", "0xe9"),
    "ragged.csv": (":3", "got 3 fields, wanted 2", "'prompt', 'response'"),
    "open_quote.csv": (":3", "not valid CSV", "double quotes"),
    "duplicate_column.csv": (":1", "the column 'prompt' is there twice"),
    "no_rows.csv": ("", "there are no rows"),
    "empty_prompt.csv": (":4", "column 'prompt' is empty"),
    "stories.txt": ("", "unknown kind of file '.txt'", ".jsonl.gz, .parquet"),
    "bad_role.jsonl": (":2", "message 1", "unknown role 'usr'", "did you mean 'user'?"),
    "last_not_user.jsonl": (":1", "role 'assistant'", "wanted the user's last"),
    "no_content.jsonl": (":1", "message 2", "'content' is missing"),
    "empty_messages.jsonl": (":1", "wanted chat messages"),
    "null_prompt.parquet": (": row 3", "column 'prompt' is null"),
    "number_prompt.parquet": (": row 1", "column 'prompt' is a number (1)"),
    "broken.parquet": ("", "cannot be read as Parquet"),
    "storys.jsonl": ("", "no such file or directory"),
    "invalid_json.json": ("", "no such file or directory", "did you mean 'invalid_json.jsonl'?"),
    "": ("", "not written by `datasets`' save_to_disk", "'bad_role.jsonl'"),
}
TEXTS = {
    "empty_response.jsonl": (":2", "column 'response' is empty"),
    "no_text_form.jsonl": (
        "",
        "no column 'response'",
        "did you mean 'respons'?",
        "Wanted columns: 'messages'; or 'prompt' and 'response'; or 'text'",
    ),
    "last_not_assistant.jsonl": (":1", "role 'user'", "wanted the assistant's last"),
    "number_prompt.jsonl": (":3", "column 'prompt' is a number (7)"),
}  # fmt: skip


def expect(error: DataError, path: str, expected: tuple[str, ...]) -> None:
    place, *words = expected
    assert str(error).startswith(f"{path}{place}: "), str(error)
    for word in words:
        assert word in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("name", PROMPTS)
def test_wrong_prompts(name: str) -> None:
    path = str(CORPUS / name)
    with pytest.raises(DataError) as caught:
        check_prompts(PromptData(train=path))
    expect(caught.value, path, PROMPTS[name])


@pytest.mark.parametrize("name", TEXTS)
def test_wrong_texts(name: str) -> None:
    path = str(CORPUS / name)
    with pytest.raises(DataError) as caught:
        check_texts(TextData(train=path))
    expect(caught.value, path, TEXTS[name])
    with pytest.raises(DataError):
        texts_for_tokenizer(TextData(train=path))


def test_a_cut_gzip_file_is_named_with_the_line_where_it_ends() -> None:
    with pytest.raises(DataError, match=r"cut_gzip.jsonl.gz:\d+: the gzip stream is broken or cut here"):
        check_prompts(PromptData(train=str(CORPUS / "cut_gzip.jsonl.gz")))


def test_the_corpus_has_no_file_without_a_test() -> None:
    known = {*PROMPTS, *TEXTS, "cut_gzip.jsonl.gz", "null_answer.jsonl", "too_long.jsonl"}
    assert {path.name for path in CORPUS.iterdir() if not path.name.startswith("pair_")} <= known


def test_a_null_answer_is_named() -> None:
    path = str(CORPUS / "null_answer.jsonl")
    assert check_prompts(PromptData(train=path)) == {"train": 2, "evaluation": 0}
    with pytest.raises(DataError) as caught:
        check_prompts(PromptData(train=path, columns={"answer": "answer"}))
    expect(caught.value, path, (":2", "column 'answer' is null"))


def test_wrong_evaluation_data_is_found_too(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_text('{"prompt": "Once"}\n')
    path = str(CORPUS / "empty_prompt.jsonl")
    with pytest.raises(DataError) as caught:
        check_prompts(PromptData(train=str(tmp_path / "good.jsonl"), evaluation=path))
    expect(caught.value, path, (":3", "is empty"))


def test_messages_where_the_settings_want_strings(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"prompt": [{"role": "user", "content": "Hello"}]}\n')
    assert check_prompts(PromptData(train=str(path)))["train"] == 1
    with pytest.raises(DataError, match=r"chat.jsonl:1: .*data.chat_template is false"):
        check_prompts(PromptData(train=str(path), chat_template=False))
    with pytest.raises(DataError, match=r"chat.jsonl:1: .*data.prompt_length would cut"):
        check_prompts(PromptData(train=str(path), prompt_length={"min": 1, "max": 2}))


def test_only_the_rows_in_use_are_checked() -> None:
    source = {"path": str(CORPUS / "number_prompt.jsonl"), "rows": 2}
    assert check_prompts(PromptData(train=source)) == {"train": 2, "evaluation": 0}


PIPELINE = """\
run_dir: {folder}/run
method: ppo
iterations: 1
policy: {{model: {model}}}
reward: [{{kind: function, function: "lengths:length"}}]
data: {{train: {data}, max_prompt_tokens: 40}}
"""


def pipeline_file(folder: Path, *, data: Path, model: str) -> str:
    (folder / "lengths.py").write_text("def length(prompts, responses, answers):\n    return [0.0] * len(prompts)\n")
    file = folder / "pipeline.yaml"
    file.write_text(PIPELINE.format(folder=folder, model=model, data=data))
    return str(file)


@pytest.mark.parametrize("name", [name for name in PROMPTS if (CORPUS / name).is_file()])
def test_the_command_line_names_file_and_row_and_exits_with_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["check", pipeline_file(tmp_path, data=CORPUS / name, model="somebody/some-model")])
    error = capsys.readouterr().err
    assert exit_.value.code == 2, error
    place, *words = PROMPTS[name]
    # An unknown kind of file is found as a mistake of the pipeline file already.
    assert (f"{CORPUS / name}{place}: " in error and words[0] in error) or "data.train" in error
    assert "Traceback" not in error


def test_a_row_that_is_too_long_is_named_before_a_worker_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Empty:
        """Stands for a cluster that has started while the data was encoded, and that nothing is asked of."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            pass

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

    monkeypatch.setattr("rlhf_ray.pipeline.Cluster", Empty)
    model = make_llama(tmp_path / "llama")
    with pytest.raises(SystemExit) as exit_:
        main(["run", pipeline_file(tmp_path, data=CORPUS / "too_long.jsonl", model=model)])
    error = capsys.readouterr().err
    assert exit_.value.code == 2, error
    assert f"{CORPUS / 'too_long.jsonl'}:2: " in error
    assert "wanted at most 40 (data.max_prompt_tokens)" in error
    assert not (tmp_path / "run" / "config.yaml").exists()
