"""How much memory a worker has used, and memory that is no longer used."""

from __future__ import annotations

import ctypes
import resource
from contextlib import suppress

import torch


def peak_memory_gib() -> float:
    """Peak memory of this process so far, in GiB: of its GPU where it has one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def return_free_memory() -> None:
    """Gives what this process has freed back to the system, where the C library can (glibc).

    Between the tensors that live on there are gaps, which would otherwise grow for many iterations.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
