"""The nodes that a job for Kubernetes or Slurm asks for: those of the plan's placement, all alike."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace

from rlhf_ray.config.schema import Pipeline
from rlhf_ray.errors import ConfigError
from rlhf_ray.plan.cluster import ClusterShape, parse_cluster, unnamed_cluster
from rlhf_ray.plan.placement import MOST_NODES, StagePlacement, plan_placement

GPUS_PER_NODE = 8
"""Of nodes that nobody has described."""
CPUS_PER_GPU = 8
GIB_PER_GPU = 64
"""Host memory; likewise of nodes that are described by their GPUs alone."""
_GIB_PER_CPU = 8


@dataclass(frozen=True)
class Nodes:
    """Equal nodes.

    Args:
        count: how many.
        gpus: of each; 0: nodes without a GPU.
        cpus: CPU cores of each.
        memory_gib: host memory of each.
    """

    count: int
    gpus: int
    cpus: int
    memory_gib: int

    @property
    def shared_gib(self) -> int:
        """Of the memory, what /dev/shm may take: a quarter."""
        return max(1, self.memory_gib // 4)

    def in_words(self) -> str:
        """`2 nodes of 4 GPUs, 32 CPU cores and 256 GiB`."""
        gpus = f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}, " if self.gpus else ""
        return (
            f"{self.count} node{'s' if self.count > 1 else ''} of {gpus}{self.cpus} CPU cores and {self.memory_gib} GiB"
        )


def nodes_for(config: Pipeline, cluster: str | None) -> Nodes:
    """The nodes that every stage of the pipeline fits on.

    Args:
        config: the pipeline.
        cluster: NODESxGPUSxNAME-GB, as `plan` takes it; None: a GPU for every worker that may have one, on nodes of
            at most GPUS_PER_NODE.

    Raises:
        ConfigError: the described nodes are too few or too small.
    """
    shape = _smallest(config) if cluster is None else parse_cluster(cluster)
    placements = _placements(config, shape)
    for placement in placements:
        if placement.shortage is not None:
            changes = "".join(f"\n  it would with {change}" for change in placement.changes)
            raise ConfigError(f"{placement.stage} does not fit on {shape.text}: {placement.shortage}{changes}")
    if not shape.gpus:
        assert shape.host_gib is not None, "nodes without GPUs are described by their memory"
        return Nodes(shape.nodes, 0, int(shape.cpus), int(shape.host_gib))
    cpus = max(CPUS_PER_GPU * int(shape.gpus), *(math.ceil(most) for most in map(_most_cpus, placements)))
    return Nodes(shape.nodes, int(shape.gpus), cpus, GIB_PER_GPU * int(shape.gpus))


def _smallest(config: Pipeline) -> ClusterShape:
    """The fewest nodes that give every worker what it asks for, or a GPU where it asks for nothing."""
    wanted = [placement.wanted for placement in _placements(config, unnamed_cluster())]
    gpus, cpus = math.ceil(max(share.gpus for share in wanted)), math.ceil(max(share.cpus for share in wanted))
    if not gpus:
        return parse_cluster(f"1x{cpus}xCPU-{_GIB_PER_CPU * cpus}")
    shape = parse_cluster(f"{math.ceil(gpus / GPUS_PER_NODE)}x{min(gpus, GPUS_PER_NODE)}xGPU-80")
    for count in range(shape.nodes, MOST_NODES + 1):
        larger = replace(shape, nodes=count, text=f"{count}x{shape.gpus:g}xGPU-80")
        if all(placement.shortage is None for placement in _placements(config, larger)):
            return larger
    return shape


def _placements(config: Pipeline, shape: ClusterShape) -> list[StagePlacement]:
    return [
        placement
        for stage in config.stages
        for placement in plan_placement(stage, shape, strategy=config.placement.strategy)
    ]


def _most_cpus(placement: StagePlacement) -> float:
    """CPU cores that are taken on the fullest node."""
    taken: dict[int, float] = defaultdict(float)
    for role in placement.roles:
        for node, workers in role.nodes.items():
            taken[node] += workers * role.share.cpus
    return max(taken.values(), default=0.0)
