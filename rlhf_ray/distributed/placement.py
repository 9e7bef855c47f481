"""Where the workers run: a Ray cluster, the share of it that each role gets, and the actors on it.

with Cluster(None, strategy="PACK", start_timeout_s=300, call_timeout_s=3600, recorder=recorder) as cluster:
    with cluster.reserve([RoleRequest("policy", workers=2, rendezvous=True), RoleRequest("reward")]) as placement:
        policy = placement.start("policy", Learner, config=..., model=...)
        reward = placement.start("reward", ModelScorer, model=...)
        gather(policy.ready, reward.ready)
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

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
    selector_of,
    strategy_of,
    without_reuse,
)
from rlhf_ray.distributed.connection import Connection, Slot, close_workers, end_hosts, is_placed, nodes_of, succeeded
from rlhf_ray.distributed.environment import worker_environment
from rlhf_ray.distributed.groups import RayGroup
from rlhf_ray.distributed.hosts import Host
from rlhf_ray.distributed.memory import share_one_arena
from rlhf_ray.distributed.place import Place
from rlhf_ray.distributed.seats import Seat, check_seats
from rlhf_ray.distributed.sessions import join_ray, start_ray
from rlhf_ray.distributed.supervision import Call, wait
from rlhf_ray.distributed.tracing import DRIVER, Recorder, Span
from rlhf_ray.errors import PlacementError

__all__ = ["Capacity", "Cluster", "Placement", "RoleRequest", "Share"]

P = ParamSpec("P")
W = TypeVar("W")

_CLOSE_IDLE_S = 10.0
_CLOSE_BUSY_S = 2.0
# How long Ray may try bundles that by our own packing have no room on the nodes, even if all of them were free.
_DOUBTFUL_S = 2.0
# How long room that is there takes to be given; what comes later is looked for without waiting.
_NEW_ROOM_S = 1.0
_POLL_S = 0.02
_connection: Connection | None = None


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
        self._opened: Connection | None = None
        self._placements: list[Placement] = []

    def _connect(self) -> Connection:
        if ray.is_initialized():
            return Connection(ours=False, opened=False, folder=None)
        # Before Ray has threads: what a driver frees of its samples then goes back to the system.
        share_one_arena()
        address = self._address or os.environ.get("RAY_ADDRESS") or "local"
        if address == "local":
            return Connection(ours=True, opened=True, folder=start_ray(self._num_cpus, self._num_gpus))
        join_ray(address, self._start_timeout_s)
        return Connection(ours=False, opened=True, folder=None)

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
        """Room for all roles at once, in the placement groups of `reservations`.

        Raises:
            PlacementError: the cluster does not have it, or not within start_timeout_s; names roles, wanted and free.
        """
        assert _connection is not None, "the cluster is not open"
        connection = _connection
        requests = without_reuse(requests)
        slots = {request.role: connection.take(request) for request in requests}
        missing = [
            replace(request, workers=request.workers - len(slots[request.role]))
            for request in requests
            if request.workers > len(slots[request.role])
        ]
        placement = Placement(
            connection,
            {request.role: request for request in requests},
            slots,
            start_timeout_s=self._start_timeout_s,
            call_timeout_s=self._call_timeout_s,
            recorder=self.recorder,
        )
        self._placements.append(placement)
        try:
            shares = self._fit(connection, missing)
            doubt = self._doubt(connection, missing, shares)
            for bundles in reservations(missing):
                self._reserve(connection, bundles, shares, slots, doubt)
        except BaseException:
            placement.close()
            raise
        return placement

    def _fit(self, connection: Connection, missing: Sequence[RoleRequest]) -> Shares:
        """The shares; idle hosts are ended where they are in the way, or hold a GPU while others would share one."""
        while True:
            try:
                shares = fit(
                    missing,
                    connection.capacity(),
                    strategy=self._strategy,
                    may_wait=not connection.ours and not connection.idle,
                    of_all=not connection.ours,
                )
            except PlacementError:
                if not connection.idle:
                    raise
            else:
                shared = any(each.gpus is None and 0 < shares.gpus[each.role] < 1 for each in missing)
                if not (shared and any(slot.share.gpus for slot in connection.idle)):
                    return shares
            connection.evict()

    def _doubt(self, connection: Connection, missing: Sequence[RoleRequest], shares: Shares) -> PlacementError | None:
        """Why the bundles have no room on the nodes, even if all were free; None where they have."""
        try:
            assign(missing, shares, connection.capacity().nodes, strategy=self._strategy)
        except PlacementError as error:
            return error
        return None

    def _reserve(
        self,
        connection: Connection,
        bundles: Sequence[Bundle],
        shares: Shares,
        slots: Mapping[str, list[Slot]],
        doubt: PlacementError | None,
    ) -> None:
        rooms = [shares.of(bundle) for bundle in bundles]
        timeout_s = self._start_timeout_s if doubt is None else min(_DOUBTFUL_S, self._start_timeout_s)
        strategy = strategy_of(bundles, self._strategy)
        group = connection.reserve(rooms, [selector_of(bundle) for bundle in bundles], strategy, timeout_s)
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
                slots[request.role].append(Slot(group, index, shares.workers[request.role], room))


class Placement:
    """The room of some roles; `start` puts their workers on it. Made by `Cluster.reserve`."""

    def __init__(
        self,
        connection: Connection,
        requests: Mapping[str, RoleRequest],
        slots: dict[str, list[Slot]],
        *,
        start_timeout_s: float,
        call_timeout_s: float,
        recorder: Recorder,
    ) -> None:
        self._connection = connection
        self._requests = requests
        self._slots = slots
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
        return self._slots[role][0].share

    def room(self, role: str) -> Share:
        """What the bundle of one worker of the role has; it may share that with other roles."""
        return self._slots[role][0].room

    def nodes(self, role: str) -> list[str]:
        """The id of each worker's node, in rank order."""
        return nodes_of(self._slots[role])

    def start(
        self, role: str, worker_class: Callable[Concatenate[Place, P], W], /, *args: P.args, **kwargs: P.kwargs
    ) -> RayGroup[W]:
        """Starts the role's workers, each made as `worker_class(place, *args, **kwargs)`; returns at once.

        Wait for `group.ready` (of all groups together) to know that they are made.
        """
        slots = self._slots[role]
        recipe = ray.put(cloudpickle.dumps((worker_class, args, kwargs)))
        group: RayGroup[W] = self._build(
            role, slots, recipe, first_rank=0, release=lambda idle: self._finish(slots, idle=idle)
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
        asked_for = [
            Slot(connection.ask([share], [request.node_labels], "PACK"), 0, share, share) for _ in range(asked)
        ]
        growth: Growth[Any] = Growth(
            self, role, ready=taken, asked=asked_for, lacking=wanted - asked, deadline_s=self._start_timeout_s
        )
        self._growths.append(growth)
        return growth

    def shrink(self, role: str, workers: int) -> None:
        """Ends all but the first workers of a role with `reuse`, which have nothing to do; gives their room back."""
        slots = self._slots[role]
        leaving = slots[workers:]
        assert workers > 0, f"{role}: nobody would be left"
        self._recipes[role][0].leave(workers)
        del slots[workers:]
        self._dismiss(leaving, idle=True)

    def close(self) -> None:
        """Ends the groups and gives the room back; may be called again."""
        try:
            for growth in self._growths:
                growth.close()
            for group in self._groups:
                group.close()
        finally:
            groups = {slot.group for slots in self._slots.values() for slot in slots}
            kept = {slot.group for slot in self._connection.idle}
            for room in groups - kept:
                self._connection.release(room)
            self._slots = {role: [] for role in self._slots}

    def _build(
        self,
        role: str,
        slots: list[Slot],
        recipe: ray.ObjectRef[bytes],
        *,
        first_rank: int,
        release: Callable[[bool], None],
    ) -> RayGroup[Any]:
        """Starts a worker on each slot."""
        request = self._requests[role]
        slots[:] = [self._hosted(slot, request) for slot in slots]
        address = slots[0].host.meet.remote() if request.rendezvous else None
        local = local_ranks(nodes_of(slots)) if request.rendezvous else [(0, 1)] * len(slots)
        replies = [
            slot.host.build.remote(
                Place(role, first_rank + index, first_rank + len(slots)), recipe, address, local[index], sys.path
            )
            for index, slot in enumerate(slots)
        ]
        return RayGroup(
            role,
            [slot.host for slot in slots],
            collective=request.rendezvous,
            timeout_s=self._call_timeout_s,
            recorder=self._recorder,
            built=self._starting(role, slots, replies, first_rank=first_rank),
            release=release,
        )

    def _starting(self, role: str, slots: Sequence[Slot], replies: Sequence[Any], *, first_rank: int) -> list[Call]:
        """The calls with which workers start."""
        return [
            Call(
                reply=reply,
                role=role,
                rank=rank,
                method="start",
                timeout_s=self._start_timeout_s,
                setting="placement.start_timeout_s",
                process=slot.process,
            )
            for rank, (slot, reply) in enumerate(zip(slots, replies, strict=True), start=first_rank)
        ]

    def _whereabouts(self, newcomers: Mapping[str, Sequence[Slot]]) -> list[Seat]:
        """Where the workers of all started roles are, and those that are about to join them."""
        places = {role: [*self._slots[role], *newcomers.get(role, ())] for role in self._recipes}
        calls = [
            call
            for role, slots in places.items()
            for call in self._starting(role, slots, [slot.found for slot in slots], first_rank=0)
        ]
        found = {(call.role, call.rank): reply.value for call, reply in zip(calls, wait(calls), strict=True)}
        return [
            Seat(
                role=role,
                rank=rank,
                share=slot.share,
                ranks_meet=self._requests[role].rendezvous,
                bundle=(slot.group.id.hex(), slot.bundle),
                node=node,
                found=found[role, rank],
            )
            for role, slots in places.items()
            for rank, (slot, node) in enumerate(zip(slots, nodes_of(slots), strict=True))
        ]

    def _hosted(self, slot: Slot, request: RoleRequest) -> Slot:
        if slot.host is not None:
            return slot
        env = worker_environment(slot.share, request.env)
        scheduling = PlacementGroupSchedulingStrategy(
            placement_group=slot.group, placement_group_bundle_index=slot.bundle
        )
        # A restarted worker would have lost its state, a repeated call would act twice.
        host = (
            ray.remote(Host)
            .options(
                num_cpus=slot.share.cpus,
                num_gpus=slot.share.gpus,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=scheduling,
                runtime_env={"env_vars": env},
            )
            .remote()
        )
        return replace(
            slot,
            host=host,
            process=host.process.remote(),
            found=host.where.remote(),
            env=env,
            reuse=request.reuse,
            node_labels=request.node_labels,
        )

    def _dismiss(self, slots: Sequence[Slot], *, idle: bool) -> None:
        """Lets the workers close, ends their hosts, and gives the room back."""
        started = [slot for slot in slots if slot.host is not None]
        close_workers(started, timeout_s=_CLOSE_IDLE_S if idle else _CLOSE_BUSY_S)
        end_hosts(started)
        for slot in slots:
            self._connection.release(slot.group)

    def _finish(self, slots: Sequence[Slot], *, idle: bool) -> None:
        """Lets the workers close, keeps the hosts that are to be used again, ends the others."""
        replies = close_workers(slots, timeout_s=_CLOSE_IDLE_S if idle else _CLOSE_BUSY_S)
        ended = []
        for slot, reply in zip(slots, replies, strict=True):
            if slot.reuse is not None and succeeded(reply):
                self._connection.keep(slot)
            else:
                ended.append(slot)
        end_hosts(ended)


class Growth(Generic[W]):
    """Further workers of a role, on their way into its group; made by `Placement.grow`.

        growth.build()      # starts those for which there is room by now
        growth.join()       # waits until they are made; from here on they are the group's

    Args:
        placement: the role's.
        role: of the workers.
        ready: hosts of an earlier group.
        asked: slots whose room may have to come.
        lacking: workers for which there is no room.
        deadline_s: how long room is waited for.
    """

    def __init__(
        self,
        placement: Placement,
        role: str,
        *,
        ready: list[Slot],
        asked: list[Slot],
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
        self._patient_until = time.monotonic() + _NEW_ROOM_S
        self._building: tuple[RayGroup[W], list[Slot]] | None = None

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
        while self._asked:
            placed = [slot for slot in self._asked if is_placed(slot.group)]
            self._asked = [slot for slot in self._asked if slot not in placed]
            self._ready += placed
            if time.monotonic() > self._patient_until:
                break
            time.sleep(_POLL_S)
        if self._ready:
            slots, self._ready = self._ready, []
            siblings, recipe = self._placement._recipes[self._role]
            group = self._placement._build(
                self._role,
                slots,
                recipe,
                first_rank=siblings.size,
                release=lambda idle: self._placement._dismiss(slots, idle=idle),
            )
            self._building = group, slots

    def join(self) -> None:
        """Waits until the workers that were started are made, and puts them into the group.

        Raises:
            WorkerError: one could not be made; those started with it are ended, the group is as it was.
            RlhfRayError: the error of this package that it raised.
        """
        if self._building is None:
            return
        (group, slots), self._building = self._building, None
        try:
            group.ready.result()
            check_seats(self._placement._whereabouts({self._role: slots}))
        except BaseException:
            group.close()
            raise
        self._placement._recipes[self._role][0].join(group)
        self._placement._slots[self._role].extend(slots)

    def close(self) -> None:
        """Ends what is on its way, and gives its room back; may be called again."""
        building, self._building = self._building, None
        if building is not None:
            building[0].close()
        slots, self._ready, self._asked = [*self._ready, *self._asked], [], []
        self._placement._dismiss(slots, idle=True)


def _room_for(share: Share, capacity: Capacity) -> int:
    """How many such workers the free cores and GPUs are enough for."""
    needs = ((share.cpus, capacity.free_cpus), (share.gpus, capacity.free_gpus))
    return max(0, min((math.floor(free / need + 1e-6) for need, free in needs if need), default=sys.maxsize))
