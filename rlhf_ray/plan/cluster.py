"""What a plan is made for: a cluster described by a text, this machine, or nothing in particular."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rlhf_ray.distributed.bundles import Capacity, NodeShare, Share
from rlhf_ray.distributed.nodes import Node, capacity
from rlhf_ray.errors import ConfigError
from rlhf_ray.plan.hardware import CORE, Device, find_gpu, measure_core

PLENTY = 1_000_000.0
"""Stands for as many as are asked for."""
_TEXT = re.compile(
    r"(?P<nodes>\d+)x(?P<each>\d+)x(?P<name>[A-Za-z][\w+]*)-(?P<memory>\d+(\.\d+)?)(/(?P<host>\d+(\.\d+)?))?"
)


@dataclass(frozen=True)
class ClusterShape:
    """Nodes that are all alike, or those of a running cluster.

    Args:
        text: as the user named it.
        nodes: how many.
        cpus: CPU cores of each, of the largest where they differ; PLENTY where nothing is said of them.
        gpus: GPUs of each, of the largest where they differ; PLENTY where nothing is said of them.
        gpu_gib: memory of each GPU; None where it is not known.
        host_gib: memory of each node; None where it is not known.
        gpu: what each GPU can do; None where there is none, or no figures of it are known.
        core: what each CPU core can do.
        running: each node of a running cluster; empty where nothing runs, and all of it is free.
    """

    text: str
    nodes: int
    cpus: float
    gpus: float
    gpu_gib: float | None
    host_gib: float | None
    gpu: Device | None = field(default=None, compare=False)
    core: Device = field(default=CORE, compare=False)
    running: tuple[Node, ...] = ()

    @property
    def node(self) -> Share:
        """What one node has."""
        return Share(self.cpus, self.gpus)

    @property
    def total_gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.has.gpus for node in self.running) if self.running else self.nodes * self.gpus

    @property
    def total_cpus(self) -> float:
        """CPU cores of all nodes."""
        return sum(node.has.cpus for node in self.running) if self.running else self.nodes * self.cpus

    @property
    def all_nodes(self) -> Sequence[NodeShare]:
        """What is free of every node, with the labels of those that run."""
        if self.running:
            return [NodeShare(node.free.cpus, node.free.gpus, node.labels) for node in self.running]
        return [NodeShare(self.cpus, self.gpus)] * self.nodes

    def emptied(self) -> ClusterShape:
        """The cluster with all that it has free."""
        return replace(self, running=tuple(replace(node, free=node.has) for node in self.running))

    def capacity(self) -> Capacity:
        """All of it, and what is free of it."""
        if self.running:
            return capacity(list(self.running))
        cpus, gpus = self.nodes * self.cpus, self.nodes * self.gpus
        return Capacity(cpus, gpus, cpus, gpus, self.all_nodes)

    def with_nodes(self, nodes: int) -> ClusterShape:
        """The same with so many nodes: of a running cluster those that it lacks are like its largest, and free."""
        largest = max(self.running, key=lambda node: (node.has.gpus, node.has.cpus), default=None)
        more = () if largest is None else (replace(largest, free=largest.has),) * (nodes - self.nodes)
        return replace(self, nodes=nodes, running=(*self.running, *more))


def unnamed_cluster() -> ClusterShape:
    """As many GPUs and CPU cores as are asked for."""
    return ClusterShape("a GPU for every worker", 1, PLENTY, PLENTY, None, None)


def parse_cluster(text: str) -> ClusterShape:
    """`2x8xH100-80` as 2 nodes of 8 GPUs with 80 GiB each; `2x16xCPU-64` as 2 nodes of 16 cores and 64 GiB, no GPU.

    With `/1024` behind the GPUs' memory each node has 1024 GiB of host memory; without it that is not known.

    Raises:
        ConfigError: it is not of this form.
    """
    found = _TEXT.fullmatch(text.strip())
    cpu = found is not None and found["name"].upper() == "CPU"
    if (
        found is None
        or not all(float(found[part] or 1) for part in ("nodes", "each", "memory", "host"))
        or (cpu and found["host"])
    ):
        raise ConfigError(
            f"--cluster: got {text!r}, wanted NODESxGPUSxNAME-GB, such as 2x8xH100-80 for 2 nodes of 8 GPUs with "
            "80 GB each, 2x8xH100-80/1024 where each has 1024 GB of host memory, or 2x16xCPU-64 for 2 nodes of 16 CPU "
            "cores and 64 GB without a GPU"
        )
    nodes, each, memory = int(found["nodes"]), float(found["each"]), float(found["memory"])
    if cpu:
        return ClusterShape(text.strip(), nodes, each, 0.0, None, memory)
    host = None if found["host"] is None else float(found["host"])
    return ClusterShape(text.strip(), nodes, PLENTY, each, memory, host, find_gpu(found["name"]))


def this_machine() -> ClusterShape:
    """The cores, GPUs and memory of this machine."""
    import psutil
    import torch

    gpus = torch.cuda.device_count()
    smallest = min((torch.cuda.get_device_properties(i).total_memory for i in range(gpus)), default=0) / 2**30
    return ClusterShape(
        text="this machine",
        nodes=1,
        cpus=float(psutil.cpu_count() or 1),
        gpus=float(gpus),
        gpu_gib=smallest or None,
        host_gib=psutil.virtual_memory().total / 2**30,
        gpu=find_gpu(torch.cuda.get_device_name(0)) if gpus else None,
        core=measure_core(),
    )


def running_cluster(nodes: Sequence[Node], text: str) -> ClusterShape:
    """The nodes of a running cluster; of several types of GPU the one that the first of them has.

    Raises:
        ConfigError: it has no node.
    """
    if not nodes:
        raise ConfigError(f"{text} has no node that is up")
    gpu = next((found for node in nodes if (found := find_gpu(node.gpu)) is not None), None)
    return ClusterShape(
        text=text,
        nodes=len(nodes),
        cpus=max(node.has.cpus for node in nodes),
        gpus=max(node.has.gpus for node in nodes),
        gpu_gib=min((node.gpu_gib for node in nodes if node.gpu_gib), default=None if gpu is None else gpu.gib),
        host_gib=min(node.memory_gib for node in nodes),
        gpu=gpu,
        running=tuple(nodes),
    )


def cluster_as_object(cluster: ClusterShape) -> dict[str, Any]:
    """The cluster as JSON can write it; what is not limited is null."""
    found = asdict(cluster)
    return found | {name: None for name in ("cpus", "gpus") if found[name] >= PLENTY}


def cluster_of(values: dict[str, Any]) -> ClusterShape:
    """What `cluster_as_object` wrote."""
    limits = {name: PLENTY if values[name] is None else values[name] for name in ("cpus", "gpus")}
    gpu = None if values["gpu"] is None else Device(**values["gpu"])
    running = tuple(
        Node(**(each | {"has": Share(**each["has"]), "free": Share(**each["free"])})) for each in values["running"]
    )
    return ClusterShape(**(values | limits | {"gpu": gpu, "core": Device(**values["core"]), "running": running}))
