"""Whether each worker is where it was placed: on its node, with its own GPUs and no others. Without Ray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.distributed.bundles import Share, count
from rlhf_ray.errors import PlacementError


@dataclass(frozen=True)
class Found:
    """What a worker's process says of where it is.

    Args:
        node: id of its node.
        address: address of its node.
        gpus: ids of the GPUs that Ray gave it, on its node.
        visible: those that CUDA lets it see; None where all.
    """

    node: str
    address: str
    gpus: tuple[str, ...]
    visible: tuple[str, ...] | None

    @property
    def text(self) -> str:
        """`node 10.0.0.1, GPU 3`."""
        return f"node {self.address}, {_gpus(self.gpus)}"


@dataclass(frozen=True)
class Seat:
    """Where a worker was placed, and where it is.

    Args:
        role: its role.
        rank: its rank in the role.
        share: what it was given.
        ranks_meet: the role's workers form one process group, so no two may have one GPU.
        bundle: id of its placement group, and number of its bundle; workers with the same one share its GPU.
        node: id of that bundle's node.
        found: where it is.
    """

    role: str
    rank: int
    share: Share
    ranks_meet: bool
    bundle: tuple[str, int]
    node: str
    found: Found


def check_seats(seats: Sequence[Seat]) -> None:
    """Refuses workers that are not where they were placed.

    Raises:
        PlacementError: the first of them: role, rank, got, wanted.
    """
    owners: dict[tuple[str, str, str], Seat] = {}
    sharers: dict[tuple[str, int], Seat] = {}
    for seat in seats:
        found = seat.found
        if found.node != seat.node:
            raise _wrong(seat, f"node {found.node}", f"node {seat.node}, which its bundle is on")
        wanted = math.ceil(seat.share.gpus)
        if len(set(found.gpus)) != wanted:
            raise _wrong(seat, _gpus(found.gpus), f"{count(wanted, 'GPU')} ({seat.role}.gpus {seat.share.gpus:g})")
        if wanted and (found.visible is None or set(found.visible) != set(found.gpus)):
            seen = "all GPUs" if found.visible is None else _gpus(found.visible)
            raise _wrong(
                seat,
                f"CUDA_VISIBLE_DEVICES with {seen}",
                f"{_gpus(found.gpus)}, which Ray gave it; is RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES set?",
            )
        if not wanted:
            continue
        host = sharers.setdefault(seat.bundle, seat)
        if set(host.found.gpus) != set(found.gpus):
            raise _wrong(
                seat, _gpus(found.gpus), f"{_gpus(host.found.gpus)}, which it shares with {host.role} rank {host.rank}"
            )
        for gpu in found.gpus if seat.ranks_meet else ():
            owner = owners.setdefault((seat.role, found.node, gpu), seat)
            if owner is not seat:
                raise _wrong(seat, found.text, f"another GPU than that of rank {owner.rank} of its process group")


def _wrong(seat: Seat, got: str, wanted: str) -> PlacementError:
    return PlacementError(f"{seat.role} rank {seat.rank} is in the wrong place: got {got}; wanted {wanted}")


def _gpus(gpus: Sequence[str]) -> str:
    return f"GPU{'s' if len(gpus) > 1 else ''} {', '.join(gpus)}" if gpus else "no GPU"
