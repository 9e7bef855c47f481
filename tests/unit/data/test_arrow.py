import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_ray.config.schema import Source
from rlhf_ray.data import arrow
from rlhf_ray.data.arrow import did_you_mean, open_table
from rlhf_ray.errors import DataError

ROWS = [{"prompt": "One, two", "label": 1}, {"prompt": 'Say "hi"\nthere', "label": 0}, {"prompt": "Übung", "label": 1}]


def read(source: Source, *columns: str) -> list[tuple[str, tuple[Any, ...]]]:
    table = open_table(source)
    return [(table.place(number), tuple(row[column] for column in columns)) for number, row in table.rows(columns)]


def json_lines() -> str:
    return "".join(json.dumps(row) + "\n" for row in ROWS)


def write_jsonl(path: Path) -> None:
    path.write_text(json_lines(), encoding="utf-8-sig")


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(json_lines().encode()))


def write_csv(path: Path) -> None:
    path.write_text(
        'prompt,label\r\n"One, two",1\r\n"Say ""hi""\nthere",0\r\n\r\nÜbung,1\r\n', encoding="utf-8", newline=""
    )


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "write", "places"),
    [
        ("d.jsonl", write_jsonl, [":1", ":2", ":3"]),
        ("d.jsonl.gz", write_gzip, [":1", ":2", ":3"]),
        ("d.csv", write_csv, [":2", ":3", ":6"]),
        ("d.parquet", write_parquet, [": row 1", ": row 2", ": row 3"]),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(
    tmp_path: Path, name: str, write: Callable[[Path], None], places: list[str]
) -> None:
    path = tmp_path / name
    write(path)
    got = read(Source(path=str(path)), "prompt")
    assert got == [(f"{path}{place}", (row["prompt"],)) for place, row in zip(places, ROWS, strict=True)]
    assert open_table(Source(path=str(path))).columns == ("prompt", "label")
    assert read(Source(path=str(path), rows=2), "prompt") == got[:2]


def test_a_folder_of_datasets(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([2])}).save_to_disk(str(tmp_path / "many"))
    prompts = [row["prompt"] for row in ROWS]
    assert [values[0] for _, values in read(Source(path=str(tmp_path / "one")), "prompt")] == prompts
    many = str(tmp_path / "many")
    assert read(Source(path=many, split="test"), "label", "prompt") == [(f"{many} (test): row 1", (1, "Übung"))]
    with pytest.raises(DataError, match=r"many: there is no split 'tets'; got 'train', 'test'; did you mean 'test'\?"):
        open_table(Source(path=many, split="tets"))
    with pytest.raises(DataError, match="one: this folder holds one data set"):
        open_table(Source(path=str(tmp_path / "one"), split="test"))
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="one: cannot be read as a `datasets` folder"):
        open_table(Source(path=str(tmp_path / "one")))


def test_a_folder_of_parts_is_read_in_their_order(tmp_path: Path) -> None:
    schema = pyarrow.Table.from_pylist(ROWS).schema
    for number, rows in ((10, ROWS[2:]), (2, ROWS[:1]), (3, []), (9, ROWS[1:2])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / f"part_{number:06}.parquet")
    (tmp_path / "part_000001.parquet.partial").write_bytes(b"")
    source = Source(path=str(tmp_path))
    assert read(source, "prompt") == [(f"{tmp_path}: row {i}", (row["prompt"],)) for i, row in enumerate(ROWS, 1)]
    assert len(read(Source(path=str(tmp_path), rows=2), "prompt")) == 2
    (tmp_path / "part_000009.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(source, "prompt")


def test_the_synthetic_corpus() -> None:
    rows = read(Source(path="synthetic:reviews", split="test", rows=3), "prompt", "label")
    assert [place for place, _ in rows] == [f"synthetic:reviews (test): row {i}" for i in (1, 2, 3)]
    assert len(read(Source(path="synthetic:reviews", split="test"), "text")) == 400
    with pytest.raises(DataError, match="no split 'tset'; got 'train', 'test'; did you mean 'test'"):
        open_table(Source(path="synthetic:reviews", split="tset"))
    with pytest.raises(DataError, match="no synthetic corpus 'stories'"):
        open_table(Source(path="synthetic:stories"))


def test_plain_files_need_neither_datasets_nor_pyarrow(tmp_path: Path) -> None:
    import subprocess

    write_jsonl(tmp_path / "d.jsonl")
    code = (
        "import sys; from rlhf_ray.config.schema import Source; from rlhf_ray.data.arrow import open_table;"
        f"list(open_table(Source(path={str(tmp_path / 'd.jsonl')!r})).rows(['prompt']));"
        "print([m for m in ('datasets', 'pyarrow', 'torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_offline_hub_names_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"nobody/nothing: there is no file .* cannot be reached \(HF_HUB_OFFLINE is set\)"
    ):
        open_table(Source(path="nobody/nothing"))
    assert huggingface_hub.constants.HF_HUB_OFFLINE is True


def hub_error(name: str) -> Exception:
    import httpx2
    import huggingface_hub.errors as errors

    kind = getattr(errors, name)
    response = httpx2.Response(401, request=httpx2.Request("GET", "https://huggingface.co/api/datasets/x/y"))
    return kind("the hub says no", response=response)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", "is gated; accept its terms"),
        ("RepositoryNotFoundError", "neither a file here nor a data set on the hub"),
        ("RevisionNotFoundError", "no revision 'v9'"),
    ],
)
def test_answers_of_the_hub_in_plain_words(monkeypatch: pytest.MonkeyPatch, kind: str, words: str) -> None:
    from huggingface_hub import HfApi

    def refuse(*_: object, **__: object) -> None:
        raise hub_error(kind)

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    with pytest.raises(DataError, match=f"x/y: .*{words}"):
        open_table(Source(path="x/y", revision="v9"))


def test_a_silent_hub_is_given_up_within_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from huggingface_hub import HfApi

    release = threading.Event()
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: release.wait(30))
    monkeypatch.setattr(arrow, "_PROBE_TIMEOUT_S", 0.05)
    with pytest.raises(
        DataError, match=r"the Hugging Face hub cannot be reached \(TimeoutError: no answer within 0.05 s\)"
    ):
        open_table(Source(path="x/y"))
    release.set()


def test_a_hub_data_set_is_read_like_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import HfApi

    asked = {}

    def load(*names: object, **settings: object) -> Any:
        asked["call"] = (names, settings)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = Source(path="owner/name", subset="plain", split="test", revision="v1", rows=1)
    assert read(source, "prompt") == [("owner/name (test): row 1", ("One, two",))]
    assert asked["call"] == (("owner/name", "plain"), {"split": "test", "revision": "v1"})


def test_did_you_mean() -> None:
    assert did_you_mean("Promt", ["response", "prompt"]) == "; did you mean 'prompt'?"
    assert did_you_mean("prompt", ["Prompt"]) == "; did you mean 'Prompt'?"
    assert did_you_mean("xyz", ["prompt"]) == "."
