"""A process's connection to Ray: the room that is reserved through it, and the hosts on it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from rlhf_ray.distributed.bundles import Capacity, NodeShare, RoleRequest, Share
from rlhf_ray.distributed.environment import worker_environment

_IDLE_HOSTS = 2
_GONE_S = 10.0
# What is given back to a Ray that is not ours counts as taken for about so long.
_LAG_S = 1.0
_LAG_STEP_S = 0.05


@dataclass(frozen=True)
class Slot:
    """A worker's part of a bundle of a placement group, and the host on it once there is one."""

    group: PlacementGroup
    bundle: int
    share: Share
    room: Share
    host: Any = None
    process: Any = None
    found: Any = None
    env: Mapping[str, str] = field(default_factory=dict)
    reuse: str | None = None
    node_labels: Mapping[str, str] = field(default_factory=dict)


class Connection:
    """This process's connection to Ray: what is reserved through it, and the hosts that wait for their next group.

    Args:
        ours: Ray was started for this process, so all that it has is ours.
        opened: this package opened the connection, and closes it.
        folder: Ray's temporary folder, removed at the end; None where it is not ours.
    """

    def __init__(self, *, ours: bool, opened: bool, folder: str | None) -> None:
        self.ours = ours
        self.opened = opened
        self.folder = folder
        self.idle: list[Slot] = []
        self._reserved: dict[PlacementGroup, list[Share]] = {}
        self._settled_at = 0.0

    def capacity(self) -> Capacity:
        total = ray.cluster_resources()
        cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
        nodes = [
            NodeShare(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0), node["Labels"])
            for node in ray.nodes()
            if node["Alive"]
        ]
        if self.ours:
            # Ray's own numbers lag behind by a moment; these do not.
            held = [share for shares in self._reserved.values() for share in shares]
            free_cpus, free_gpus = cpus - sum(s.cpus for s in held), gpus - sum(s.gpus for s in held)
        else:
            free_cpus, free_gpus = _available()
            while time.monotonic() < self._settled_at and (free_cpus < cpus or free_gpus < gpus):
                time.sleep(_LAG_STEP_S)
                free_cpus, free_gpus = _available()
        return Capacity(cpus, gpus, round(free_cpus, 4), round(free_gpus, 4), nodes)

    def reserve(
        self, shares: list[Share], selectors: Sequence[Mapping[str, str]], strategy: str, timeout_s: float
    ) -> PlacementGroup | None:
        """One placement group with a bundle for each share; None when it did not come about in time."""
        group = self.ask(shares, selectors, strategy)
        placed = False
        try:
            placed = group.wait(timeout_s)
        finally:
            if not placed:
                self._reserved.pop(group)
                remove_placement_group(group)
        return group if placed else None

    def ask(self, shares: list[Share], selectors: Sequence[Mapping[str, str]], strategy: str) -> PlacementGroup:
        """Asks for a placement group, which comes about once there is room for it.

        Args:
            shares: of its bundles.
            selectors: labels of the nodes that each bundle may be on.
            strategy: how they lie on the nodes.
        """
        group = placement_group(
            [share.bundle() for share in shares],
            strategy=strategy,
            bundle_label_selector=[dict(selector) for selector in selectors],
        )
        self._reserved[group] = shares
        return group

    def release(self, group: PlacementGroup) -> None:
        self._reserved.pop(group, None)
        remove_placement_group(group)
        self._settled_at = time.monotonic() + _LAG_S

    def evict(self) -> None:
        """Ends the host that has been idle for longest."""
        slot = self.idle.pop(0)
        end_hosts([slot])
        self.release(slot.group)

    def keep(self, slot: Slot) -> None:
        """Keeps a host for a later group."""
        self.idle.append(slot)
        while len(self.idle) > _IDLE_HOSTS:
            self.evict()

    def take(self, request: RoleRequest) -> list[Slot]:
        """Idle hosts that the request can use, at most as many as it has workers."""
        if request.reuse is None:
            return []
        taken = [slot for slot in self.idle if _serves(slot, request)][: request.workers]
        self.idle = [slot for slot in self.idle if slot not in taken]
        return taken

    def close(self) -> None:
        try:
            while self.idle:
                self.evict()
            for group in list(self._reserved):
                self.release(group)
        finally:
            if self.opened:
                ray.shutdown()
            if self.folder is not None:
                shutil.rmtree(self.folder, ignore_errors=True)


def nodes_of(slots: Sequence[Slot]) -> list[str]:
    """The id of the node of each slot's bundle."""
    tables = {slot.group: placement_group_table(slot.group)["bundles_to_node_id"] for slot in slots}
    return [str(tables[slot.group][slot.bundle]) for slot in slots]


def is_placed(group: PlacementGroup) -> bool:
    """Whether a placement group has come about."""
    # `PlacementGroup.wait` counts in whole seconds.
    return bool(placement_group_table(group)["state"] == "CREATED")


def close_workers(slots: Sequence[Slot], *, timeout_s: float) -> list[ray.ObjectRef[None]]:
    """Lets the workers close; the replies, which are waited for until the time is over."""
    replies = [slot.host.drop.remote() for slot in slots]
    if replies:
        ray.wait(replies, num_returns=len(replies), timeout=timeout_s)
    return replies


def succeeded(reply: ray.ObjectRef[None]) -> bool:
    """Whether a call has come back, and without an error."""
    try:
        ray.get(reply, timeout=0)
    except RayError:
        return False
    return True


def end_hosts(slots: Sequence[Slot]) -> None:
    """Kills the hosts, and waits for those processes of theirs that run on this machine."""
    processes = []
    for slot in slots:
        with suppress(RayError, psutil.Error):
            address, pid, _ = ray.get(slot.process, timeout=0)
            if address == ray.util.get_node_ip_address():
                processes.append(psutil.Process(pid))
        ray.kill(slot.host)
    psutil.wait_procs(processes, timeout=_GONE_S)


def _available() -> tuple[float, float]:
    """Free CPU cores and GPUs, as Ray knows them."""
    free = ray.available_resources()
    return free.get("CPU", 0.0), free.get("GPU", 0.0)


def _serves(slot: Slot, request: RoleRequest) -> bool:
    return (
        slot.reuse == request.reuse
        and request.cpus in (None, slot.share.cpus)
        and request.gpus in (None, slot.share.gpus)
        and request.node_labels == slot.node_labels
        and slot.env == worker_environment(slot.share, request.env)
    )
