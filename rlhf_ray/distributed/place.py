"""Where a worker stands: its role and its rank in the role's group."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One worker's position.

    Args:
        role: name of the role in the pipeline file, such as `policy`.
        rank: number of this worker in its group, from 0.
        size: number of workers in the group.
    """

    role: str
    rank: int
    size: int
