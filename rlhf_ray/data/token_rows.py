"""Encoded rows in a temporary file, so that the driver's memory does not grow with the data set."""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from array import array
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.errors import DataError

_ITEM = np.dtype(np.int32)


class TokenRows:
    """Rows of `parts` lists of token ids each, added in order and read in any.

    The file stands without a name in the folder for temporary files ($TMPDIR) and goes with the object. It is read, not
    mapped, so that what was read does not count as this process's memory.

    Raises:
        DataError: the file cannot be written.
    """

    def __init__(self, parts: int) -> None:
        self._parts = parts
        self._ends = array("q", [0])
        try:
            self._file = tempfile.TemporaryFile(buffering=0, prefix="rlhf_ray_")  # noqa: SIM115
        except OSError as error:
            raise _unwritable(error) from error
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        """Number of rows."""
        return (len(self._ends) - 1) // self._parts

    def add(self, *parts: Sequence[int]) -> None:
        """One more row."""
        assert len(parts) == self._parts, f"{len(parts)} parts, wanted {self._parts}"
        row = np.array([token for part in parts for token in part], dtype=_ITEM).tobytes()
        try:
            # A disk that is nearly full takes a piece of the row, and says so by its size alone.
            if self._file.write(row) != len(row):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _unwritable(error) from error
        for part in parts:
            self._ends.append(self._ends[-1] + len(part))

    def __getitem__(self, row: int) -> list[NDArray[np.int32]]:
        """The parts of a row."""
        if row >= len(self):
            raise IndexError(f"row {row} of {len(self)}")
        first = row * self._parts
        ends = self._ends[first : first + self._parts + 1]
        size = (ends[-1] - ends[0]) * _ITEM.itemsize
        tokens = np.frombuffer(os.pread(self._file.fileno(), size, ends[0] * _ITEM.itemsize), dtype=_ITEM)
        return [tokens[start - ends[0] : end - ends[0]] for start, end in pairwise(ends)]


def _unwritable(error: OSError) -> DataError:
    return DataError(
        "the encoded data cannot be written to the folder for temporary files: "
        f"{error.strerror or error}; free some space there, or let TMPDIR name another folder."
    )
