"""What a stage's roles ask a cluster for, the bundles that are reserved for them, and what is missing.

The requests are those that the stages make, and the shares those that `distributed.bundles.fit` gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlhf_ray.config import schema
from rlhf_ray.distributed.bundles import (
    RoleRequest,
    Share,
    Shares,
    assign,
    count,
    fit,
    reservations,
    share_out,
    sharing,
)
from rlhf_ray.errors import ConfigError, PlacementError
from rlhf_ray.plan.cluster import PLENTY, ClusterShape
from rlhf_ray.stages import collect, dpo, ppo, supervised
from rlhf_ray.stages.actors import scorer_requests

MOST_NODES = 1024
"""Of the cluster that is proposed where this one is too small."""


@dataclass(frozen=True)
class RolePlacement:
    """A role's workers, and what each of them gets.

    Args:
        role: its name.
        workers: how many.
        share: CPU cores and GPUs of each.
        nodes: how many workers are on each node, by the node's number from 0; empty where they do not fit.
        shares_with: the role whose bundles its workers are in; None where it has bundles of its own.
        room: what its first worker's bundle has, the part of the others that share it included.
        node_labels: labels of the nodes that the bundles may be on.
    """

    role: str
    workers: int
    share: Share
    nodes: dict[int, int]
    shares_with: str | None
    room: Share
    node_labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StagePlacement:
    """What is reserved at one time.

    Args:
        stage: the stage's name.
        while_: what happens then, where a stage reserves twice.
        roles: in the order of their bundles.
        groups: the placement groups, each with the roles and the share of each of its bundles.
        shortage: why the cluster cannot give it; None where it can.
        changes: settings of the stage, or a number of nodes, with each of which alone it can.
    """

    stage: str
    while_: str
    roles: tuple[RolePlacement, ...]
    groups: tuple[tuple[tuple[str, Share], ...], ...]
    shortage: str | None
    changes: tuple[str, ...]

    @property
    def wanted(self) -> Share:
        """Of all bundles together."""
        shares = [share for group in self.groups for _, share in group]
        return Share(round(sum(share.cpus for share in shares), 4), round(sum(share.gpus for share in shares), 4))


def plan_placement(stage: schema.Stage, cluster: ClusterShape, *, strategy: str) -> list[StagePlacement]:
    """What the stage reserves, in the order of time; a reference that a cache may spare is counted."""
    return [
        _placed(stage.name, while_, requests, cluster, strategy, refusal)
        for while_, requests, refusal in stage_phases(stage, gpus=cluster.total_gpus)
    ]


def stage_requests(stage: schema.Stage, *, gpus: float) -> list[RoleRequest]:
    """What the stage's roles ask for, as the stage itself asks.

    Raises:
        ConfigError: a setting needs a GPU, and there is none.
    """
    match stage:
        case schema.Sft() | schema.RewardModel():
            return supervised.requests(stage)
        case schema.Ppo():
            return ppo.requests(stage, gpus=gpus)
        case schema.Dpo():
            own = stage.needs_reference and not stage.adapter_is_off_in_reference
            return dpo.requests(stage, has_reference=own, gpus=gpus)
        case schema.Collect():
            return collect.requests(stage, gpus=gpus)


def place(
    requests: Sequence[RoleRequest], cluster: ClusterShape, *, strategy: str
) -> tuple[Shares, dict[str, dict[int, int]]]:
    """Everybody's share, and how many of each role's workers are on each node, of what is free now.

    Raises:
        PlacementError: there is no room; names roles, wanted and free.
    """
    shares = fit(requests, cluster.capacity(), strategy=strategy, may_wait=False, of_all=True)
    nodes: dict[str, dict[int, int]] = {request.role: {} for request in requests}
    places = assign(requests, shares, cluster.all_nodes, strategy=strategy)
    for group, on in zip(reservations(requests), places, strict=True):
        for bundle, node in zip(group, on, strict=True):
            for request in bundle:
                nodes[request.role][node] = nodes[request.role].get(node, 0) + 1
    return shares, nodes


def stage_phases(stage: schema.Stage, *, gpus: float) -> Iterator[tuple[str, list[RoleRequest], str | None]]:
    """What happens in a stage, what is asked for it, and what is refused before anything is reserved."""
    training = "training" if isinstance(stage, schema.Dpo) and stage.scores_pairs else ""
    if training:
        assert isinstance(stage, schema.Dpo), "only pairs are scored ahead"
        yield "scoring pairs", scorer_requests(stage.reward), None
    try:
        yield training, stage_requests(stage, gpus=gpus), None
    except ConfigError as error:
        yield training, stage_requests(stage, gpus=PLENTY), str(error)


def _placed(
    stage: str,
    while_: str,
    requests: Sequence[RoleRequest],
    cluster: ClusterShape,
    strategy: str,
    shortage: str | None,
) -> StagePlacement:
    nodes: Mapping[str, dict[int, int]] = {}
    try:
        shares, nodes = place(requests, cluster, strategy=strategy)
    except PlacementError as error:
        shortage = shortage or str(error)
        shares = _asked(requests, cluster)
    groups = [[(bundle, shares.of(bundle)) for bundle in group] for group in reservations(requests)]
    first: dict[str, tuple[str, Share]] = {}
    for bundle, room in (each for group in groups for each in group):
        for request in bundle:
            first.setdefault(request.role, (bundle[0].role, room))
    return StagePlacement(
        stage=stage,
        while_=while_,
        roles=tuple(
            RolePlacement(
                role=request.role,
                workers=request.workers,
                share=shares.workers[request.role],
                nodes=nodes.get(request.role, {}),
                shares_with=None if first[request.role][0] == request.role else first[request.role][0],
                room=first[request.role][1],
                node_labels={} if request.colocate_with else request.node_labels,
            )
            for request in requests
        ),
        groups=tuple(
            tuple((" + ".join(each.role for each in bundle), room) for bundle, room in group) for group in groups
        ),
        shortage=shortage,
        changes=() if shortage is None else tuple(_changes(requests, cluster, strategy)),
    )


def _asked(requests: Sequence[RoleRequest], cluster: ClusterShape) -> Shares:
    """What each worker would get if there were enough."""
    return share_out(requests, each_cpu=1.0, each_gpu=1.0 if cluster.gpus else 0.0)


def _changes(requests: Sequence[RoleRequest], cluster: ClusterShape, strategy: str) -> Iterator[str]:
    """The smallest change of the settings that fits, and the smallest number of further nodes that does."""
    smaller = [
        (cost, text + how)
        for cost, text, changed in _smaller(requests)
        if (how := _fits(_changed(requests, changed), cluster, strategy)) is not None
    ]
    if smaller:
        yield min(smaller)[1]
    else:
        yield from _halved(requests, cluster, strategy)
    for nodes in range(cluster.nodes + 1, MOST_NODES + 1):
        how = _fits(requests, cluster.with_nodes(nodes), strategy)
        if how is not None:
            like = f"{count(nodes - cluster.nodes, 'more node')} like the largest"
            yield (like if cluster.running else f"{nodes} such nodes instead of {cluster.nodes}") + how
            return


def _smaller(requests: Sequence[RoleRequest]) -> Iterator[tuple[float, str, list[RoleRequest]]]:
    """Changes of one setting: what they cost, how they are written, and the requests that they make.

    Roles that share bundles get fewer workers together: the bundles are as many as those of the largest.
    """
    sections = _sections(requests)
    for members in sharing(requests):
        request = members[0]
        name = sections[request.role]
        gpus = 1.0 if request.gpus is None else request.gpus
        most = max(each.workers for each in members)
        for workers in range(1, most):
            fewer = [replace(each, workers=workers) for each in members if each.workers > workers]
            text = " ".join(f"{sections[each.role]}.workers={workers}" for each in fewer)
            yield (most - workers) * max(gpus, 0.1), text, fewer
        if request.role == "generator" and gpus > 1:
            part = gpus // 2
            while part >= 1:
                gone = request.workers * (gpus - part)
                yield gone, f"{name}.tensor_parallel={part:g}", [replace(request, gpus=part)]
                part //= 2
        if request.gpus and not any(each.rendezvous and each.workers > 1 for each in members):
            for part in (0.5, 0.25):
                if part < gpus <= 1:
                    yield most * (gpus - part), f"{name}.gpus={part:g}", [replace(request, gpus=part)]
        for each in members:
            if each.cpus is not None and each.cpus > 1:
                yield each.workers * 0.1, f"{sections[each.role]}.cpus=1", [replace(each, cpus=1.0)]


def _halved(requests: Sequence[RoleRequest], cluster: ClusterShape, strategy: str) -> Iterator[str]:
    """All roles with several workers made smaller alike, where no single change is enough."""
    sections = _sections(requests)
    most = max(request.workers for request in requests)
    for divisor in range(2, most + 1):
        fewer = [replace(request, workers=max(1, request.workers // divisor)) for request in requests]
        how = _fits(fewer, cluster, strategy)
        if how is not None:
            yield (
                " ".join(
                    f"{sections[after.role]}.workers={after.workers}"
                    for before, after in zip(requests, fewer, strict=True)
                    if before.workers != after.workers
                )
                + how
            )
            return


def _changed(requests: Sequence[RoleRequest], changed: Sequence[RoleRequest]) -> list[RoleRequest]:
    by_role = {request.role: request for request in changed}
    return [by_role.get(request.role, request) for request in requests]


def _fits(requests: Sequence[RoleRequest], cluster: ClusterShape, strategy: str) -> str | None:
    """How they fit, in words that may be none; None where they do not."""
    try:
        shares, _ = place(requests, cluster, strategy=strategy)
    except PlacementError:
        return None
    shared = any(request.gpus is None and 0 < shares.gpus[request.role] < 1 for request in requests)
    return " (workers then share GPUs)" if shared else ""


def _sections(requests: Sequence[RoleRequest]) -> dict[str, str]:
    """The key of each role's settings in its stage; the scorers are a list."""
    scorers = [request.role for request in requests if request.role.startswith("reward/")]
    return {
        request.role: f"reward.{scorers.index(request.role)}" if request.role in scorers else request.role
        for request in requests
    }
