"""Transports with sender and receivers as threads of one process: what is sent arrives, and failures are told."""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.distributed import transports, wires
from rlhf_ray.distributed.transports import (
    Endpoint,
    ReceivedWeights,
    Receiver,
    Sender,
    SentWeights,
    TransportSpec,
    check_same,
    choose_kind,
    digest,
    open_store,
    position_sums,
    send_buckets,
    sender_address,
    this_endpoint,
)
from rlhf_ray.errors import WeightSyncError


def make_spec(kind: str = "shared_memory", receivers: int = 1, **settings: Any) -> TransportSpec:
    settings = {"timeout_s": 20.0, "bucket_bytes": 1 << 12} | settings
    return TransportSpec(kind=kind, address="127.0.0.1", port=open_store(), receivers=receivers, **settings)


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embedding": torch.randn(300, 16, generator=generator),
        "layer.weight": torch.randn(16, 16, generator=generator).bfloat16(),
        "layer.twin": torch.randn(16, 16, generator=generator).bfloat16(),
        "layer.bias": torch.randn(5, generator=generator),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(8, 24, generator=generator).T,
    }


def buckets_of(tensors: dict[str, Tensor], size: int = 2) -> list[list[tuple[str, Tensor]]]:
    items = list(tensors.items())
    return [items[start : start + size] for start in range(0, len(items), size)]


def transfer(
    spec: TransportSpec, tensors: dict[str, Tensor], version: int = 1, sender: Sender | None = None
) -> tuple[SentWeights, list[tuple[dict[str, Tensor], ReceivedWeights]]]:
    def receive(rank: int) -> tuple[dict[str, Tensor], ReceivedWeights]:
        with Receiver(spec, rank) as receiver:
            try:
                return dict(receiver.tensors(version)), receiver.received()
            except WeightSyncError as error:
                receiver.fail(f"receiver {rank}: {error}")
                raise

    with ThreadPoolExecutor() as pool:
        arrivals = [pool.submit(receive, rank) for rank in range(spec.receivers)]
        with Sender(spec) as own:
            sent = send_buckets(own, version, buckets_of(tensors))
        return sent, [arrival.result() for arrival in arrivals]


@pytest.mark.parametrize(("kind", "expected"), [("shared_memory", 0), ("shared_memory", 25_000), ("gloo", 0)])
@pytest.mark.parametrize("receivers", [1, 2])
def test_every_tensor_arrives_as_it_was_sent(kind: str, expected: int, receivers: int) -> None:
    tensors = weights()
    sent, arrivals = transfer(make_spec(kind, receivers, expected_bytes=expected), tensors)
    assert sent.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    for arrived, received in arrivals:
        assert list(arrived) == list(tensors)
        for name, tensor in tensors.items():
            assert arrived[name].dtype == tensor.dtype
            assert torch.equal(arrived[name], tensor), name
        check_same(sent, received, who="generator 0")
        assert received.version == 1
        assert received.nbytes == sent.nbytes


@pytest.mark.parametrize("receivers", [1, 2, 3])
def test_whatever_receivers_share_is_digested_by_one_of_them(receivers: int) -> None:
    """Of the same pages each tensor by one or, where two come at once, by both; of copies each all of its own."""
    tensors = {"embedding": torch.randn(4000)} | {f"tensor{i}": torch.randn(500 + 97 * (i % 5)) for i in range(30)}
    sent, arrivals = transfer(make_spec("shared_memory", receivers, expected_bytes=100_000), tensors)
    digested = [{name for name, value in found.digests.items() if value is not None} for _, found in arrivals]
    assert set().union(*digested) == set(tensors)
    for _, received in arrivals:
        assert list(received.digests) == list(tensors)
        assert all(value in (None, sent.digests[name]) for name, value in received.digests.items())

    _, arrivals = transfer(make_spec("shared_memory", receivers), tensors)
    assert all(None not in received.digests.values() for _, received in arrivals)


def test_the_receiver_that_is_ahead_digests() -> None:
    """In each transfer over the same pages another one: what was claimed in the one before says nothing."""
    tensors = {f"tensor{i}": torch.randn(500) for i in range(30)}
    spec = make_spec("shared_memory", 2, expected_bytes=100_000, bucket_bytes=6400)
    sender, receivers = Sender(spec), [Receiver(spec, rank) for rank in range(2)]
    with ThreadPoolExecutor() as pool:
        for session, order in enumerate(([0, 1], [1, 0], [1, 0])):
            current = replace(spec, session=session)
            sender = Sender.renewed(sender, current)
            receivers = [Receiver.renewed(receiver, current, rank) for rank, receiver in enumerate(receivers)]
            sending = pool.submit(send_buckets, sender, session, buckets_of(tensors))
            for rank in order:
                assert list(dict(receivers[rank].tensors(session))) == list(tensors)
            sent = sending.result()
            assert sent.buckets > 5
            first, second = (receivers[rank].received().digests for rank in order)
            assert first == sent.digests
            assert second == dict.fromkeys(tensors)
    for end in (sender, *receivers):
        end.close()


def test_receivers_change_places_within_a_transfer() -> None:
    """Whoever is ahead at a bucket digests what ends in it, the other one what it leaves behind."""
    tensors = {f"tensor{i}": torch.randn(500) for i in range(30)}
    spec = make_spec("shared_memory", 2, expected_bytes=100_000, bucket_bytes=6400)
    with ThreadPoolExecutor() as pool, Sender(spec) as sender, Receiver(spec, 0) as one, Receiver(spec, 1) as other:
        sending = pool.submit(send_buckets, sender, 1, buckets_of(tensors))
        first, second = one.tensors(1), other.tensors(1)
        half = [next(first) for _ in range(15)]
        assert list(dict(second)) == [*dict(half), *dict(first)]
        sent = sending.result()
        digests = [receiver.received().digests for receiver in (one, other)]
    by_first, by_second = ({name for name, value in found.items() if value is not None} for found in digests)
    assert by_first | by_second == set(tensors)
    assert not by_first & by_second
    assert {f"tensor{i}" for i in range(15)} <= by_first
    assert {f"tensor{i}" for i in range(20, 30)} <= by_second
    assert all(found[name] in (None, sent.digests[name]) for found in digests for name in tensors)


def test_buckets_may_be_overwritten_once_the_next_one_is_asked_for() -> None:
    room = torch.zeros(4)

    def stream() -> Any:
        for value in range(5):
            room.fill_(value)
            yield [(f"tensor{value}", room)]

    spec = make_spec(bucket_bytes=64)
    with ThreadPoolExecutor() as pool:
        arrival = pool.submit(lambda: dict(Receiver(spec, 0).tensors(1)))
        send_buckets(Sender(spec), 1, stream())
    assert [tensor.tolist() for tensor in arrival.result().values()] == [[float(value)] * 4 for value in range(5)]


def test_received_tensors_stay_when_their_bucket_is_reused() -> None:
    # vLLM keeps a layer's tensors until the layer is complete; five buckets go through two slots.
    tensors = {f"tensor{i}": torch.full((16,), float(i)) for i in range(5)}
    _, [(arrived, _)] = transfer(make_spec(bucket_bytes=64), tensors)
    assert all(torch.equal(arrived[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
def test_one_sender_and_receiver_serve_many_transfers(kind: str) -> None:
    spec = make_spec(kind)
    sessions = [TransportSpec(**spec.as_dict() | {"session": number}) for number in range(3)]

    def receive() -> list[ReceivedWeights]:
        receiver, found = None, []
        for number, session in enumerate(sessions):
            receiver = Receiver.renewed(receiver, session, 0)
            dict(receiver.tensors(number))
            found.append(receiver.received())
        return found

    with ThreadPoolExecutor() as pool:
        arrivals = pool.submit(receive)
        sender, sent = None, []
        for number, session in enumerate(sessions):
            sender = Sender.renewed(sender, session)
            sent.append(send_buckets(sender, number, buckets_of(weights(number))))
        received = arrivals.result()
    assert len({entry.digests["embedding"] for entry in sent}) == 3
    for out, back in zip(sent, received, strict=True):
        check_same(out, back, who="generator 0")


def test_a_receiver_follows_its_sender_to_new_shared_memory() -> None:
    # The learner's sender served others meanwhile, and began a new segment; the receiver still maps the old one.
    ours, others = make_spec(), make_spec()
    receiver, sender = None, None
    for number, spec in enumerate((ours, others, ours)):
        session = TransportSpec(**spec.as_dict() | {"session": number})
        receiver = Receiver.renewed(receiver, session, 0) if spec is ours else receiver
        present = receiver if spec is ours else Receiver(session, 0)
        assert present is not None
        sender = Sender.renewed(sender, session)
        with ThreadPoolExecutor() as pool:
            arrival = pool.submit(lambda end=present, version=number: dict(end.tensors(version)))
            send_buckets(sender, number, buckets_of(weights(number)))
            assert torch.equal(arrival.result()["embedding"], weights(number)["embedding"])


def test_tensors_larger_than_a_slot_go_around_the_ring() -> None:
    tensors = {"long": torch.arange(5000), "short": torch.arange(3), "longer": torch.arange(9000).flip(0)}
    sent, [(arrived, received)] = transfer(make_spec(bucket_bytes=1 << 10), tensors)
    assert all(torch.equal(arrived[name], tensor) for name, tensor in tensors.items())
    check_same(sent, received, who="generator 0")
    assert sent.buckets == -(-(5000 * 8 + 64 + 9000 * 8) // 1024)


def received_twice(spec: TransportSpec) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What arrived in each of two transfers, as it is now and as it was before the next transfer."""
    found = []
    receiver = Receiver(spec, 0)
    sender = Sender(spec)
    for number in range(2):
        session = replace(spec, session=number)
        receiver, sender = Receiver.renewed(receiver, session, 0), Sender.renewed(sender, session)
        with ThreadPoolExecutor() as pool:
            arrival = pool.submit(lambda end=receiver, version=number: dict(end.tensors(version)))
            send_buckets(sender, number, buckets_of(weights(number)))
            arrived = arrival.result()
        assert all(torch.equal(arrived[name], tensor) for name, tensor in weights(number).items())
        found.append((arrived, {name: tensor.clone() for name, tensor in arrived.items()}))
    return found


def test_expected_weights_are_read_where_they_lie() -> None:
    # The second transfer writes into the memory that the first one's tensors are views of.
    (first, _), (_, second) = received_twice(make_spec(bucket_bytes=1 << 10, expected_bytes=25_000))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_weights_without_room_are_copied_out_of_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wires, "_room", lambda folder: 60_000)
    (first, before), _ = received_twice(make_spec(bucket_bytes=1 << 10, expected_bytes=25_000))
    assert all(torch.equal(first[name], tensor) for name, tensor in before.items())


def test_more_weights_than_expected_are_an_error_and_overwrite_nothing() -> None:
    with pytest.raises(WeightSyncError, match="more than the 2048 bytes that were announced"):
        transfer(make_spec(bucket_bytes=1 << 10, expected_bytes=1 << 10), weights())


def test_shared_memory_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wires, "_shared_folder", lambda needed: str(tmp_path))
    orphan = tmp_path / "rlhf_ray-weights-dead"
    orphan.write_bytes(b"left by a sender that was killed")
    spec = make_spec()
    with ThreadPoolExecutor() as pool:
        arrival = pool.submit(lambda: dict(Receiver(spec, 0).tensors(1)))
        sender = Sender(spec)
        send_buckets(sender, 1, buckets_of(weights()))
        arrival.result()
    assert list(tmp_path.iterdir()) == []


def test_segment_of_a_living_sender_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wires, "_shared_folder", lambda needed: str(tmp_path))
    living = wires.SharedPages.create(64)
    wires._remove_stale(str(tmp_path))
    assert [str(path) for path in tmp_path.iterdir()] == [living.path]
    living.close()


def fail_time(call: Callable[[], Any]) -> tuple[str, float]:
    start = time.monotonic()
    with pytest.raises(WeightSyncError) as caught:
        call()
    return str(caught.value), time.monotonic() - start


def test_a_failing_receiver_stops_the_sender_within_a_second() -> None:
    spec = make_spec()
    drained: list[int] = []

    def stream() -> Any:
        for bucket in range(20):
            drained.append(bucket)
            yield [(f"tensor{bucket}", torch.zeros(2000))]

    receiver = Receiver(spec, 0)

    def receive() -> None:
        stream = receiver.tensors(1)
        next(stream)
        receiver.fail("generator 0: out of memory")

    with ThreadPoolExecutor() as pool:
        arrival = pool.submit(receive)
        message, seconds = fail_time(lambda: send_buckets(Sender(spec), 1, stream()))
        arrival.result()
    assert "generator 0: out of memory" in message
    assert seconds < 1.0
    assert drained == list(range(20)), "other ranks' collectives must complete"


@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
def test_a_failing_sender_stops_the_receivers_within_a_second(kind: str) -> None:
    spec = make_spec(kind, receivers=2)

    def stream() -> Any:
        yield [("tensor", torch.zeros(2000))]
        raise RuntimeError("gathering failed")

    with ThreadPoolExecutor() as pool:
        # torch takes five seconds to join about every tenth store of one process.
        receivers = [Receiver(spec, rank) for rank in (0, 1)]
        arrivals = [pool.submit(fail_time, lambda own=own: dict(own.tensors(1))) for own in receivers]
        with pytest.raises(RuntimeError, match="gathering failed"):
            send_buckets(Sender(spec), 1, stream())
        for arrival in arrivals:
            message, seconds = arrival.result()
            assert "gathering failed" in message
            assert seconds < 2.0


@pytest.mark.parametrize(("kind", "expected"), [("shared_memory", 0), ("shared_memory", 25_000), ("gloo", 0)])
def test_a_missing_receiver_is_named_after_the_deadline(kind: str, expected: int) -> None:
    spec = make_spec(kind, receivers=2, timeout_s=0.6, expected_bytes=expected)
    Receiver(replace(spec, timeout_s=20.0), 0)._tell({"rank": 0, "taken": 0}, "sender")
    message, seconds = fail_time(lambda: send_buckets(Sender(spec), 1, buckets_of(weights())))
    assert message == "weight transfer: waited 0.6 s for the receivers to come; 1 of 2 are missing"
    assert seconds < 2.0


def test_a_missing_sender_is_named_after_the_deadline() -> None:
    port = open_store()
    transports._STORES.pop(port)
    spec = TransportSpec(kind="gloo", address="127.0.0.1", port=port, receivers=1, timeout_s=1.0)
    message, _ = fail_time(lambda: Receiver(spec, 0))
    assert message.startswith(f"weight transfer: no sender at 127.0.0.1:{port} within 1 s")


@pytest.mark.parametrize(("room", "missing"), [(1000, 19200), (0, 32)])
def test_full_memory_is_an_error_and_not_a_bus_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, room: int, missing: int
) -> None:
    """Whether there is none for a tensor, or none even for what the receivers note about the slots."""

    def fill(descriptor: int, start: int, length: int) -> None:
        if length > room:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(wires, "_shared_folder", lambda needed: str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", fill)
    with pytest.raises(
        WeightSyncError, match=rf"no room for {missing} more bytes .* \(No space left on device\); free some"
    ):
        transfer(make_spec(bucket_bytes=1 << 20), weights())
    assert not list(tmp_path.iterdir())


def test_nobody_clears_away_a_segment_that_is_being_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another sender on the node comes between the making of the file and its lock, and once more after both."""
    lock, cleared = fcntl.flock, []

    def clear_first(descriptor: int, how: int) -> None:
        if not cleared:
            cleared.append(descriptor)
            wires._remove_stale(str(tmp_path))
        lock(descriptor, how)

    monkeypatch.setattr(wires, "_shared_folder", lambda needed: str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", clear_first)
    wire = wires.SharedPages.create(1 << 12)
    wires._remove_stale(str(tmp_path))
    assert cleared
    assert [str(path) for path in tmp_path.iterdir()] == [wire.path]
    other = wires.SharedPages.attach(wire.description())
    for end in (other, wire):
        end.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("expected", [3 << 20, (300 << 20) + 12, 3 << 30])
def test_slots_of_all_weights_grow_and_lie_end_to_end(expected: int) -> None:
    wire = wires.SharedPages.create(64 << 20, expected)
    try:
        sizes = [wire.slot(bucket).numel() for bucket in range(wire.slots)]
        assert wire.whole
        assert sizes[:2] == [2 << 20, 4 << 20]
        assert sizes == sorted(sizes)
        assert sizes[-1] <= 64 << 20
        starts = [wire.slot(bucket).data_ptr() - wire.slot(0).data_ptr() for bucket in range(wire.slots)]
        assert starts == [sum(sizes[:bucket]) for bucket in range(wire.slots)]
        assert all(start % 64 == 0 for start in starts)
        assert 2 * expected <= sum(sizes) < 2 * expected + sizes[-1]
    finally:
        wire.close()


def test_a_small_model_takes_little_shared_memory() -> None:
    wire = wires.SharedPages.create(256 << 20)
    wire.reserve(0, 0, 5000)
    wire.reserve(0, 2000, 1000)
    wire.reserve(1, 0, 100)
    assert os.stat(wire.path).st_blocks * 512 <= 4 * mmap.PAGESIZE
    # Four slots, and what is noted about each.
    assert os.stat(wire.path).st_size == (32 << 20) + 4 * 8
    wire.close()


# ----------------------------------------------------------------------------- choosing the wire


@pytest.mark.parametrize(
    ("sender", "receivers", "kind"),
    [
        ("a", ["a", "a"], "shared_memory"),
        ("a", ["a", "b"], "gloo"),
        ("a:0", ["a:0"], "cuda_ipc"),
        ("a:0", ["a:0", "a:0"], "cuda_ipc"),
        ("a:0", ["a:1", "b:2"], "nccl"),
        ("a:0", ["a:1,2", "a:3,4"], "nccl"),
        ("a:0", ["a:0", "a:1"], "shared_memory"),
        ("a:0", ["a:0", "b:1"], "gloo"),
        ("a", ["a:0"], "shared_memory"),
        ("a:0", ["b"], "gloo"),
    ],
)
def test_choice_of_the_wire(sender: str, receivers: list[str], kind: str) -> None:
    def endpoint(text: str) -> Endpoint:
        node, _, gpus = text.partition(":")
        return Endpoint(address=f"host-{node}", node=node, gpus=tuple(gpus.split(",")) if gpus else ())

    ends = [endpoint(text) for text in receivers]
    assert choose_kind(endpoint(sender), ends) == kind
    near = all(text.startswith("a") for text in receivers)
    assert sender_address(endpoint(sender), ends) == ("127.0.0.1" if near else "host-a")


def test_two_processes_of_a_machine_stand_at_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.7")
    assert this_endpoint() == this_endpoint()
    assert this_endpoint().address == "10.0.0.7"


# ------------------------------------------------------------------------------------ the faults


def spoiled(monkeypatch: pytest.MonkeyPatch, action: str, version: int = 3) -> Callable[[], None]:
    monkeypatch.setenv("RLHF_RAY_FAULT", f"sync:policy:0:{version}:{action}")

    def run() -> None:
        sent, [(_, received)] = transfer(make_spec(), weights(), version)
        check_same(sent, received, who="generator 0")

    return run


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("drop_tensor", "generator 0: tensor 'embedding' of version 3 did not arrive"),
        ("swap_tensors", "generator 0: tensor 'layer.weight' of version 3 arrived with digest "),
        ("corrupt", "generator 0: tensor 'embedding' of version 3 arrived with digest "),
        ("stale_version", "weights of version 2 arrived where version 3 was announced; they are stale"),
    ],
)
def test_a_spoiled_transfer_is_caught(monkeypatch: pytest.MonkeyPatch, action: str, message: str) -> None:
    with pytest.raises(WeightSyncError) as caught:
        spoiled(monkeypatch, action)()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("action", "check"),
    [
        ("drop_tensor", "check_same"),
        ("swap_tensors", "check_same"),
        ("corrupt", "check_same"),
        ("stale_version", "check_version"),
    ],
)
def test_without_its_check_a_spoiled_transfer_passes(monkeypatch: pytest.MonkeyPatch, action: str, check: str) -> None:
    """Shows that the check named here, and no other, is what catches the fault."""

    def let_pass(*arguments: object, **named: object) -> None:
        return None

    monkeypatch.setattr(transports, check, let_pass)
    monkeypatch.setitem(globals(), "check_same", let_pass if check == "check_same" else check_same)
    run = spoiled(monkeypatch, action)
    if action == "stale_version":
        # The receiver reports the version that it was told to expect, so nothing else would notice.
        sent, [(_, received)] = transfer(make_spec(), weights(), 3)
        assert (sent.version, received.version) == (3, 3)
    else:
        run()


def test_a_tensor_that_was_never_sent_is_named() -> None:
    sent = SentWeights(1, {"a": 1}, 4)
    with pytest.raises(WeightSyncError, match=r"generator 1: tensor 'b' arrived, and the learner did not send it"):
        check_same(sent, ReceivedWeights(1, {"a": 1, "b": 2}, 8), who="generator 1")
    with pytest.raises(WeightSyncError, match="generator 1: holds version 0 of the weights, the learner sent 1"):
        check_same(sent, ReceivedWeights(0, {"a": 1}, 4), who="generator 1")
    with pytest.raises(WeightSyncError, match="generator 1: tensor 'a' of version 1 did not arrive"):
        check_same(sent, ReceivedWeights(1, {}, 4), who="generator 1")
    check_same(sent, ReceivedWeights(1, {"a": None}, 4), who="generator 1")


# ----------------------------------------------------------------------------------- the digest


def test_digest_sees_every_byte_place_shape_and_type() -> None:
    tensor = torch.arange(1000, dtype=torch.float32).reshape(20, 50)
    found = {digest(tensor), digest(tensor.reshape(50, 20)), digest(tensor.view(torch.int32)), digest(tensor.T)}
    for position in range(1000):
        other = tensor.clone()
        other.view(-1)[position] += 0.5
        found.add(digest(other))
    for left, right in [(0, 1), (3, 512), (510, 511), (17, 999), (0, 512)]:
        other = tensor.clone().view(-1)
        other[[left, right]] = other[[right, left]]
        found.add(digest(other.view(20, 50)))
    assert len(found) == 4 + 1000 + 5


def test_digest_is_the_same_for_views_and_any_alignment() -> None:
    room = torch.randn(10_001)
    for start in range(4):
        assert digest(room[start : start + 4097]) == digest(room[start : start + 4097].clone())
    assert digest(room[:600].view(20, 30).T) == digest(room[:600].view(20, 30).T.contiguous())


def test_digest_of_odd_sizes() -> None:
    assert len({digest(torch.zeros(size, dtype=torch.uint8)) for size in range(20)}) == 20
    assert digest(torch.tensor(1.0)) != digest(torch.tensor([1.0]))
    assert digest(torch.tensor([1, 2, 3], dtype=torch.uint8)) != digest(torch.tensor([3, 2, 1], dtype=torch.uint8))


def test_sums_of_a_gpus_digest_see_every_byte_and_place() -> None:
    words = torch.arange(2000, dtype=torch.int64)
    data = words.view(torch.uint8)
    found = [position_sums(data[:-3])]
    for byte in range(0, data.numel(), 7):
        other = data.clone()
        other[byte] += 1
        found.append(position_sums(other))
    for left, right in [(0, 1), (5, 5 + 256 * 4), (255, 256), (1, 1999)]:
        exchanged = words.clone()
        exchanged[[left, right]] = exchanged[[right, left]]
        found.append(position_sums(exchanged.view(torch.uint8)))
    assert position_sums(data) not in found
    assert position_sums(data[3:]) == position_sums(data[3:].clone())


def test_ranks_without_a_sender_only_iterate() -> None:
    seen: list[str] = []

    def stream() -> Any:
        for bucket in buckets_of(weights()):
            seen.extend(name for name, _ in bucket)
            yield bucket

    assert send_buckets(None, 4, stream()) == SentWeights(4, {}, 0)
    assert seen == list(weights())
