"""The wires under the transports: how a bucket's bytes get from the sender's process into a receiver's."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import mmap
import os
import tempfile
from abc import ABC, abstractmethod
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from rlhf_ray.errors import WeightSyncError

TransportKind: TypeAlias = Literal["shared_memory", "gloo", "nccl", "cuda_ipc"]


class Wire(ABC):
    """Moves a bucket's bytes; `slots` buckets can be under way at once.

    Where `whole` is true a transfer never comes back to a slot, and its buckets lie end to end: a receiver reads
    tensors where they lie until it has taken the last one.
    """

    slots: int
    whole = False

    @abstractmethod
    def slot(self, bucket: int) -> Tensor:
        """The sender's buffer for a bucket, uint8."""

    def reserve(self, bucket: int, start: int, length: int) -> None:  # noqa: B027
        """Makes sure that these bytes of the sender's buffer can be written."""

    def description(self) -> Any:
        """What a receiver needs to attach, as JSON."""
        return None

    def before_publish(self) -> None:  # noqa: B027
        """The sender's bytes must be in place when this returns."""

    @abstractmethod
    def publish(self, bucket: int, nbytes: int) -> None:
        """The sender lets a bucket go."""

    @abstractmethod
    def fetch(self, bucket: int, nbytes: int) -> Tensor:
        """The receiver's view of a bucket, uint8, valid until it says `taken`; if `whole`, it may reach further."""

    def claim(self, bucket: int, session: int) -> bool:
        """Whether this receiver is to digest the bucket: of pages that many read, it is the first that comes to it."""
        return True

    def settle(self) -> None:  # noqa: B027
        """Every receiver is attached and has taken everything."""

    @abstractmethod
    def close(self) -> None:
        """Frees what this side holds."""


ALIGN = 64
"""Bytes at whose multiples tensors begin, so that any type may be read there."""
# Large enough that a slot's messages cost nothing beside its bytes, small enough that both sides work at the same time.
_SLOT_BYTES = 8 << 20
_RING = 4
# The slots of a large model are larger, so that there are about so many; where all of it lies in memory at once the
# first are smaller, so that receivers have something to load while the sender copies the rest.
_SLOTS = 8
_FIRST_SLOT_BYTES = 2 << 20
# All weights lie in memory at once where they take no more than this share of what is free there.
_SHARE = 0.25


def shared_bytes(bucket_bytes: int, expected_bytes: int, room: float) -> int:
    """Bytes of memory that the pages between the processes of a node take.

    Args:
        bucket_bytes: size of the buckets that weights travel in.
        expected_bytes: bytes of all weights.
        room: bytes free in the folder of shared memory.
    """
    if _lies_as_a_whole(expected_bytes, room):
        return expected_bytes
    return _RING * _slot_bytes(bucket_bytes, expected_bytes)


def _slot_bytes(bucket_bytes: int, expected_bytes: int) -> int:
    # Slots that lie end to end begin where any type may.
    share = -(-expected_bytes // (_SLOTS * ALIGN)) * ALIGN
    return min(bucket_bytes, max(_SLOT_BYTES, share))


def _slot_edges(slot_bytes: int, room: int, *, whole: bool) -> list[int]:
    """Where each slot begins, and where the last one ends: at `room` or, by less than a slot, beyond."""
    edges, size = [0], min(_FIRST_SLOT_BYTES, slot_bytes) if whole else slot_bytes
    while edges[-1] < room:
        edges.append(edges[-1] + size)
        size = min(2 * size, slot_bytes)
    return edges


def _lies_as_a_whole(expected_bytes: int, room: float) -> bool:
    return 0 < expected_bytes <= room * _SHARE


class SharedPages(Wire):
    """Slots in one file in memory, mapped by the sender and by every receiver of the node.

    Slots for all weights where there is room, so that the engines of a node load from the same pages; else a ring of
    four, out of which every receiver copies. Behind them lies, for each slot, the last session it was claimed in.
    """

    def __init__(self, path: str, descriptor: int, *, slot_bytes: int, room: int, whole: bool) -> None:
        self.path = path
        self.whole = whole
        self._sizes = {"slot_bytes": slot_bytes, "room": room, "whole": whole}
        self._edges = _slot_edges(slot_bytes, room, whole=whole)
        self.slots = len(self._edges) - 1
        self._descriptor: int | None = descriptor
        self._reserved = [0] * self.slots
        pages = mmap.mmap(descriptor, _segment_bytes(self._edges))
        self._flat = torch.frombuffer(pages, dtype=torch.uint8, count=self._edges[-1])
        self._claims = torch.frombuffer(pages, dtype=torch.int64, offset=self._edges[-1]).numpy()

    @classmethod
    def create(cls, bucket_bytes: int, expected_bytes: int = 0) -> Self:
        """A new segment; segments whose owner is dead are removed first.

        Args:
            bucket_bytes: a slot is no larger.
            expected_bytes: bytes of all weights; 0 if unknown.
        """
        slot_bytes = _slot_bytes(bucket_bytes, expected_bytes)
        folder = _shared_folder(_RING * slot_bytes)
        _remove_stale(folder)
        # Locked before it has a name that others look for: they would take it for one whose owner is dead.
        descriptor, unlocked = tempfile.mkstemp(prefix=f".{_PREFIX}", dir=folder)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path = str(Path(unlocked).with_name(Path(unlocked).name.removeprefix(".")))
        os.rename(unlocked, path)
        whole = _lies_as_a_whole(expected_bytes, _room(folder))
        # Tensors begin at round addresses, so they take a little more; what is not written to takes no memory.
        room = 2 * expected_bytes if whole else _RING * slot_bytes
        os.ftruncate(descriptor, _segment_bytes(_slot_edges(slot_bytes, room, whole=whole)))
        made = cls(path, descriptor, slot_bytes=slot_bytes, room=room, whole=whole)
        try:
            made._take_room(made._edges[-1], made._claims.nbytes)
        except BaseException:
            made.close()
            raise
        return made

    @classmethod
    def attach(cls, description: dict[str, Any]) -> Self:
        path = description["path"]
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError as error:
            raise WeightSyncError(
                f"weight transfer: shared memory {path} is gone; a receiver on another node needs gloo, "
                "a restarted one a new transport"
            ) from error
        return cls(path, descriptor, **description["sizes"])

    def slot(self, bucket: int) -> Tensor:
        if self.whole and bucket >= self.slots:
            raise WeightSyncError(f"weight transfer: more than the {self._edges[-1]} bytes that were announced for it")
        at = bucket % self.slots
        return self._flat[self._edges[at] : self._edges[at + 1]]

    def reserve(self, bucket: int, start: int, length: int) -> None:
        # Pages that memory has no room for would kill the process when written to; small models take few of them.
        slot = bucket % self.slots
        missing = start + length - self._reserved[slot]
        if missing <= 0:
            return
        self._take_room(self._edges[slot] + self._reserved[slot], missing)
        self._reserved[slot] += missing

    def _take_room(self, start: int, length: int) -> None:
        assert self._descriptor is not None, "the segment is closed"
        try:
            os.posix_fallocate(self._descriptor, start, length)
        except OSError as error:
            raise WeightSyncError(
                f"weight transfer: no room for {length} more bytes in {Path(self.path).parent} "
                f"({error.strerror}); free some, give the container a larger /dev/shm, or lower placement.bucket_mib"
            ) from error

    def description(self) -> dict[str, Any]:
        return {"path": self.path, "sizes": self._sizes}

    def publish(self, bucket: int, nbytes: int) -> None:
        pass

    def fetch(self, bucket: int, nbytes: int) -> Tensor:
        start = self._edges[bucket % self.slots]
        return self._flat[start : start + nbytes]

    def claim(self, bucket: int, session: int) -> bool:
        if not self.whole:
            return True
        # Without a lock: two that come at the same moment both digest it, and none is left out.
        first = bool(self._claims[bucket] <= session)
        self._claims[bucket] = session + 1
        return first

    def settle(self) -> None:
        # All have mapped it: without its name nothing is left behind, however the processes end.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def close(self) -> None:
        if self._descriptor is None:
            return
        self.settle()
        # The pages go with the last tensor that lies in them; torch does not keep a mapping from being closed.
        self._flat = torch.empty(0, dtype=torch.uint8)
        self._claims = self._claims[:0]
        os.close(self._descriptor)
        self._descriptor = None


_PREFIX = "rlhf_ray-weights-"


def _segment_bytes(edges: list[int]) -> int:
    return edges[-1] + 8 * (len(edges) - 1)


def _shared_folder(needed: int) -> str:
    for folder in ("/dev/shm", tempfile.gettempdir()):
        if os.access(folder, os.W_OK) and _room(folder) > needed:
            return folder
    return tempfile.gettempdir()


def _room(folder: str) -> int:
    with contextlib.suppress(OSError):
        free = os.statvfs(folder)
        return free.f_bavail * free.f_frsize
    return 0


def _remove_stale(folder: str) -> None:
    """Unlinks segments that nobody holds locked: their sender is dead."""
    for path in Path(folder).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


class CudaPages(Wire):
    """Two slots in one allocation of the sender's on a GPU, opened by the receivers on the same GPU."""

    slots = 2

    def __init__(self, flat: Tensor, slot_bytes: int, description: dict[str, Any]) -> None:
        self._flat = flat
        self._slot_bytes = slot_bytes
        self._description = description

    @classmethod
    def create(cls, slot_bytes: int, *, receivers: int) -> Self:
        flat = torch.empty(2 * slot_bytes, dtype=torch.uint8, device="cuda")
        storage: Any = flat.untyped_storage()
        # torch counts who has opened a handle, so each receiver gets one of its own.
        handles = [
            [{"bytes": base64.b64encode(v).decode()} if isinstance(v, bytes) else v for v in storage._share_cuda_()]
            for _ in range(receivers)
        ]
        uuid = str(torch.cuda.get_device_properties(flat.device).uuid)
        return cls(flat, slot_bytes, {"uuid": uuid, "slot_bytes": slot_bytes, "handles": handles})

    @classmethod
    def attach(cls, description: dict[str, Any], *, rank: int) -> Self:
        uuid, slot_bytes = description["uuid"], description["slot_bytes"]
        devices = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
        if uuid not in devices:
            raise WeightSyncError(f"weight transfer: cuda_ipc wants GPU {uuid}, this process sees {sorted(devices)}")
        _, *fields = [
            base64.b64decode(value["bytes"]) if isinstance(value, dict) else value
            for value in description["handles"][rank]
        ]
        storages: Any = torch.UntypedStorage
        storage = storages._new_shared_cuda(devices[uuid], *fields)
        flat = torch.empty(0, dtype=torch.uint8, device=f"cuda:{devices[uuid]}").set_(storage)
        return cls(flat, slot_bytes, description)

    def slot(self, bucket: int) -> Tensor:
        start = bucket % 2 * self._slot_bytes
        return self._flat[start : start + self._slot_bytes]

    def description(self) -> dict[str, Any]:
        return self._description

    def before_publish(self) -> None:
        torch.cuda.current_stream().synchronize()

    def publish(self, bucket: int, nbytes: int) -> None:
        pass

    def fetch(self, bucket: int, nbytes: int) -> Tensor:
        return self.slot(bucket)[:nbytes]

    def close(self) -> None:
        self._flat = torch.empty(0, dtype=torch.uint8)


class Broadcast(Wire):
    """One buffer on each side and a process group of its own, beside the process's default group."""

    slots = 1

    def __init__(
        self, kind: TransportKind, store: Store, *, rank: int, size: int, bucket_bytes: int, timeout_s: float
    ) -> None:
        timeout = timedelta(seconds=timeout_s)
        rooms = PrefixStore("group", store)
        self._group: Any
        if kind == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(rooms, rank, size, options)
        else:
            device = torch.device("cpu")
            self._group = dist.ProcessGroupGloo(rooms, rank, size, timeout)
        self._flat = torch.empty(bucket_bytes, dtype=torch.uint8, device=device)

    def slot(self, bucket: int) -> Tensor:
        return self._flat

    def publish(self, bucket: int, nbytes: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([self._flat[:nbytes]], options).wait()
        if self._flat.is_cuda:
            torch.cuda.current_stream().synchronize()

    def fetch(self, bucket: int, nbytes: int) -> Tensor:
        self.publish(bucket, nbytes)
        return self._flat[:nbytes]

    def close(self) -> None:
        self._flat = torch.empty(0, dtype=torch.uint8)
        if self._group is not None and hasattr(self._group, "abort"):
            with contextlib.suppress(RuntimeError):
                self._group.abort()
        self._group = None


def make_wire(
    kind: TransportKind,
    store: Store,
    *,
    rank: int,
    receivers: int,
    bucket_bytes: int,
    expected_bytes: int,
    timeout_s: float,
) -> Wire:
    """The sender's end (rank 0), or for gloo and nccl a receiver's (rank 1 and up), which all meet in the store."""
    match kind:
        case "shared_memory":
            return SharedPages.create(bucket_bytes, expected_bytes)
        case "cuda_ipc":
            return CudaPages.create(bucket_bytes, receivers=receivers)
        case _:
            size = receivers + 1
            return Broadcast(kind, store, rank=rank, size=size, bucket_bytes=bucket_bytes, timeout_s=timeout_s)


def attach_wire(kind: TransportKind, description: dict[str, Any], *, receiver: int) -> Wire:
    """A receiver's end of shared memory or CUDA IPC, as the sender describes it."""
    if kind == "shared_memory":
        return SharedPages.attach(description)
    return CudaPages.attach(description, rank=receiver)
