"""What a stage's roles ask a cluster for, the bundles that are reserved for them, and what is missing.

The requests are those that the stages make, and the shares those that `distributed.placement.fit` gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rlhf_ray.config import schema
from rlhf_ray.distributed.placement import RoleRequest, Share, fit, reservations
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
    """

    role: str
    workers: int
    share: Share
    nodes: dict[int, int]


@dataclass(frozen=True)
class StagePlacement:
    """What is reserved at one time.

    Args:
        stage: the stage's name.
        while_: what happens then, where a stage reserves twice.
        roles: in the order of their bundles.
        groups: the placement groups, each with the role and the share of each of its bundles.
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
        """Of all roles together."""
        return Share(
            sum(role.workers * role.share.cpus for role in self.roles),
            sum(role.workers * role.share.gpus for role in self.roles),
        )


def plan_placement(stage: schema.Stage, cluster: ClusterShape, *, strategy: str) -> list[StagePlacement]:
    """What the stage reserves, in the order of time; a reference that a cache may spare is counted."""
    return [
        _placed(stage.name, while_, requests, cluster, strategy, refusal)
        for while_, requests, refusal in _phases(stage, gpus=cluster.total_gpus)
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
) -> tuple[dict[str, Share], dict[str, dict[int, int]]]:
    """Each role's share, and how many of its workers are on each node: first fit, largest bundles first.

    Ray may choose other nodes; that there is room is what counts.

    Raises:
        PlacementError: there is none; names roles, wanted and free.
    """
    shares = fit(requests, cluster.capacity(), strategy=strategy, may_wait=False)
    free = list(cluster.all_nodes)
    nodes: dict[str, dict[int, int]] = {request.role: {} for request in requests}
    for group in reservations(requests):
        used: set[int] = set()
        for request in sorted(group, key=lambda each: (-shares[each.role].gpus, -shares[each.role].cpus)):
            share = shares[request.role]
            node = _node_for(share, free, used, strategy)
            if node is None:
                left = "; ".join(f"{each.cpus:g} CPUs, {each.gpus:g} GPUs" for each in free)
                raise PlacementError(
                    f"{request.role}: one worker needs {share.cpus:g} CPUs and {share.gpus:g} GPUs on one node, and "
                    f"with the others in place no node has them (placement.strategy {strategy}); left are {left}"
                )
            used.add(node)
            free[node] = Share(free[node].cpus - share.cpus, free[node].gpus - share.gpus)
            nodes[request.role][node] = nodes[request.role].get(node, 0) + 1
    return shares, nodes


def _node_for(share: Share, free: Sequence[Share], used: set[int], strategy: str) -> int | None:
    """The node for the next bundle of a placement group that has bundles on the `used` ones."""
    room = [n for n, node in enumerate(free) if share.cpus <= node.cpus + 1e-6 and share.gpus <= node.gpus + 1e-6]
    match strategy:
        case "STRICT_SPREAD":
            room = [node for node in room if node not in used]
        case "STRICT_PACK":
            room = [node for node in room if not used or node in used]
        case "SPREAD":
            room.sort(key=lambda node: node in used)
        case _:
            room.sort(key=lambda node: node not in used)
    return room[0] if room else None


def _phases(stage: schema.Stage, *, gpus: float) -> Iterator[tuple[str, list[RoleRequest], str | None]]:
    """What happens, what is asked for it, and what is refused before anything is reserved."""
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
        shares = {request.role: _asked(request, cluster) for request in requests}
    return StagePlacement(
        stage=stage,
        while_=while_,
        roles=tuple(
            RolePlacement(request.role, request.workers, shares[request.role], nodes.get(request.role, {}))
            for request in requests
        ),
        groups=tuple(
            tuple((request.role, shares[request.role]) for request in group) for group in reservations(requests)
        ),
        shortage=shortage,
        changes=() if shortage is None else tuple(_changes(requests, cluster, strategy)),
    )


def _asked(request: RoleRequest, cluster: ClusterShape) -> Share:
    """What each worker would get if there were enough."""
    gpus = (1.0 if cluster.gpus else 0.0) if request.gpus is None else request.gpus
    return Share(1.0 if request.cpus is None else request.cpus, gpus)


def _changes(requests: Sequence[RoleRequest], cluster: ClusterShape, strategy: str) -> Iterator[str]:
    """The smallest change of the settings that fits, and the smallest number of such nodes that does."""
    smaller = [
        (cost, text)
        for cost, text, changed in _smaller(requests)
        if _fits(_changed(requests, changed), cluster, strategy)
    ]
    if smaller:
        yield min(smaller)[1]
    else:
        yield from _halved(requests, cluster, strategy)
    nodes = cluster.nodes + 1
    while nodes <= MOST_NODES:
        if _fits(requests, replace(cluster, nodes=nodes), strategy):
            yield f"{nodes} such nodes instead of {cluster.nodes}"
            return
        nodes += 1


def _smaller(requests: Sequence[RoleRequest]) -> Iterator[tuple[float, str, RoleRequest]]:
    """Changes of one setting: what they cost, how they are written, and the request that they make."""
    sections = _sections(requests)
    for request in requests:
        name = sections[request.role]
        gpus = 1.0 if request.gpus is None else request.gpus
        for workers in range(1, request.workers):
            gone = (request.workers - workers) * max(gpus, 0.1)
            yield gone, f"{name}.workers={workers}", replace(request, workers=workers)
        if request.role == "generator" and gpus > 1:
            part = gpus // 2
            while part >= 1:
                gone = request.workers * (gpus - part)
                yield gone, f"{name}.tensor_parallel={part:g}", replace(request, gpus=part)
                part //= 2
        if request.gpus and not (request.rendezvous and request.workers > 1):
            for part in (0.5, 0.25):
                if part < gpus <= 1:
                    gone = request.workers * (gpus - part)
                    yield gone, f"{name}.gpus={part:g}", replace(request, gpus=part)
        if request.cpus is not None and request.cpus > 1:
            yield request.workers * 0.1, f"{name}.cpus=1", replace(request, cpus=1.0)


def _halved(requests: Sequence[RoleRequest], cluster: ClusterShape, strategy: str) -> Iterator[str]:
    """All roles with several workers made smaller alike, where no single change is enough."""
    sections = _sections(requests)
    most = max(request.workers for request in requests)
    for divisor in range(2, most + 1):
        fewer = [replace(request, workers=max(1, request.workers // divisor)) for request in requests]
        if _fits(fewer, cluster, strategy):
            yield " ".join(
                f"{sections[after.role]}.workers={after.workers}"
                for before, after in zip(requests, fewer, strict=True)
                if before.workers != after.workers
            )
            return


def _changed(requests: Sequence[RoleRequest], changed: RoleRequest) -> list[RoleRequest]:
    return [changed if request.role == changed.role else request for request in requests]


def _fits(requests: Sequence[RoleRequest], cluster: ClusterShape, strategy: str) -> bool:
    try:
        place(requests, cluster, strategy=strategy)
    except PlacementError:
        return False
    return True


def _sections(requests: Sequence[RoleRequest]) -> dict[str, str]:
    """The key of each role's settings in its stage; the scorers are a list."""
    scorers = [request.role for request in requests if request.role.startswith("reward/")]
    return {
        request.role: f"reward.{scorers.index(request.role)}" if request.role in scorers else request.role
        for request in requests
    }
