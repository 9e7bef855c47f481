"""The nodes of a Ray cluster: what each has, and what of it is free."""

from __future__ import annotations

from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node

from rlhf_ray.distributed.placement import Capacity, Share

_ACCELERATOR = "accelerator_type:"


@dataclass(frozen=True)
class Node:
    """One node that is up.

    Args:
        address: its IP address.
        has: CPU cores and GPUs.
        free: those that nobody has reserved.
        memory_gib: what Ray gives to workers and objects together.
        gpu: the type of its GPUs as Ray names it; empty where it has none, or Ray does not know it.
    """

    address: str
    has: Share
    free: Share
    memory_gib: float
    gpu: str


def nodes_of_ray() -> list[Node]:
    """The nodes of the Ray that this process is connected to."""
    free = available_resources_per_node()
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            there, left = node["Resources"], free.get(node["NodeID"], {})
            found.append(
                Node(
                    address=node["NodeManagerAddress"],
                    has=share(there),
                    free=share(left),
                    memory_gib=(there.get("memory", 0.0) + there.get("object_store_memory", 0.0)) / 2**30,
                    gpu=gpu_type(there),
                )
            )
    return found


def share(resources: dict[str, float]) -> Share:
    """CPU cores and GPUs among Ray's resources."""
    return Share(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def gpu_type(resources: dict[str, float]) -> str:
    """The type of GPU among Ray's resources; empty where there is none."""
    return next((name.removeprefix(_ACCELERATOR) for name in resources if name.startswith(_ACCELERATOR)), "")


def capacity(nodes: list[Node]) -> Capacity:
    """All nodes together."""
    return Capacity(
        cpus=sum(node.has.cpus for node in nodes),
        gpus=sum(node.has.gpus for node in nodes),
        free_cpus=sum(node.free.cpus for node in nodes),
        free_gpus=sum(node.free.gpus for node in nodes),
        nodes=[node.has for node in nodes],
    )
