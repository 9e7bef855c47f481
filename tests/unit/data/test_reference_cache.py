"""The cache of the reference's log-probabilities: by content, exact, shared, and never wrong for being damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rlhf_ray.data import reference_cache
from rlhf_ray.data.batches import Sequences, make_sequences
from rlhf_ray.data.reference_cache import ReferenceCache, answer_digests, cache_folder, reference_key
from rlhf_ray.errors import ConfigError

KEY = reference_key({"weights": "w", "dtype": "float32"})
DIGESTS = [bytes([number]) * 32 for number in range(5)]
# Numbers that no decimal detour survives.
LOGPROBS = torch.tensor([-1 / 3, -1e-30, -12345.678, -0.0, -7.0000005])


def open_cache(folder: Path, messages: list[str] | None = None, key: str = KEY) -> ReferenceCache:
    return ReferenceCache(folder, key, [].append if messages is None else messages.append)


def files(folder: Path) -> list[Path]:
    return sorted((folder / KEY).iterdir())


def test_an_answer_is_its_tokens_and_which_of_them_count() -> None:
    rows = make_sequences([[1, 2], [1, 2], [1], [1, 2], [9]], [[3, 4], [3], [2, 3, 4], [3, 4, 0], [3]])
    digests = answer_digests(rows)
    # The third row has the first one's tokens with another mask; the fourth is the first with a real token 0.
    assert len(set(digests)) == 5
    wider = Sequences.concat([rows, make_sequences([[1]], [[2] * 30])])
    assert answer_digests(wider)[:5] == digests
    assert answer_digests(rows.select([4, 0])) == [digests[4], digests[0]]


def test_what_is_written_is_found_bit_for_bit(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        assert cache.missing(DIGESTS) == [0, 1, 2, 3, 4]
        cache.add(DIGESTS[:3], LOGPROBS[:3])
        assert cache.missing(DIGESTS) == [3, 4]
        cache.write()
        cache.add(DIGESTS[3:], LOGPROBS[3:])
    assert len(files(tmp_path)) == 2
    again = open_cache(tmp_path)
    assert len(again) == 5
    found = again.find([DIGESTS[i] for i in (4, 3, 0, 1, 2)])
    assert found.dtype == torch.float32
    assert found.numpy().tobytes() == LOGPROBS[[4, 3, 0, 1, 2]].numpy().tobytes()


def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    with open_cache(tmp_path):
        pass
    assert files(tmp_path) == []


def test_many_answers_are_written_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_cache, "ROWS_PER_FILE", 3)
    cache = open_cache(tmp_path)
    cache.add(DIGESTS[:2], LOGPROBS[:2])
    assert files(tmp_path) == []
    cache.add(DIGESTS[2:], LOGPROBS[2:])
    assert [path.suffix for path in files(tmp_path)] == [".parquet"]


def test_runs_share_a_folder_and_other_weights_see_nothing(tmp_path: Path) -> None:
    first, second = open_cache(tmp_path), open_cache(tmp_path)
    for cache in (first, second):
        cache.add(DIGESTS[:3], LOGPROBS[:3])
    second.add(DIGESTS[3:], LOGPROBS[3:])
    first.write()
    second.write()
    assert len(open_cache(tmp_path)) == 5
    other = reference_key({"weights": "w", "dtype": "bfloat16"})
    assert len(open_cache(tmp_path, key=other)) == 0
    assert len({KEY, other, reference_key({"weights": "w2", "dtype": "float32"})}) == 3


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "renamed", "other_columns"])
def test_a_damaged_file_is_ignored_named_and_computed_again(tmp_path: Path, damage: str) -> None:
    with open_cache(tmp_path) as cache:
        cache.add(DIGESTS[:3], LOGPROBS[:3])
        cache.write()
        cache.add(DIGESTS[3:], LOGPROBS[3:])
    # The file with the last two answers.
    path = next(path for path in files(tmp_path) if pq.read_metadata(path).num_rows == 2)
    content = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        table = pq.read_table(path).set_column(1, "logprob", pa.array([-0.0, -7.0], pa.float32()))
        pq.write_table(table, path)
    elif damage == "renamed":
        path = path.rename(path.with_name("0" * 64 + ".parquet"))
    else:
        pq.write_table(pa.table({"answer": [b"x"]}), path)
    messages: list[str] = []
    with open_cache(tmp_path, messages) as cache:
        assert cache.missing(DIGESTS) == [3, 4]
        assert [str(path) in message and "damaged" in message for message in messages] == [True]
        cache.add(DIGESTS[3:], LOGPROBS[3:])
    assert open_cache(tmp_path).missing(DIGESTS) == []


def test_what_a_killed_run_left_behind_is_no_file(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        cache.add(DIGESTS, LOGPROBS)
    (path,) = files(tmp_path)
    path.rename(path.with_name(f".{path.stem}.abc.partial"))
    messages: list[str] = []
    assert len(open_cache(tmp_path, messages)) == 0
    assert messages == []


def test_a_folder_that_cannot_be_used_is_a_mistake_in_the_settings(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cache_dir: the folder .*/file/.* cannot be used"):
        open_cache(tmp_path / "file")


def test_a_full_disk_costs_the_cache_and_not_the_run(tmp_path: Path) -> None:
    messages: list[str] = []
    cache = open_cache(tmp_path, messages)
    cache.add(DIGESTS, LOGPROBS)
    (tmp_path / KEY).rmdir()
    cache.write()
    assert len(messages) == 1
    assert "5 answers are not kept" in messages[0]
    assert cache.missing(DIGESTS) == []


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder(None) == Path(os.environ["RLHF_RAY_CACHE"])
    assert cache_folder("here") == Path.cwd() / "here"
    monkeypatch.delenv("RLHF_RAY_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / ".cache/rlhf_ray"
