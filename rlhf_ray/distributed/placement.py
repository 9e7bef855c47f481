"""Where the workers run: a Ray cluster, the share of it that each role gets, and the actors on it.

with Cluster(None, strategy="PACK", start_timeout_s=300, call_timeout_s=3600, recorder=recorder) as cluster:
    with cluster.reserve([RoleRequest("policy", workers=2, rendezvous=True), RoleRequest("reward")]) as placement:
        policy = placement.start("policy", Learner, config=..., model=...)
        reward = placement.start("reward", ModelScorer, model=...)
        gather(policy.ready, reward.ready)
"""

from __future__ import annotations

import logging
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
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

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
        group = placement_group([share.bundle() for share in shares], strategy=strategy)
        self._reserved[group] = shares
        placed = False
        try:
            placed = group.wait(timeout_s)
        finally:
            if not placed:
                self._reserved.pop(group)
                remove_placement_group(group)
        return group if placed else None

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
        strategy: placement group strategy.
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
        group = connection.reserve(rooms, self._strategy, timeout_s)
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
                f"strategy {self._strategy}: {wanted}; free are {capacity.free_cpus:g} of "
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
        self._asked: dict[str, list[Call]] = {}

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
        tables = {seat.group: placement_group_table(seat.group)["bundles_to_node_id"] for seat in self._seats[role]}
        return [str(tables[seat.group][seat.bundle]) for seat in self._seats[role]]

    def start(
        self, role: str, worker_class: Callable[Concatenate[Place, P], W], /, *args: P.args, **kwargs: P.kwargs
    ) -> RayGroup[W]:
        """Starts the role's workers, each made as `worker_class(place, *args, **kwargs)`; returns at once.

        Wait for `group.ready` (of all groups together) to know that they are made.
        """
        request = self._requests[role]
        seats = [self._seated(seat, request, rank) for rank, seat in enumerate(self._seats[role])]
        self._seats[role] = seats
        recipe = ray.put(cloudpickle.dumps((worker_class, args, kwargs)))
        address = seats[0].host.meet.remote() if request.rendezvous else None
        local = local_ranks(self.nodes(role)) if request.rendezvous else [(0, 1)] * len(seats)
        self._asked[role] = self._calls(role, seats, [seat.host.where.remote() for seat in seats])
        replies = [
            seat.host.build.remote(Place(role, rank, len(seats)), recipe, address, local[rank], sys.path)
            for rank, seat in enumerate(seats)
        ]
        built = self._calls(role, seats, replies)
        group: RayGroup[W] = RayGroup(
            role,
            [seat.host for seat in seats],
            collective=request.rendezvous,
            timeout_s=self._call_timeout_s,
            recorder=self._recorder,
            built=built,
            release=lambda idle: self._finish(seats, idle=idle),
        )
        self._groups.append(group)
        return group

    def verify(self) -> list[str]:
        """Where each started worker is, such as `policy 0: node 10.0.0.1, GPU 3`; also in the trace.

        To be called when all roles are started. Waits for the processes, not for what they build.

        Raises:
            PlacementError: a worker is on another node or GPU than it was placed on; names role, rank, got, wanted.
            WorkerError: a process did not come up.
        """
        calls = [call for asked in self._asked.values() for call in asked]
        found = {(call.role, call.rank): reply.value for call, reply in zip(calls, wait(calls), strict=True)}
        seats = [
            Seat(
                role=role,
                rank=rank,
                share=seat.share,
                ranks_meet=self._requests[role].rendezvous,
                bundle=(seat.group.id.hex(), seat.bundle),
                node=node,
                found=found[role, rank],
            )
            for role in self._asked
            for rank, (seat, node) in enumerate(zip(self._seats[role], self.nodes(role), strict=True))
        ]
        check_seats(seats)
        now = time.time()
        number = self._recorder.begin(DRIVER, "verify places")
        self._recorder.finish(
            number, [Span(seat.role, seat.rank, "placed", now, now, place=seat.found.text) for seat in seats]
        )
        return [f"{seat.role} {seat.rank}: {seat.found.text}" for seat in seats]

    def close(self) -> None:
        """Ends the groups and gives the room back; may be called again."""
        try:
            for group in self._groups:
                group.close()
        finally:
            groups = {seat.group for seats in self._seats.values() for seat in seats}
            kept = {seat.group for seat in self._connection.idle}
            for room in groups - kept:
                self._connection.release(room)
            self._seats = {role: [] for role in self._seats}

    def _calls(self, role: str, seats: Sequence[_Seat], replies: Sequence[Any]) -> list[Call]:
        """The calls with which the role's workers start."""
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
            for rank, (seat, reply) in enumerate(zip(seats, replies, strict=True))
        ]

    def _seated(self, seat: _Seat, request: RoleRequest, rank: int) -> _Seat:
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
        return replace(seat, host=host, process=host.process.remote(), env=env, reuse=request.reuse)

    def _finish(self, seats: Sequence[_Seat], *, idle: bool) -> None:
        """Lets the workers close, keeps the hosts that are to be used again, ends the others."""
        drops = [seat.host.drop.remote() for seat in seats]
        ray.wait(drops, num_returns=len(drops), timeout=_CLOSE_IDLE_S if idle else _CLOSE_BUSY_S)
        ended = []
        for seat, drop in zip(seats, drops, strict=True):
            if seat.reuse is not None and _succeeded(drop):
                self._connection.keep(seat)
            else:
                ended.append(seat)
        _end(ended)


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
