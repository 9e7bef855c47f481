"""Where the workers run: a Ray cluster, the share of it that each role gets, and the actors on it.

with Cluster(None, strategy="PACK", start_timeout_s=300, call_timeout_s=3600, recorder=recorder) as cluster:
    with cluster.reserve([RoleRequest("policy", workers=2, rendezvous=True), RoleRequest("reward")]) as placement:
        policy = placement.start("policy", Learner, config=..., model=...)
        reward = placement.start("reward", ModelScorer, model=...)
        gather(policy.ready, reward.ready)
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import psutil
import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.distributed import faults
from rlhf_ray.distributed.bundles import (
    Bundle,
    Capacity,
    RoleRequest,
    Share,
    Shares,
    assign,
    count,
    fit,
    local_ranks,
    named,
    reservations,
    strategy_of,
    without_reuse,
)
from rlhf_ray.distributed.groups import RayGroup
from rlhf_ray.distributed.hosts import Host
from rlhf_ray.distributed.place import Place
from rlhf_ray.distributed.seats import Seat, check_seats
from rlhf_ray.distributed.supervision import Call, wait
from rlhf_ray.distributed.tracing import DRIVER, Recorder, Span
from rlhf_ray.errors import ConfigError, PlacementError

__all__ = ["Capacity", "Cluster", "Placement", "RoleRequest", "Share", "worker_environment"]

P = ParamSpec("P")
W = TypeVar("W")

_SMALL_MACHINE = 32 << 30
_SMALL_OBJECT_STORE = 1 << 30
_LARGE_BLOCK = str(256 << 20)
_IDLE_HOSTS = 2
_CLOSE_IDLE_S = 10.0
_CLOSE_BUSY_S = 2.0
_GONE_S = 10.0
_CONNECT_S = 5.0
# What is given back to a Ray that is not ours counts as taken for about so long.
_LAG_S = 1.0
_LAG_STEP_S = 0.05
# How long Ray may try bundles that by our own packing have no room on the nodes, even if all of them were free.
_DOUBTFUL_S = 2.0
_NEW_ROOM_S = 1.0
_POLL_S = 0.02
# What workers take over from the driver's environment. Never a secret: these values can be read in Ray's own logs.
_PASSED_ON = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_ENDPOINT",
    "TRANSFORMERS_OFFLINE",
    "OMP_WAIT_POLICY",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    faults.VARIABLE,
)


def worker_environment(share: Share, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a worker's process, set before it starts: threads, memory allocator, devices.

    What the user has set of the allocator and of waiting threads stays; their number follows from the share.
    """
    threads = str(int(share.cpus) if share.cpus >= 2 else 1)
    variables = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        # A waiting thread that spins takes the core from the worker that it waits for.
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        # glibc would return and fault in the pages of every large tensor anew.
        "MALLOC_MMAP_THRESHOLD_": _LARGE_BLOCK,
        "MALLOC_TRIM_THRESHOLD_": _LARGE_BLOCK,
    }
    if not share.gpus:
        variables |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return variables | passed_on | dict(extra)


@dataclass(frozen=True)
class _Seat:
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


class _Connection:
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
        self.idle: list[_Seat] = []
        self._reserved: dict[PlacementGroup, list[Share]] = {}
        self._settled_at = 0.0

    def capacity(self) -> Capacity:
        total = ray.cluster_resources()
        cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
        nodes = [
            Share(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
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

    def reserve(self, shares: list[Share], strategy: str, timeout_s: float) -> PlacementGroup | None:
        """One placement group with a bundle for each share; None when it did not come about in time."""
        group = self.ask(shares, strategy)
        placed = False
        try:
            placed = group.wait(timeout_s)
        finally:
            if not placed:
                self._reserved.pop(group)
                remove_placement_group(group)
        return group if placed else None

    def ask(self, shares: list[Share], strategy: str) -> PlacementGroup:
        """Asks for a placement group with a bundle for each share, which comes about once there is room for it."""
        group = placement_group([share.bundle() for share in shares], strategy=strategy)
        self._reserved[group] = shares
        return group

    def release(self, group: PlacementGroup) -> None:
        self._reserved.pop(group, None)
        remove_placement_group(group)
        self._settled_at = time.monotonic() + _LAG_S

    def evict(self) -> None:
        """Ends the host that has been idle for longest."""
        seat = self.idle.pop(0)
        _end([seat])
        self.release(seat.group)

    def keep(self, seat: _Seat) -> None:
        """Keeps a host for a later group."""
        self.idle.append(seat)
        while len(self.idle) > _IDLE_HOSTS:
            self.evict()

    def take(self, request: RoleRequest) -> list[_Seat]:
        """Idle hosts that the request can use, at most as many as it has workers."""
        if request.reuse is None:
            return []
        taken = [seat for seat in self.idle if _serves(seat, request)][: request.workers]
        self.idle = [seat for seat in self.idle if seat not in taken]
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


def _available() -> tuple[float, float]:
    """Free CPU cores and GPUs, as Ray knows them."""
    free = ray.available_resources()
    return free.get("CPU", 0.0), free.get("GPU", 0.0)


def _serves(seat: _Seat, request: RoleRequest) -> bool:
    return (
        seat.reuse == request.reuse
        and request.cpus in (None, seat.share.cpus)
        and request.gpus in (None, seat.share.gpus)
        and seat.env == worker_environment(seat.share, request.env)
    )


_connection: _Connection | None = None


class Cluster:
    """A connection to Ray, started or joined on entry; on exit everything that was started through it ends.

    A Cluster opened while another one is open in the same process joins that one, and leaves it as it was.

    Args:
        address: HOST:PORT or `auto`; None: RAY_ADDRESS where it is set, else a Ray of our own on this machine.
        strategy: placement group strategy of roles that have none of their own.
        start_timeout_s: deadline for connecting, reserving and building workers, each.
        call_timeout_s: deadline of each call to a worker.
        recorder: takes the spans of all calls.
        num_cpus: cores that a Ray of our own counts with; None: those of the machine.
        num_gpus: GPUs that a Ray of our own counts with; None: those of the machine.

    Raises:
        ConfigError: no Ray answers at the address.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        strategy: str = "PACK",
        start_timeout_s: float = 300.0,
        call_timeout_s: float = 3600.0,
        recorder: Recorder | None = None,
        num_cpus: int | None = None,
        num_gpus: int | None = None,
    ) -> None:
        self.recorder = recorder or Recorder()
        self._address = address
        self._strategy = strategy
        self._start_timeout_s = start_timeout_s
        self._call_timeout_s = call_timeout_s
        self._num_cpus = num_cpus
        self._num_gpus = num_gpus
        self._opened: _Connection | None = None
        self._placements: list[Placement] = []

    def _connect(self) -> _Connection:
        if ray.is_initialized():
            return _Connection(ours=False, opened=False, folder=None)
        address = self._address or os.environ.get("RAY_ADDRESS") or "local"
        if address == "local":
            return _Connection(ours=True, opened=True, folder=_start(self._num_cpus, self._num_gpus))
        _join(address, self._start_timeout_s)
        return _Connection(ours=False, opened=True, folder=None)

    def __enter__(self) -> Self:
        global _connection
        if _connection is None:
            _connection = self._opened = self._connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every group and reservation made through this object, and Ray where this object started it."""
        global _connection
        try:
            for placement in self._placements:
                placement.close()
        finally:
            if self._opened is not None:
                _connection = None
                self._opened.close()
                self._opened = None

    @property
    def address(self) -> str:
        """HOST:PORT, for other processes to join."""
        return str(ray.get_runtime_context().gcs_address)

    @property
    def gpus(self) -> float:
        """GPUs of the whole cluster."""
        assert _connection is not None, "the cluster is not open"
        return _connection.capacity().gpus

    def reserve(self, requests: Sequence[RoleRequest]) -> Placement:
        """Room for all roles at once, in one placement group (roles with `reuse` that share no bundle apart).

        Raises:
            PlacementError: the cluster does not have it, or not within start_timeout_s; names roles, wanted and free.
        """
        assert _connection is not None, "the cluster is not open"
        connection = _connection
        requests = without_reuse(requests)
        seats = {request.role: connection.take(request) for request in requests}
        missing = [
            replace(request, workers=request.workers - len(seats[request.role]))
            for request in requests
            if request.workers > len(seats[request.role])
        ]
        placement = Placement(
            connection,
            {request.role: request for request in requests},
            seats,
            start_timeout_s=self._start_timeout_s,
            call_timeout_s=self._call_timeout_s,
            recorder=self.recorder,
        )
        self._placements.append(placement)
        try:
            shares = self._fit(connection, missing)
            doubt = self._doubt(connection, missing, shares)
            for bundles in reservations(missing):
                self._reserve(connection, bundles, shares, seats, doubt)
        except BaseException:
            placement.close()
            raise
        return placement

    def _fit(self, connection: _Connection, missing: Sequence[RoleRequest]) -> Shares:
        """The shares; idle hosts are ended where they are in the way."""
        while True:
            try:
                return fit(
                    missing,
                    connection.capacity(),
                    strategy=self._strategy,
                    may_wait=not connection.ours and not connection.idle,
                )
            except PlacementError:
                if not connection.idle:
                    raise
                connection.evict()

    def _doubt(self, connection: _Connection, missing: Sequence[RoleRequest], shares: Shares) -> PlacementError | None:
        """Why the bundles have no room on the nodes, even if all were free; None where they have."""
        try:
            assign(missing, shares, connection.capacity().nodes, strategy=self._strategy)
        except PlacementError as error:
            return error
        return None

    def _reserve(
        self,
        connection: _Connection,
        bundles: Sequence[Bundle],
        shares: Shares,
        seats: Mapping[str, list[_Seat]],
        doubt: PlacementError | None,
    ) -> None:
        rooms = [shares.of(bundle) for bundle in bundles]
        timeout_s = self._start_timeout_s if doubt is None else min(_DOUBTFUL_S, self._start_timeout_s)
        strategy = strategy_of(bundles, self._strategy)
        group = connection.reserve(rooms, strategy, timeout_s)
        if group is None and doubt is not None:
            raise doubt
        if group is None:
            capacity = connection.capacity()
            kinds: dict[tuple[str, Share], int] = {}
            for bundle, room in zip(bundles, rooms, strict=True):
                kinds[named(bundle), room] = kinds.get((named(bundle), room), 0) + 1
            wanted = ", ".join(
                f"{name} {number} x ({count(room.cpus, 'CPU')}, {count(room.gpus, 'GPU')})"
                for (name, room), number in kinds.items()
            )
            raise PlacementError(
                f"not placed within {timeout_s:g} s (placement.start_timeout_s), "
                f"strategy {strategy}: {wanted}; free are {capacity.free_cpus:g} of "
                f"{count(capacity.cpus, 'CPU')} and {capacity.free_gpus:g} of {count(capacity.gpus, 'GPU')}"
            )
        for index, (bundle, room) in enumerate(zip(bundles, rooms, strict=True)):
            for request in bundle:
                seats[request.role].append(_Seat(group, index, shares.workers[request.role], room))


class Placement:
    """The room of some roles; `start` puts their workers on it. Made by `Cluster.reserve`."""

    def __init__(
        self,
        connection: _Connection,
        requests: Mapping[str, RoleRequest],
        seats: dict[str, list[_Seat]],
        *,
        start_timeout_s: float,
        call_timeout_s: float,
        recorder: Recorder,
    ) -> None:
        self._connection = connection
        self._requests = requests
        self._seats = seats
        self._start_timeout_s = start_timeout_s
        self._call_timeout_s = call_timeout_s
        self._recorder = recorder
        self._groups: list[RayGroup[Any]] = []
        self._recipes: dict[str, tuple[RayGroup[Any], ray.ObjectRef[bytes]]] = {}
        self._growths: list[Growth[Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def share(self, role: str) -> Share:
        """What one worker of the role has."""
        return self._seats[role][0].share

    def room(self, role: str) -> Share:
        """What the bundle of one worker of the role has; it may share that with other roles."""
        return self._seats[role][0].room

    def nodes(self, role: str) -> list[str]:
        """The id of each worker's node, in rank order."""
        return _nodes(self._seats[role])

    def start(
        self, role: str, worker_class: Callable[Concatenate[Place, P], W], /, *args: P.args, **kwargs: P.kwargs
    ) -> RayGroup[W]:
        """Starts the role's workers, each made as `worker_class(place, *args, **kwargs)`; returns at once.

        Wait for `group.ready` (of all groups together) to know that they are made.
        """
        seats = self._seats[role]
        recipe = ray.put(cloudpickle.dumps((worker_class, args, kwargs)))
        group: RayGroup[W] = self._build(
            role, seats, recipe, first_rank=0, release=lambda idle: self._finish(seats, idle=idle)
        )
        self._groups.append(group)
        self._recipes[role] = group, recipe
        return group

    def verify(self) -> list[str]:
        """Where each started worker is, such as `policy 0: node 10.0.0.1, GPU 3`; also in the trace.

        To be called when all roles are started. Waits for the processes, not for what they build.

        Raises:
            PlacementError: a worker is on another node or GPU than it was placed on; names role, rank, got, wanted.
            WorkerError: a process did not come up.
        """
        seats = self._whereabouts({})
        check_seats(seats)
        now = time.time()
        number = self._recorder.begin(DRIVER, "verify places")
        self._recorder.finish(
            number, [Span(seat.role, seat.rank, "placed", now, now, place=seat.found.text) for seat in seats]
        )
        return [f"{seat.role} {seat.rank}: {seat.found.text}" for seat in seats]

    def fixed(self, role: str) -> str:
        """Why the number of a started role's workers cannot change; empty where it can."""
        if self._requests[role].reuse is None:
            return (
                "its workers share their bundles with other roles (colocate_with), have a strategy, or sleep by turns"
            )
        return ""

    def grow(self, role: str, workers: int) -> Growth[Any]:
        """Asks for room for further workers of a started role with `reuse`; each gets the share of its siblings.

        Returns at once. They are made as the others were; a Ray of our own is asked only for the room that it has.
        """
        request, share, connection = self._requests[role], self.share(role), self._connection
        assert not self.fixed(role), self.fixed(role)
        taken = connection.take(replace(request, workers=workers, cpus=share.cpus, gpus=share.gpus))
        wanted = workers - len(taken)
        while connection.idle and _room_for(share, connection.capacity()) < wanted:
            connection.evict()
        asked = min(wanted, _room_for(share, connection.capacity())) if connection.ours else wanted
        asked_for = [_Seat(connection.ask([share], "PACK"), 0, share, share) for _ in range(asked)]
        growth: Growth[Any] = Growth(
            self, role, ready=taken, asked=asked_for, lacking=wanted - asked, deadline_s=self._start_timeout_s
        )
        self._growths.append(growth)
        return growth

    def shrink(self, role: str, workers: int) -> None:
        """Ends all but the first workers of a role with `reuse`, which have nothing to do; gives their room back."""
        seats = self._seats[role]
        leaving = seats[workers:]
        assert workers > 0, f"{role}: nobody would be left"
        self._recipes[role][0].leave(workers)
        del seats[workers:]
        self._dismiss(leaving, idle=True)

    def close(self) -> None:
        """Ends the groups and gives the room back; may be called again."""
        try:
            for growth in self._growths:
                growth.close()
            for group in self._groups:
                group.close()
        finally:
            groups = {seat.group for seats in self._seats.values() for seat in seats}
            kept = {seat.group for seat in self._connection.idle}
            for room in groups - kept:
                self._connection.release(room)
            self._seats = {role: [] for role in self._seats}

    def _build(
        self,
        role: str,
        seats: list[_Seat],
        recipe: ray.ObjectRef[bytes],
        *,
        first_rank: int,
        release: Callable[[bool], None],
    ) -> RayGroup[Any]:
        """Starts a worker on each seat."""
        request = self._requests[role]
        seats[:] = [self._seated(seat, request) for seat in seats]
        address = seats[0].host.meet.remote() if request.rendezvous else None
        local = local_ranks(_nodes(seats)) if request.rendezvous else [(0, 1)] * len(seats)
        replies = [
            seat.host.build.remote(
                Place(role, first_rank + index, first_rank + len(seats)), recipe, address, local[index], sys.path
            )
            for index, seat in enumerate(seats)
        ]
        return RayGroup(
            role,
            [seat.host for seat in seats],
            collective=request.rendezvous,
            timeout_s=self._call_timeout_s,
            recorder=self._recorder,
            built=self._starting(role, seats, replies, first_rank=first_rank),
            release=release,
        )

    def _starting(self, role: str, seats: Sequence[_Seat], replies: Sequence[Any], *, first_rank: int) -> list[Call]:
        """The calls with which workers start."""
        return [
            Call(
                reply=reply,
                role=role,
                rank=rank,
                method="start",
                timeout_s=self._start_timeout_s,
                setting="placement.start_timeout_s",
                process=seat.process,
            )
            for rank, (seat, reply) in enumerate(zip(seats, replies, strict=True), start=first_rank)
        ]

    def _whereabouts(self, newcomers: Mapping[str, Sequence[_Seat]]) -> list[Seat]:
        """Where the workers of all started roles are, and those that are about to join them."""
        places = {role: [*self._seats[role], *newcomers.get(role, ())] for role in self._recipes}
        calls = [
            call
            for role, seats in places.items()
            for call in self._starting(role, seats, [seat.found for seat in seats], first_rank=0)
        ]
        found = {(call.role, call.rank): reply.value for call, reply in zip(calls, wait(calls), strict=True)}
        return [
            Seat(
                role=role,
                rank=rank,
                share=seat.share,
                ranks_meet=self._requests[role].rendezvous,
                bundle=(seat.group.id.hex(), seat.bundle),
                node=node,
                found=found[role, rank],
            )
            for role, seats in places.items()
            for rank, (seat, node) in enumerate(zip(seats, _nodes(seats), strict=True))
        ]

    def _seated(self, seat: _Seat, request: RoleRequest) -> _Seat:
        if seat.host is not None:
            return seat
        env = worker_environment(seat.share, request.env)
        scheduling = PlacementGroupSchedulingStrategy(
            placement_group=seat.group, placement_group_bundle_index=seat.bundle
        )
        # A restarted worker would have lost its state, a repeated call would act twice.
        host = (
            ray.remote(Host)
            .options(
                num_cpus=seat.share.cpus,
                num_gpus=seat.share.gpus,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=scheduling,
                runtime_env={"env_vars": env},
            )
            .remote()
        )
        return replace(
            seat, host=host, process=host.process.remote(), found=host.where.remote(), env=env, reuse=request.reuse
        )

    def _dismiss(self, seats: Sequence[_Seat], *, idle: bool) -> None:
        """Lets the workers close, ends their hosts, and gives the room back."""
        started = [seat for seat in seats if seat.host is not None]
        _drop(started, timeout_s=_CLOSE_IDLE_S if idle else _CLOSE_BUSY_S)
        _end(started)
        for seat in seats:
            self._connection.release(seat.group)

    def _finish(self, seats: Sequence[_Seat], *, idle: bool) -> None:
        """Lets the workers close, keeps the hosts that are to be used again, ends the others."""
        drops = _drop(seats, timeout_s=_CLOSE_IDLE_S if idle else _CLOSE_BUSY_S)
        ended = []
        for seat, drop in zip(seats, drops, strict=True):
            if seat.reuse is not None and _succeeded(drop):
                self._connection.keep(seat)
            else:
                ended.append(seat)
        _end(ended)


class Growth(Generic[W]):
    """Further workers of a role, on their way into its group; made by `Placement.grow`.

        growth.build()      # starts those for which there is room by now
        growth.join()       # waits until they are made; from here on they are the group's

    Args:
        placement: the role's.
        role: of the workers.
        ready: hosts of an earlier group.
        asked: seats whose room may have to come.
        lacking: workers for which there is no room.
        deadline_s: how long room is waited for.
    """

    def __init__(
        self,
        placement: Placement,
        role: str,
        *,
        ready: list[_Seat],
        asked: list[_Seat],
        lacking: int,
        deadline_s: float,
    ) -> None:
        self._placement = placement
        self._role = role
        self._ready = ready
        self._asked = asked
        self._lacking = lacking
        self._deadline_s = deadline_s
        self._deadline = time.monotonic() + deadline_s
        self._building: tuple[RayGroup[W], list[_Seat]] | None = None

    @property
    def missing(self) -> int:
        """Workers for which there is no room so far."""
        return len(self._asked) + self._lacking

    @property
    def waits(self) -> bool:
        """Whether more workers may come: some are being made, or their room is waited for."""
        return self._building is not None or bool(self._asked and time.monotonic() < self._deadline)

    def shortage(self) -> str:
        """What is wanted, what is free, and until when it is waited for, in words."""
        share, capacity = self._placement.share(self._role), self._placement._connection.capacity()
        needs = count(share.cpus, "CPU") + (f" and {count(share.gpus, 'GPU')}" if share.gpus else "")
        free = f"{capacity.free_cpus:g} of {count(capacity.cpus, 'CPU')}"
        free += f" and {capacity.free_gpus:g} of {count(capacity.gpus, 'GPU')}" if share.gpus else ""
        text = f"no room for {self.missing} more: each needs {needs}; {free} are free"
        if not self._asked:
            return text
        return f"{text}; room {'is' if self.waits else 'was'} waited for, {self._deadline_s:g} s at most"

    def build(self) -> None:
        """Starts the workers for which there is room; without effect while earlier ones are being made."""
        if self._building is not None:
            return
        deadline = time.monotonic() + _NEW_ROOM_S
        while self._asked:
            placed = [seat for seat in self._asked if _is_placed(seat.group)]
            self._asked = [seat for seat in self._asked if seat not in placed]
            self._ready += placed
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        if self._ready:
            seats, self._ready = self._ready, []
            siblings, recipe = self._placement._recipes[self._role]
            group = self._placement._build(
                self._role,
                seats,
                recipe,
                first_rank=siblings.size,
                release=lambda idle: self._placement._dismiss(seats, idle=idle),
            )
            self._building = group, seats

    def join(self) -> None:
        """Waits until the workers that were started are made, and puts them into the group.

        Raises:
            WorkerError: one could not be made; those started with it are ended, the group is as it was.
            RlhfRayError: the error of this package that it raised.
        """
        if self._building is None:
            return
        (group, seats), self._building = self._building, None
        try:
            group.ready.result()
            check_seats(self._placement._whereabouts({self._role: seats}))
        except BaseException:
            group.close()
            raise
        self._placement._recipes[self._role][0].join(group)
        self._placement._seats[self._role].extend(seats)

    def close(self) -> None:
        """Ends what is on its way, and gives its room back; may be called again."""
        building, self._building = self._building, None
        if building is not None:
            building[0].close()
        seats, self._ready, self._asked = [*self._ready, *self._asked], [], []
        self._placement._dismiss(seats, idle=True)


def _nodes(seats: Sequence[_Seat]) -> list[str]:
    """The id of the node of each seat's bundle."""
    tables = {seat.group: placement_group_table(seat.group)["bundles_to_node_id"] for seat in seats}
    return [str(tables[seat.group][seat.bundle]) for seat in seats]


def _is_placed(group: PlacementGroup) -> bool:
    # `PlacementGroup.wait` counts in whole seconds.
    return bool(placement_group_table(group)["state"] == "CREATED")


def _room_for(share: Share, capacity: Capacity) -> int:
    """How many such workers the free cores and GPUs are enough for."""
    needs = ((share.cpus, capacity.free_cpus), (share.gpus, capacity.free_gpus))
    return max(0, min((math.floor(free / need + 1e-6) for need, free in needs if need), default=sys.maxsize))


def _drop(seats: Sequence[_Seat], *, timeout_s: float) -> list[ray.ObjectRef[None]]:
    """Lets the workers close; the replies, which are waited for until the time is over."""
    drops = [seat.host.drop.remote() for seat in seats]
    if drops:
        ray.wait(drops, num_returns=len(drops), timeout=timeout_s)
    return drops


def _succeeded(reply: ray.ObjectRef[None]) -> bool:
    try:
        ray.get(reply, timeout=0)
    except RayError:
        return False
    return True


def _end(seats: Sequence[_Seat]) -> None:
    """Kills the hosts, and waits for those processes of theirs that run on this machine."""
    processes = []
    for seat in seats:
        with suppress(RayError, psutil.Error):
            address, pid, _ = ray.get(seat.process, timeout=0)
            if address == ray.util.get_node_ip_address():
                processes.append(psutil.Process(pid))
        ray.kill(seat.host)
    psutil.wait_procs(processes, timeout=_GONE_S)


def _join(address: str, timeout_s: float) -> None:
    """Connects to a running Ray."""
    where = f"placement.address: got {address!r}"
    if address.startswith("ray://"):
        raise ConfigError(f"{where}, wanted HOST:PORT of the cluster's head; a ray:// client cannot hold the workers")
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"{where}, wanted HOST:PORT, `auto`, or nothing for a Ray of this machine's own")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=min(_CONNECT_S, timeout_s)).close()
        except OSError as error:
            raise ConfigError(
                f"{where}, but nothing answers there ({error}); is the cluster up, and the port open?"
            ) from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, RayError) as error:
        raise ConfigError(
            f"{where}, but no connection came about: {error}\nIs a Ray cluster running there? "
            "With token authentication, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) must be set"
        ) from None


def _start(num_cpus: int | None, num_gpus: int | None) -> str:
    """Starts a Ray of our own on this machine; gives its temporary folder."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Our actors run in processes with an environment of their own; those started ahead would stay idle.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    _provide_token()
    # It only says that authentication is on.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    # Sockets lie in this folder, and their paths may have 107 characters.
    folder = tempfile.mkdtemp(prefix="rlhf_ray_", dir="/tmp")
    small = psutil.virtual_memory().total < _SMALL_MACHINE
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            include_dashboard=False,
            object_store_memory=_SMALL_OBJECT_STORE if small else None,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=folder,
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _provide_token() -> None:
    """Gives Ray a token for this session, where it would otherwise write one into the home folder."""
    if any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    if not (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
