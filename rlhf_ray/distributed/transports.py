"""Moving named tensors from one sender to many receivers: shared memory, gloo, NCCL, CUDA IPC.

Tensors are packed into flat buckets; a TCPStore in the sender's process carries the buckets' layouts and
the flow control, the buckets' bytes go over the wire of the chosen kind. Every wait has the deadline of the
TransportSpec, and a side that fails tells the other why.

    learner, every rank                                generator
    -------------------                                ---------
    send_buckets(sender, version, buckets)   ------>   for name, tensor in receiver.tensors(version): ...
      -> SentWeights                                   receiver.received() -> ReceivedWeights
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import xxhash
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistStoreError

from rlhf_ray.distributed.faults import fault
from rlhf_ray.distributed.wires import ALIGN, TransportKind, Wire, attach_wire, make_wire
from rlhf_ray.errors import WeightSyncError

# Kinds whose ends meet in a process group, and those whose buffers are on GPUs.
_MEETING = ("gloo", "nccl")
_ON_GPU = ("nccl", "cuda_ipc")
# Bytes that stay in a core's own cache between two readings.
_CACHED = 1 << 19
_ROW_WORDS = 256


@dataclass(frozen=True)
class TransportSpec:
    """How the weights travel; the same for the sender and all receivers.

    Args:
        kind: shared_memory (same node), gloo (any nodes), nccl (a GPU each), cuda_ipc (the same GPU).
        address: host of the sender, where receivers find its store.
        port: the store's port there; of `open_store` in the sender's process, or any free one.
        receivers: number of receivers, counting each tensor-parallel worker of a generator.
        timeout_s: deadline of every wait.
        bucket_bytes: size of one bucket; tensors larger than it travel in pieces.
        expected_bytes: bytes of all weights, if known: shared memory then holds them at once where there is room.
        session: number of this transfer; a new number for each, so that no key of an earlier one is read.
    """

    kind: TransportKind
    address: str
    port: int
    receivers: int
    timeout_s: float = 300.0
    bucket_bytes: int = 64 << 20
    expected_bytes: int = 0
    session: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for calls that take nothing else."""
        return asdict(self)


@dataclass(frozen=True)
class Endpoint:
    """Where a sender or receiver stands.

    Args:
        address: host name or address of its machine, as others reach it.
        node: the same for two processes that share memory, and different otherwise.
        gpus: identities of the GPUs that it uses; none on a CPU.
        receivers: number of receivers that a transfer meets there.
    """

    address: str
    node: str
    gpus: tuple[str, ...]
    receivers: int = 1


@dataclass(frozen=True)
class SentWeights:
    """What the learner sent; all but rank 0's is empty.

    Args:
        version: of the weights.
        digests: of each tensor by name.
        nbytes: bytes of all tensors.
        buckets: number of buckets that carried them.
        seconds: from the first tensor until all receivers had taken the last one.
    """

    version: int
    digests: dict[str, int]
    nbytes: int
    buckets: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class ReceivedWeights:
    """What a generator received.

    Args:
        version: of the weights.
        digests: of each tensor by name; None where another receiver digests the very memory that both read.
        nbytes: bytes of all tensors.
    """

    version: int
    digests: Mapping[str, int | None]
    nbytes: int


def digest(tensor: Tensor) -> int:
    """64 bits that depend on every byte of the tensor, its place, the shape, the dtype and the kind of device.

    XXH3 of the bytes on a CPU, as fast as memory is; on a GPU, where it does not run, integer sums modulo 2**64 of the
    rows and columns of the tensor's words, weighted by position: exact, whatever the order of summation.
    """
    data = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    return _digest_of(position_sums(data) if data.is_cuda else [xxhash.xxh3_64_intdigest(data.numpy().data)], tensor)


def _digest_of(sums: list[int], tensor: Tensor) -> int:
    return xxhash.xxh3_64_intdigest(f"{sums} {tuple(tensor.shape)} {tensor.dtype}".encode())


class _CopyDigest:
    """Copies flat bytes piece by piece and digests them on the way, so that a CPU reads its memory once."""

    def __init__(self, flat: Tensor) -> None:
        self._flat = flat
        self._sums = None if flat.is_cuda else xxhash.xxh3_64()

    def copy(self, target: Tensor, start: int) -> None:
        """Fills the target with the bytes from `start` on; they follow those of the call before."""
        source = self._flat[start : start + target.numel()]
        if self._sums is None:
            target.copy_(source)
            return
        given, copied = source.numpy(), target.numpy()
        for at in range(0, len(given), _CACHED):
            part = given[at : at + _CACHED]
            self._sums.update(part.data)
            copied[at : at + _CACHED] = part

    def digest(self, tensor: Tensor) -> int:
        """`digest` of the tensor that the bytes are of."""
        return digest(tensor) if self._sums is None else _digest_of([self._sums.intdigest()], tensor)


def position_sums(data: Tensor) -> list[int]:
    """Integer sums that tell flat bytes from any others: of rows and columns of words, and of what is left over."""
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    words = data[:whole].view(torch.int64)
    full = words.numel() // _ROW_WORDS * _ROW_WORDS
    table = words[:full].view(-1, _ROW_WORDS)
    rest = (_weighted(words[full:]), _weighted(data[whole:].long()))
    return [int(value) for value in (_weighted(table.sum(0)), _weighted(table.sum(1)), *rest)]


def _weighted(words: Tensor) -> Tensor:
    """Sum of the words, each times an odd number that depends on its position, modulo 2**64."""
    position = torch.arange(1, words.numel() + 1, dtype=torch.int64, device=words.device)
    mixed = position * 0x1E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    return (words * (mixed | 1)).sum()


def check_same(sent: SentWeights, received: ReceivedWeights, *, who: str) -> None:
    """Raises WeightSyncError naming the version or the first tensor in which the two differ."""
    if sent.version != received.version:
        raise WeightSyncError(
            f"{who}: holds version {received.version} of the weights, the learner sent {sent.version}"
        )
    for name in sent.digests:
        if name not in received.digests:
            raise WeightSyncError(f"{who}: tensor {name!r} of version {sent.version} did not arrive")
    for name, value in received.digests.items():
        if name not in sent.digests:
            raise WeightSyncError(f"{who}: tensor {name!r} arrived, and the learner did not send it")
        if value is not None and value != sent.digests[name]:
            raise WeightSyncError(
                f"{who}: tensor {name!r} of version {sent.version} arrived with digest {value:016x}, "
                f"the learner sent {sent.digests[name]:016x}"
            )


def send_buckets(
    sender: Sender | None, version: int, buckets: Iterable[Sequence[tuple[str, Tensor]]], *, role: str = "policy"
) -> SentWeights:
    """Sends all tensors of the buckets as one version and gives their digests.

    Every rank of the learner calls it, because iterating gathers tensors from all of them; only rank 0 has a
    sender. The buckets' tensors are copied before the next bucket is asked for. When sending fails the buckets are
    still iterated to the end, so that no other rank is left waiting in a collective.

    Raises:
        WeightSyncError: a receiver failed, or a deadline passed.
    """
    stream = iter(buckets)
    if sender is None:
        for _ in stream:
            pass
        return SentWeights(version, {}, 0)
    action = fault("sync", role=role, rank=0, iteration=version)
    outgoing = _Outgoing(sender, action)
    try:
        sender.begin(version - 1 if action == "stale_version" else version)
        start = time.perf_counter()
        for bucket in stream:
            for name, tensor in bucket:
                outgoing.put(name, tensor)
        outgoing.finish()
    except BaseException as error:
        sender.fail(f"sender: {error}")
        for _ in stream:
            pass
        raise
    seconds = time.perf_counter() - start
    return SentWeights(version, outgoing.digests, sender.nbytes, sender.buckets, seconds)


class _Outgoing:
    """Digests and sends tensors one by one; spoils what goes over the wire where a test asks for it."""

    def __init__(self, sender: Sender, action: str | None) -> None:
        self.digests: dict[str, int] = {}
        self._sender = sender
        self._action = action
        self._spoiled = False
        self._held: dict[tuple[torch.Size, torch.dtype], tuple[str, Tensor]] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        # Both sides digest on the wire's device.
        tensor = tensor.detach().to(self._sender.device)
        if self._action in ("drop_tensor", "swap_tensors", "corrupt") and not self._spoiled:
            self.digests[name] = digest(tensor)
            self._spoil(name, tensor)
        else:
            self.digests[name] = self._sender.add(name, tensor)

    def _spoil(self, name: str, tensor: Tensor) -> None:
        if self._action == "drop_tensor":
            self._spoiled = True
        elif self._action == "corrupt":
            bad = tensor.detach().clone().reshape(-1).view(torch.uint8)
            bad[bad.numel() // 2] ^= 1
            self._sender.add(name, bad.view(tensor.dtype).view(tensor.shape))
            self._spoiled = True
        else:
            twin = self._held.pop((tensor.shape, tensor.dtype), None)
            if twin is not None and not torch.equal(twin[1], tensor):
                self._sender.add(twin[0], tensor)
                self._sender.add(name, twin[1])
                self._spoiled = True
            else:
                for held in () if twin is None else (twin,):
                    self._sender.add(*held)
                self._held[tensor.shape, tensor.dtype] = (name, tensor.detach().clone())
                return
        self._release()

    def _release(self) -> None:
        for name, tensor in self._held.values():
            self._sender.add(name, tensor)
        self._held.clear()

    def finish(self) -> None:
        self._release()
        self._sender.finish()


# -------------------------------------------------------------------------------- the two sides


class _Side:
    """What sender and receiver share: the store, its keys, waiting, and telling the other side of a failure."""

    def __init__(self, spec: TransportSpec, store: Store) -> None:
        self.spec = spec
        self._store = store
        store.set_timeout(timedelta(seconds=spec.timeout_s))

    def _tell(self, message: dict[str, Any], *to: object) -> None:
        """Puts a message into the mailboxes of receivers, by their ranks, or of the `sender`."""
        text = json.dumps(message)
        for one in to:
            with self._in_words(f"writing to {one}"):
                self._store.queue_push(self._mailbox(one), text)

    def _hear(self, me: object, what: str) -> dict[str, Any]:
        """The next message in the own mailbox; raises when the other side failed or the deadline passed."""
        with self._in_words(what):
            try:
                message: dict[str, Any] = json.loads(self._store.queue_pop(self._mailbox(me)))
            except DistStoreError:
                raise WeightSyncError(f"weight transfer: waited {self.spec.timeout_s:g} s for {what}") from None
        if "error" in message:
            raise WeightSyncError(f"weight transfer stopped: {message['error']}")
        return message

    def _mailbox(self, of: object) -> str:
        return f"{self.spec.session}/{of}"

    @contextlib.contextmanager
    def _in_words(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as error:
            raise WeightSyncError(
                f"weight transfer: {what}: the other side's process is gone ({_first_line(error)})"
            ) from error

    def fail(self, reason: str) -> None:
        """Tells the other side why this one stopped; harmless when it cannot be told any more."""
        for mailbox in self._others():
            with contextlib.suppress(WeightSyncError):
                self._tell({"error": reason}, mailbox)

    def _others(self) -> Iterable[object]:
        """Whom a failure concerns."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError


class Sender(_Side):
    """The learner's end: packs tensors into buckets and puts them on the wire.

    One sender serves many transfers: `renewed` gives it the next session.
    """

    def __init__(self, spec: TransportSpec) -> None:
        super().__init__(spec, _master_store(spec))
        self.nbytes = 0
        self._wire: Wire | None = None
        self._version = 0
        self._bucket = 0
        self._filled = 0
        self._pieces: list[dict[str, Any]] = []
        self._slot: Tensor | None = None
        self._count = 0
        self._taken: dict[int, int] = {}

    @classmethod
    def renewed(cls, previous: Sender | None, spec: TransportSpec) -> Sender:
        """The previous sender where the spec differs in its session alone, else a new one (and the old is closed)."""
        if previous is not None and _same_but_session(spec, previous.spec):
            previous.spec = spec
            return previous
        if previous is not None:
            previous.close()
        return cls(spec)

    def begin(self, version: int) -> None:
        """Starts a transfer. Where the ends do not meet first, what there is room for is packed before receivers come.

        Raises:
            WeightSyncError: a receiver did not come in time.
        """
        self.nbytes, self._version, self._bucket, self._filled, self._count = 0, version, 0, 0, 0
        self._pieces, self._slot = [], None
        self._taken = {}
        if self.spec.kind in _MEETING:
            self._await_receivers()
        if self._wire is None:
            if self.spec.kind in _MEETING:
                self._tell({"start": True}, *self._others())
            self._wire = _make_wire(self.spec, self._store, rank=0)

    def add(self, name: str, tensor: Tensor) -> int:
        """Copies one tensor into the stream, and gives its digest; it may change as soon as this returns."""
        flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
        copied = _CopyDigest(flat)
        common = {"name": name, "dtype": _dtype_name(tensor.dtype), "shape": list(tensor.shape), "total": flat.numel()}
        start = 0
        while True:
            slot = self._open_slot()
            length = min(flat.numel() - start, slot.numel() - self._filled)
            assert self._wire is not None
            self._wire.reserve(self._bucket, self._filled, length)
            copied.copy(slot[self._filled : self._filled + length], start)
            self._pieces.append({**common, "start": start, "at": self._filled, "length": length})
            self._filled += -(-length // ALIGN) * ALIGN
            start += length
            if self._filled >= slot.numel():
                self._flush()
            if start >= flat.numel():
                break
        self.nbytes += flat.numel()
        self._count += 1
        return copied.digest(tensor)

    def finish(self) -> None:
        """Sends what is left, and waits until every receiver has taken all of it."""
        self._flush(tensors=self._count)
        self._await_taken(self._bucket - 1)
        assert self._wire is not None
        self._wire.settle()

    def close(self) -> None:
        """Frees the buffers and the group; the store stays for the next sender on this port."""
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    @property
    def device(self) -> str:
        """Type of the device that tensors travel from."""
        return "cuda" if self.spec.kind in _ON_GPU else "cpu"

    @property
    def buckets(self) -> int:
        """Buckets of the last transfer."""
        return self._bucket

    def _others(self) -> Iterable[object]:
        return range(self.spec.receivers)

    def _await_receivers(self) -> None:
        while absent := self.spec.receivers - len(self._taken):
            self._note_progress(f"the receivers to come; {absent} of {self.spec.receivers} are missing")

    def _await_taken(self, bucket: int) -> None:
        if bucket < 0:
            return
        self._await_receivers()
        while min(self._taken.values()) <= bucket:
            self._note_progress(f"bucket {bucket} to be taken")

    def _note_progress(self, what: str) -> None:
        """Hears of one receiver that it came, or how many buckets it took."""
        message = self._hear("sender", what)
        self._taken[message["rank"]] = message["taken"]

    def _open_slot(self) -> Tensor:
        if self._slot is None:
            assert self._wire is not None, "begin() comes first"
            slot = self._wire.slot(self._bucket)
            self._await_taken(self._bucket - self._wire.slots)
            self._slot = slot
        return self._slot

    def _flush(self, *, tensors: int | None = None) -> None:
        """Lets the open bucket go; the last one says how many tensors were sent, and may be empty."""
        slot = self._open_slot()
        assert self._wire is not None
        layout = {
            "version": self._version,
            "pieces": self._pieces,
            "bytes": min(self._filled, slot.numel()),
            "wire": self._wire.description(),
            "tensors": tensors,
        }
        self._wire.before_publish()
        self._tell(layout, *self._others())
        with self._in_words(f"sending bucket {self._bucket}"):
            self._wire.publish(self._bucket, layout["bytes"])
        self._bucket += 1
        self._filled, self._pieces, self._slot = 0, [], None


class Receiver(_Side):
    """A generator's end: gives the tensors in the order in which they were sent.

    Args:
        rank: number of this receiver, 0 to spec.receivers - 1.
    """

    def __init__(self, spec: TransportSpec, rank: int) -> None:
        assert 0 <= rank < spec.receivers, f"receiver {rank} of {spec.receivers}"
        try:
            store = TCPStore(
                spec.address,
                spec.port,
                is_master=False,
                timeout=timedelta(seconds=spec.timeout_s),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            raise WeightSyncError(
                f"weight transfer: no sender at {spec.address}:{spec.port} within {spec.timeout_s:g} s "
                f"({_first_line(error)})"
            ) from error
        super().__init__(spec, store)
        self.rank = rank
        self._wire: Wire | None = None
        self._attached: dict[str, Any] | None = None
        self._version = -1
        self._digests: dict[str, int | None] = {}
        self._nbytes = 0

    @classmethod
    def renewed(cls, previous: Receiver | None, spec: TransportSpec, rank: int) -> Receiver:
        """The previous receiver where the spec differs in its session alone, else a new one (and the old is closed)."""
        if previous is not None and previous.rank == rank and _same_but_session(spec, previous.spec):
            previous.spec = spec
            return previous
        if previous is not None:
            previous.close()
        return cls(spec, rank)

    def tensors(self, version: int) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the transfer, on the wire's device, digested on arrival; valid until the next transfer.

        The sender may begin at once; the tensors come one by one. Of receivers that read the same pages, the one that
        comes first to a bucket digests what ends in it: so the work falls to those that have the time.

        Raises:
            WeightSyncError: another version arrives, the sender failed, or a deadline passed.
        """
        self._version, self._digests, self._nbytes = -1, {}, 0
        self._tell({"rank": self.rank, "taken": 0}, "sender")
        return self._arriving(version)

    def _arriving(self, version: int) -> Iterator[tuple[str, Tensor]]:
        if self._wire is None and self.spec.kind in _MEETING:
            self._hear(self.rank, "the sender to come")
            self._wire = _make_wire(self.spec, self._store, rank=self.rank + 1)
        unfinished: dict[str, _Arriving] = {}
        bucket, count = 0, None
        while count is None:
            layout = self._hear(self.rank, f"bucket {bucket}")
            check_version(layout["version"], version)
            count = layout["tensors"]
            wire = self._fetched_from(bucket, layout)
            complete = list(self._complete(wire, bucket, layout, unfinished))
            mine = wire.claim(bucket, self.spec.session)
            bucket += 1
            if not wire.whole:
                self._tell({"rank": self.rank, "taken": bucket}, "sender")
            for name, tensor in complete:
                self._digests[name] = digest(tensor) if mine else None
                self._nbytes += tensor.numel() * tensor.element_size()
                yield name, tensor
        self._version = version
        if wire.whole:
            self._tell({"rank": self.rank, "taken": bucket}, "sender")
        if unfinished or len(self._digests) != count:
            raise WeightSyncError(
                f"weight transfer: {count} tensors were sent, {len(self._digests)} arrived, "
                f"{len(unfinished)} of them in part"
            )

    def _fetched_from(self, bucket: int, layout: dict[str, Any]) -> Wire:
        """The wire, attached to where the sender says it is."""
        if layout["wire"] != self._attached:
            self.close()
            with self._in_words(f"receiving bucket {bucket}"):
                self._wire = attach_wire(self.spec.kind, layout["wire"], receiver=self.rank)
            self._attached = layout["wire"]
        assert self._wire is not None
        return self._wire

    def _complete(
        self, wire: Wire, bucket: int, layout: dict[str, Any], unfinished: dict[str, _Arriving]
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors that end in this bucket: where they lie if the wire keeps them, else copies."""
        with self._in_words(f"receiving bucket {bucket}"):
            source = wire.fetch(bucket, layout["bytes"])
        for piece in layout["pieces"]:
            name, total, at, length = (piece[key] for key in ("name", "total", "at", "length"))
            if piece["start"] == 0:
                room = None if wire.whole else torch.empty(total, dtype=torch.uint8, device=source.device)
                unfinished[name] = _Arriving(bucket, at, room)
            tensor = unfinished[name]
            if tensor.room is not None:
                # The engine keeps references until a layer is complete, and the sender writes over the bucket.
                tensor.room[piece["start"] : piece["start"] + length].copy_(source[at : at + length])
            tensor.have += length
            if tensor.have == total:
                del unfinished[name]
                flat = tensor.room
                if flat is None:
                    flat = wire.fetch(tensor.bucket, tensor.at + total)[tensor.at :]
                yield name, flat.view(getattr(torch, piece["dtype"])).view(piece["shape"])
        if source.is_cuda:
            torch.cuda.current_stream().synchronize()

    def _others(self) -> Iterable[object]:
        return ("sender",)

    def received(self) -> ReceivedWeights:
        """What arrived, after `tensors` came to its end."""
        assert self._version >= 0, "the transfer is not complete"
        return ReceivedWeights(self._version, self._digests, self._nbytes)

    def close(self) -> None:
        """Frees the buffers and the group."""
        if self._wire is not None:
            self._wire.close()
            self._wire = self._attached = None


@dataclass
class _Arriving:
    """A tensor of which pieces are here: where it begins, the bytes so far, and its own memory if it needs any."""

    bucket: int
    at: int
    room: Tensor | None
    have: int = 0


class Inbox:
    """Takes one transfer after the other; after a failed one the next starts afresh."""

    def __init__(self) -> None:
        self._receiver: Receiver | None = None

    def take(
        self, spec: TransportSpec, version: int, *, rank: int, load: Callable[[Iterator[tuple[str, Tensor]]], None]
    ) -> ReceivedWeights:
        """Hands the arriving tensors to `load`, which may not keep them; those that it leaves are thrown away.

        Raises:
            WeightSyncError: another version arrives, the sender fails, or a deadline passes.
        """
        self._receiver = Receiver.renewed(self._receiver, spec, rank)
        try:
            arriving = self._receiver.tensors(version)
            load(arriving)
            for _ in arriving:
                pass
        except BaseException as error:
            self._receiver.fail(f"generator's receiver {rank}: {error}")
            self.close()
            raise
        return self._receiver.received()

    def close(self) -> None:
        """Frees the receiver's buffers."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None


def check_version(got: int, wanted: int) -> None:
    """Raises WeightSyncError where weights of another version arrive than the one announced."""
    if got != wanted:
        raise WeightSyncError(f"weights of version {got} arrived where version {wanted} was announced; they are stale")


_STORES: dict[int, TCPStore] = {}


def open_store(timeout_s: float = 300.0) -> int:
    """Starts the sender's store on a free port of this host and gives the port, for the TransportSpec."""
    store = TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    _STORES[store.port] = store
    return int(store.port)


def this_endpoint(*, gpus: int = 1, receivers: int = 1) -> Endpoint:
    """Where this process stands.

    Args:
        gpus: GPUs that it uses; the first ones that it sees.
        receivers: number of receivers that a transfer meets in it.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = socket.gethostname()
    seen = range(min(gpus, torch.cuda.device_count()) if torch.cuda.is_available() else 0)
    return Endpoint(
        address=os.environ.get("MASTER_ADDR") or _own_address(),
        node=f"{host}/{boot.read_text().strip() if boot.exists() else ''}",
        gpus=tuple(str(torch.cuda.get_device_properties(device).uuid) for device in seen),
        receivers=receivers,
    )


def choose_kind(sender: Endpoint, receivers: Sequence[Endpoint]) -> TransportKind:
    """The fastest way from the sender to all receivers."""
    everyone = [sender, *receivers]
    gpus = [gpu for endpoint in everyone for gpu in endpoint.gpus]
    if all(endpoint.gpus for endpoint in everyone):
        if set(gpus) == {sender.gpus[0]}:
            return "cuda_ipc"
        if len(set(gpus)) == len(gpus):
            return "nccl"
    return "shared_memory" if {endpoint.node for endpoint in everyone} == {sender.node} else "gloo"


def sender_address(sender: Endpoint, receivers: Sequence[Endpoint]) -> str:
    """Host at which the receivers find the sender's store."""
    return "127.0.0.1" if all(receiver.node == sender.node for receiver in receivers) else sender.address


def _own_address() -> str:
    """This machine's address on the way out; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _master_store(spec: TransportSpec) -> TCPStore:
    if spec.port not in _STORES:
        try:
            _STORES[spec.port] = TCPStore(
                "localhost",
                spec.port,
                is_master=True,
                timeout=timedelta(seconds=spec.timeout_s),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            raise WeightSyncError(
                f"weight transfer: port {spec.port} cannot be opened for the weights ({_first_line(error)})"
            ) from error
    return _STORES[spec.port]


def _same_but_session(one: TransportSpec, other: TransportSpec) -> bool:
    return replace(one, session=other.session) == other


def _make_wire(spec: TransportSpec, store: Store, *, rank: int) -> Wire:
    return make_wire(
        spec.kind,
        PrefixStore(str(spec.session), store),
        rank=rank,
        receivers=spec.receivers,
        bucket_bytes=spec.bucket_bytes,
        expected_bytes=spec.expected_bytes,
        timeout_s=spec.timeout_s,
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
