"""The nodes that a job for Kubernetes or Slurm asks for: those of the plan's placement, alike or a group per role."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlhf_ray.config.layouts import roles_of, with_setting
from rlhf_ray.config.schema import Pipeline
from rlhf_ray.distributed.bundles import RoleRequest, Share, count, reservations, share_out, strategy_of
from rlhf_ray.errors import ConfigError, PlacementError
from rlhf_ray.plan.cluster import ClusterShape, parse_cluster, unnamed_cluster
from rlhf_ray.plan.placement import place, plan_placement, stage_phases
from rlhf_ray.plan.report import make_plan

GPUS_PER_NODE = 8
"""Of nodes that nobody has described."""
CPUS_PER_GPU = 8
GIB_PER_GPU = 64
"""Host memory; likewise of nodes that are described by their GPUs alone."""
ROLE_LABEL = "rlhf-ray/role"
"""Label of the nodes of a group."""
_GIB_PER_CPU = 8
_SPARE, _RAY_GIB = 1.25, 4
"""Host memory beyond what is planned: a share of that, and what Ray's own processes and objects take."""
_NAME_LENGTH = 24


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
    def all_gpus(self) -> int:
        """Of all nodes."""
        return self.count * self.gpus

    @property
    def shared_gib(self) -> int:
        """Of the memory, what /dev/shm may take: a quarter."""
        return max(1, self.memory_gib // 4)

    def in_words(self) -> str:
        """`2 nodes of 4 GPUs, 32 CPU cores and 256 GiB`."""
        parts = [count(self.gpus, "GPU")] * bool(self.gpus) + [count(self.cpus, "CPU core")]
        return f"{count(self.count, 'node')} of {', '.join(parts)} and {self.memory_gib} GiB"


@dataclass(frozen=True)
class NodeGroup:
    """Equal nodes for some of the roles.

    Args:
        name: of the group: its first role, or `gpu` or `cpu` where it is for all roles.
        roles: those for which it is; empty: all.
        nodes: how many, and what each has.
    """

    name: str
    roles: tuple[str, ...]
    nodes: Nodes

    @property
    def labels(self) -> dict[str, str]:
        """What its nodes are labelled with; nothing where they are for all roles."""
        return {ROLE_LABEL: self.name} if self.roles else {}


def nodes_for(config: Pipeline, cluster: str | None) -> Nodes:
    """Equal nodes that every stage of the pipeline fits on.

    Args:
        config: the pipeline.
        cluster: NODESxGPUSxNAME-GB, as `plan` takes it, also with the host memory; None: a GPU for every worker that
            may have one, on nodes of at most GPUS_PER_NODE.

    Raises:
        ConfigError: the described nodes, or any, are too few or too small.
    """
    strategy = config.placement.strategy
    if cluster is None:
        return _smallest(_phases(config), strategy)
    shape = parse_cluster(cluster)
    for stage in config.stages:
        for placement in plan_placement(stage, shape, strategy=strategy):
            if placement.shortage is not None:
                changes = "".join(f"\n  it would with {change}" for change in placement.changes)
                raise ConfigError(f"{placement.stage} does not fit on {shape.text}: {placement.shortage}{changes}")
    return _nodes(shape, _phases(config), strategy)


def node_groups(config: Pipeline, cluster: str | None) -> list[NodeGroup]:
    """Nodes that every stage of the pipeline fits on: a group for each role, or for roles that must be together.

    One group is for all where the cluster is described, where there is no GPU, and where groups would take more GPUs:
    stages that take turns need not have the same roles on all of them.

    Raises:
        ConfigError: the described nodes, or any, are too few or too small.
    """
    phases, strategy = _phases(config), config.placement.strategy
    found: list[NodeGroup] = []
    for roles in [] if cluster is not None else _roles_together(phases, strategy):
        own = [[each for each in requests if each.role in roles] for requests in phases]
        word = re.sub(r"[^a-z0-9]+", "-", roles[0].lower())[:_NAME_LENGTH].strip("-")
        name = f"{word}-{len(found)}" if any(group.name == word for group in found) else word
        found.append(NodeGroup(name, roles, _smallest([requests for requests in own if requests], strategy)))
    nodes = nodes_for(config, cluster)
    if len(found) > 1 and nodes.gpus and sum(group.nodes.all_gpus for group in found) <= nodes.all_gpus:
        return found
    return [NodeGroup("gpu" if nodes.gpus else "cpu", (), nodes)]


def on_groups(config: Pipeline, groups: Sequence[NodeGroup]) -> Pipeline:
    """The pipeline with each role on the nodes of its group.

    Raises:
        ConfigError: a role asks for nodes by labels of its own.
    """
    labels = {role: group.labels for group in groups for role in group.roles}
    for index, stage in enumerate(config.stages):
        for role, (path, settings) in roles_of(stage).items():
            if role not in labels or settings.colocate_with is not None:
                continue
            if settings.node_labels:
                raise ConfigError(
                    f"{stage.name}.{'.'.join(map(str, path))}.node_labels: the job has nodes of its own, a group for "
                    "each role; remove it, or describe the nodes by --cluster and label them"
                )
            config = with_setting(config, ("stages", index, *path, "node_labels"), labels[role])
    return config


def with_planned_memory(config: Pipeline, groups: Sequence[NodeGroup]) -> list[NodeGroup]:
    """The groups, with more host memory for each node where the plan has more on it.

    Raises:
        UserError: data or a model cannot be read here, so that there is no plan.
    """
    plan = make_plan(config, unnamed_cluster(), named=False)
    found = []
    for group in groups:
        needs = max(
            sum(
                math.ceil(placed.workers / group.nodes.count) * role.in_host_memory
                for placed, role in zip(placement.roles, memory.roles, strict=True)
                if not group.roles or role.role in group.roles
            )
            for placement, memory in zip(plan.placement, plan.memory, strict=True)
        )
        gib = max(group.nodes.memory_gib, math.ceil(_SPARE * needs + _RAY_GIB))
        found.append(replace(group, nodes=replace(group.nodes, memory_gib=gib)))
    return found


def _phases(config: Pipeline) -> list[list[RoleRequest]]:
    """What is asked for at one time."""
    gpus = unnamed_cluster().total_gpus
    return [requests for stage in config.stages for _, requests, _ in stage_phases(stage, gpus=gpus)]


def _roles_together(phases: Sequence[Sequence[RoleRequest]], strategy: str) -> list[tuple[str, ...]]:
    """All roles; together are those that share bundles at any time, or that nothing else than one node will do for."""
    found: list[tuple[str, ...]] = []
    for requests in phases:
        for group in reservations(requests):
            sharing = [[request.role for request in bundle] for bundle in group]
            if strategy_of(group, strategy) == "STRICT_PACK":
                sharing = [[role for names in sharing for role in names]]
            for names in sharing:
                met = [roles for roles in found if not set(roles).isdisjoint(names)]
                merged = [*(role for roles in met for role in roles), *names]
                found = [roles for roles in found if roles not in met] + [tuple(dict.fromkeys(merged))]
    return found


def _smallest(phases: Sequence[Sequence[RoleRequest]], strategy: str) -> Nodes:
    """The fewest nodes, and the smallest, that give every worker what it asks for, or a GPU where it asks for nothing.

    Raises:
        ConfigError: a worker asks for more than a node has.
    """
    bundles = [_bundles(requests) for requests in phases]
    gpus = math.ceil(max(sum(share.gpus for share in shares) for shares in bundles))
    cpus = math.ceil(max(sum(share.cpus for share in shares) for shares in bundles))
    fewest = math.ceil(gpus / GPUS_PER_NODE) if gpus else 1
    # No node is without a bundle.
    for number in range(fewest, max(fewest, *map(len, bundles)) + 1):
        for each in sorted({min(GPUS_PER_NODE, math.ceil(gpus / number)), min(GPUS_PER_NODE, gpus)}):
            kind = f"{each}xGPU-80" if gpus else f"{cpus}xCPU-{_GIB_PER_CPU * cpus}"
            try:
                return _nodes(parse_cluster(f"{number}x{kind}"), phases, strategy)
            except PlacementError as error:
                refusal = str(error)
    raise ConfigError(f"no number of nodes of {GPUS_PER_NODE} GPUs is enough: {refusal}")


def _bundles(requests: Sequence[RoleRequest]) -> list[Share]:
    shares = share_out(requests, each_cpu=1.0, each_gpu=1.0)
    return [shares.of(bundle) for group in reservations(requests) for bundle in group]


def _nodes(shape: ClusterShape, phases: Sequence[Sequence[RoleRequest]], strategy: str) -> Nodes:
    """The nodes of a shape; with more cores than their GPUs bring, where workers want them.

    Raises:
        PlacementError: what is asked for at one time has no room on them.
    """
    taken = max(_most_cpus(requests, shape, strategy) for requests in phases)
    if not shape.gpus:
        assert shape.host_gib is not None, "nodes without GPUs are described by their memory"
        return Nodes(shape.nodes, 0, int(shape.cpus), int(shape.host_gib))
    cpus = max(CPUS_PER_GPU * int(shape.gpus), math.ceil(taken))
    return Nodes(shape.nodes, int(shape.gpus), cpus, int(shape.host_gib or GIB_PER_GPU * shape.gpus))


def _most_cpus(requests: Sequence[RoleRequest], shape: ClusterShape, strategy: str) -> float:
    """CPU cores that are taken on the fullest node."""
    shares, nodes = place(requests, shape, strategy=strategy)
    taken: dict[int, float] = defaultdict(float)
    for role, workers in nodes.items():
        for node, number in workers.items():
            taken[node] += number * shares.workers[role].cpus
    return max(taken.values())
