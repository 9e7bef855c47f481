"""Where a worker's weights lie, and the wire between two such places."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf_ray.distributed.transports import TransportKind


@dataclass(frozen=True)
class Location:
    """A machine, and the GPU on it (`cpu` where there is none)."""

    node: str
    device: str


def here() -> Location:
    """The location of this process."""
    device = "cpu"
    if torch.cuda.is_available():
        device = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return Location(socket.gethostname(), device)


def choose_transport(sender: Location, receivers: Sequence[Location]) -> TransportKind:
    """The fastest wire that reaches every receiver.

    Shared memory on one machine without GPUs, CUDA IPC where all sit on the sender's GPU, NCCL where none does;
    gloo everywhere else.
    """
    if all(place.device == "cpu" for place in (sender, *receivers)):
        return "shared_memory" if all(place.node == sender.node for place in receivers) else "gloo"
    if all(place == sender for place in receivers):
        return "cuda_ipc"
    devices = [place.device for place in (sender, *receivers)]
    return "nccl" if "cpu" not in devices and len(set(devices)) == len(devices) else "gloo"
