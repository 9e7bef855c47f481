"""How much memory a worker has used, and memory that is no longer used."""

from __future__ import annotations

import ctypes
import os
import resource
from contextlib import suppress

import torch

_M_ARENA_MAX = -8
"""`mallopt`'s name for the number of arenas (malloc.h)."""


def peak_memory_gib() -> float:
    """Peak memory of this process so far, in GiB: of its GPU where it has one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def share_one_arena() -> None:
    """All threads of this process allocate from one arena from now on, where the C library has several (glibc).

    Each arena of a thread that is not the main one keeps up to 64 MiB of freed memory at its end, which
    `return_free_memory` does not reach; there are eight for each core. MALLOC_ARENA_MAX, where it is set, stays.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def return_free_memory() -> None:
    """Gives what this process has freed back to the system, where the C library can (glibc).

    Between the tensors that live on there are gaps, which would otherwise grow for many iterations.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
