"""How much memory a worker has used."""

from __future__ import annotations

import resource

import torch


def peak_memory_gib() -> float:
    """Peak memory of this process so far, in GiB: of its GPU where it has one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
