import gc
import os
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.data.token_rows import TokenRows
from rlhf_ray.errors import DataError

ROWS = [([1, 2, 3], [70_000]), ([], [-5, 2**31 - 1]), ([4], [])]


def written() -> TokenRows:
    rows = TokenRows(2)
    for row in ROWS:
        rows.add(*row)
    return rows


def test_rows_are_read_in_any_order() -> None:
    rows = written()
    assert len(rows) == 3
    for number in (2, 0, 1, 0):
        assert [part.tolist() for part in rows[number]] == list(ROWS[number])


def test_a_row_that_is_not_there() -> None:
    with pytest.raises(IndexError):
        written()[3]


def test_the_file_has_no_name_and_goes_with_the_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = written()
    number = rows._file.fileno()
    assert not list(tmp_path.iterdir())
    del rows
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"temporary files: No such file or directory; .* TMPDIR"):
        TokenRows(1)


class _OneByteShort(BytesIO):
    """A file on a disk whose last byte is taken."""

    def write(self, data: Any) -> int:
        return super().write(data[:-1])


@pytest.mark.parametrize("full", [lambda **_: open("/dev/full", "wb", buffering=0), lambda **_: _OneByteShort()])  # noqa: SIM115
def test_a_full_disk(full: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    rows = TokenRows(1)
    with pytest.raises(DataError, match="No space left on device"):
        rows.add([1, 2, 3])
