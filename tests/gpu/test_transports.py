"""The GPU's wires: CUDA IPC between two processes on one GPU, NCCL between two GPUs."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from rlhf_ray.distributed.transports import (
    ReceivedWeights,
    Receiver,
    Sender,
    TransportSpec,
    check_same,
    digest,
    open_store,
    send_buckets,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def receive(spec: TransportSpec, rank: int, device: int) -> list[ReceivedWeights]:
    torch.cuda.set_device(device)
    found = []
    receiver = None
    for session in range(2):
        receiver = Receiver.renewed(receiver, TransportSpec(**spec.as_dict() | {"session": session}), rank)
        for _, tensor in receiver.tensors(session):
            assert tensor.device == torch.device("cuda", device)
        found.append(receiver.received())
    assert receiver is not None
    receiver.close()
    return found


@pytest.mark.parametrize(("kind", "devices"), [("cuda_ipc", [0]), ("cuda_ipc", [0, 0]), ("nccl", [1])])
def test_weights_arrive_on_the_gpu(kind: str, devices: list[int]) -> None:
    if max(devices) >= torch.cuda.device_count():
        pytest.skip("needs another GPU")
    spec = TransportSpec(
        kind=kind,  # type: ignore[arg-type]
        address="127.0.0.1",
        port=open_store(60.0),
        receivers=len(devices),
        timeout_s=60.0,
        bucket_bytes=1 << 20,
    )
    torch.cuda.set_device(0)
    with ProcessPoolExecutor(len(devices), multiprocessing.get_context("spawn")) as pool:
        arrivals = [pool.submit(receive, spec, rank, device) for rank, device in enumerate(devices)]
        sender = None
        for session in range(2):
            sender = Sender.renewed(sender, TransportSpec(**spec.as_dict() | {"session": session}))
            torch.manual_seed(session)
            tensors = {
                "embedding": torch.randn(1000, 768, device="cuda"),
                "weight": torch.randn(333, 77, device="cuda").bfloat16(),
                "transposed": torch.randn(64, 32, device="cuda").T,
            }
            sent = send_buckets(sender, session, [[item] for item in tensors.items()])
            assert sent.digests == {name: digest(tensor.cpu()) for name, tensor in tensors.items()}
            for arrival in arrivals:
                if session == 1:
                    check_same(sent, arrival.result(timeout=60)[1], who="receiver")
        assert sender is not None
        sender.close()


def test_the_digest_is_the_same_on_cpu_and_gpu() -> None:
    for shape in ((), (3,), (1000, 1001), (0, 4)):
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            tensor = torch.randn(shape).to(dtype)
            assert digest(tensor) == digest(tensor.cuda())
