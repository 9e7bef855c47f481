"""Freed memory goes back to the system."""

import platform

import numpy as np
import psutil
import pytest

from rlhf_ray.distributed.memory import return_free_memory

PIECES = 3000
PIECE_BYTES = 50_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_lies_between_pieces_in_use_goes_back() -> None:
    pieces = [np.ones(PIECE_BYTES, dtype=np.uint8) for _ in range(PIECES)]
    kept = pieces[::100]
    before = psutil.Process().memory_info().rss
    del pieces
    return_free_memory()
    assert before - psutil.Process().memory_info().rss > PIECES * PIECE_BYTES / 2
    assert all(piece.all() for piece in kept)
