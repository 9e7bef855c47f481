"""What roles ask for, cut into bundles: each worker's share, who shares a GPU, and on which node there is room.

Without Ray: `Cluster.reserve` reserves what these functions say, and a plan prints it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from rlhf_ray.config.node_labels import in_words, matches
from rlhf_ray.errors import PlacementError


@dataclass(frozen=True)
class RoleRequest:
    """What a role asks for.

    Args:
        role: its name in the configuration.
        workers: number of workers, each an actor.
        cpus: CPU cores of each worker, fractions allowed; None: 1, or an equal share of the free cores where
            there are fewer.
        gpus: GPUs of each worker, fractions allowed; None: 1 where the cluster has any, else 0. With colocate_with:
            an equal part of the other role's, or 0.
        env: further environment variables of the processes; never a secret.
        rendezvous: the workers join one process group: they get RANK, WORLD_SIZE, MASTER_ADDR, ... and every one
            of them takes part in each split.
        reuse: the processes may be those of an earlier group with the same key, gpus and env, and are kept for a
            later one: what a module holds (an engine) lives on. Such a role is reserved apart from the others, and
            shares no bundle.
        colocate_with: the role whose i-th worker has the bundle, and so the GPU, that the i-th worker shares; where
            that role is not asked for, those that name it share with each other. None: a bundle for each worker.
        whole_gpus: where gpus is None and there are fewer GPUs than workers, that is a shortage, and no GPU is shared.
        strategy: how the role's workers lie on the nodes, in a placement group of their own; None: with the others.
        node_labels: labels of the nodes that the workers may be on, as Ray selects them; those of the first role
            count for the roles that share its bundles.
    """

    role: str
    workers: int = 1
    cpus: float | None = None
    gpus: float | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    rendezvous: bool = False
    reuse: str | None = None
    colocate_with: str | None = None
    whole_gpus: bool = False
    strategy: str | None = None
    node_labels: Mapping[str, str] = field(default_factory=dict)


Bundle: TypeAlias = tuple[RoleRequest, ...]
"""The roles of the workers that share a bundle; the first one decides the GPUs and the nodes."""


@dataclass(frozen=True)
class Share:
    """The CPU cores and GPUs of one worker, one bundle, or one node."""

    cpus: float
    gpus: float

    def bundle(self) -> dict[str, float]:
        """The share as Ray writes it."""
        return {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}


@dataclass(frozen=True)
class NodeShare(Share):
    """What a node has, or what is left of it, and its labels; None: any that are asked for."""

    labels: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Shares:
    """How much everybody gets.

    Args:
        workers: one worker's share, by role.
        gpus: GPUs of the bundle that a role's worker is in, by role.
    """

    workers: Mapping[str, Share]
    gpus: Mapping[str, float]

    def of(self, bundle: Bundle) -> Share:
        """The share of a bundle: the cores of its workers together, the GPUs of its first role."""
        return Share(round(sum(self.workers[each.role].cpus for each in bundle), 4), self.gpus[bundle[0].role])


@dataclass(frozen=True)
class Capacity:
    """What a cluster has and what of it is free: CPU cores, GPUs, and the cores and GPUs of each node."""

    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float
    nodes: Sequence[NodeShare]


def sharing(requests: Sequence[RoleRequest]) -> list[Bundle]:
    """The roles that share bundles; most roles are alone. First comes the role whose GPUs the others share."""
    found: dict[str, list[RoleRequest]] = {}
    for request in requests:
        found.setdefault(request.colocate_with or request.role, []).append(request)
    return [
        tuple(sorted(members, key=lambda each: (each.role != name, each.gpus == 0))) for name, members in found.items()
    ]


def without_reuse(requests: Sequence[RoleRequest]) -> list[RoleRequest]:
    """The requests, those that share bundles or a placement group without `reuse`: their processes end together."""
    shared = {
        request.role
        for members in sharing(requests)
        if len(members) > 1 or members[0].strategy is not None
        for request in members
    }
    return [replace(request, reuse=None) if request.role in shared else request for request in requests]


def reservations(requests: Sequence[RoleRequest]) -> list[list[Bundle]]:
    """The placement groups that are reserved, each with its bundles.

    Workers whose processes may be used again have a group each, so that they can outlive the others; those of a role
    with a strategy of its own have one together.
    """
    together: list[Bundle] = []
    apart: list[list[Bundle]] = []
    for members in sharing(without_reuse(requests)):
        bundles = [
            tuple(each for each in members if each.workers > rank)
            for rank in range(max(each.workers for each in members))
        ]
        if members[0].strategy is not None:
            apart.append(bundles)
        elif members[0].reuse is None:
            together += bundles
        else:
            apart += [[bundle] for bundle in bundles]
    return [bundles for bundles in (together, *apart) if bundles]


def strategy_of(group: Sequence[Bundle], strategy: str) -> str:
    """The strategy of a placement group; `strategy` where its roles have none of their own."""
    return group[0][0].strategy or strategy


def selector_of(bundle: Bundle) -> Mapping[str, str]:
    """Labels of the nodes that a bundle may be on."""
    return bundle[0].node_labels


def fit(
    requests: Sequence[RoleRequest], capacity: Capacity, *, strategy: str, may_wait: bool, of_all: bool = False
) -> Shares:
    """Each role's share per worker.

    Args:
        requests: what the roles ask for; role names differ.
        capacity: what there is.
        strategy: that of roles that have none of their own.
        may_wait: what is taken now may become free, so only what the whole cluster cannot give is refused.
        of_all: roles that name no GPUs share those of the whole cluster even where they may not wait, and not those
            that are free.

    Raises:
        PlacementError: the cluster cannot give it; names roles, wanted and free.
    """
    together = sharing(requests)
    fixed = sum(request.workers * request.cpus for request in requests if request.cpus is not None)
    unset = sum(request.workers for request in requests if request.cpus is None)
    left = capacity.free_cpus - fixed
    each = 1.0 if unset <= left else math.floor(100 * left / max(unset, 1) + 1e-6) / 100
    if each < 0.01:
        each = 1.0  # nothing to share: the need for whole cores is what is waited for, or reported
    each_gpu = 0.0
    if capacity.gpus:
        each_gpu = _gpu_share(together, capacity.gpus if may_wait or of_all else capacity.free_gpus)
    shares = share_out(requests, each_cpu=each, each_gpu=each_gpu)
    # Equal shares of all cores may leave a rest on each node that is too small for the last bundle.
    while unset and 0.01 < each < 1 and not _packs(requests, shares, capacity.nodes, strategy):
        each = math.floor(95 * each) / 100
        shares = share_out(requests, each_cpu=each, each_gpu=each_gpu)
    _refuse_parts(together, shares.gpus)
    needs = {
        "GPU": {named(members): _most_workers(members) * shares.gpus[members[0].role] for members in together},
        "CPU": {request.role: request.workers * shares.workers[request.role].cpus for request in requests},
    }
    for name, total, free in (("GPU", capacity.gpus, capacity.free_gpus), ("CPU", capacity.cpus, capacity.free_cpus)):
        summed = sum(needs[name].values())
        if summed > (total if may_wait else free) + 1e-6:
            asked = [f"{role} needs {count(need, name)}" for role, need in needs[name].items() if need]
            in_all = f" ({count(summed, name)} together)" if len(asked) > 1 else ""
            raise PlacementError(
                f"{', '.join(asked)}{in_all}; {free:g} of {total:g} are free. "
                f"Ask for fewer workers, or set {name.lower()}s to a fraction so that workers share one"
            )
    _fit_nodes(requests, shares, capacity.nodes, strategy)
    return shares


def share_out(requests: Sequence[RoleRequest], *, each_cpu: float, each_gpu: float) -> Shares:
    """Everybody's share, where those that name no number get `each_cpu` cores and bundles `each_gpu` GPUs."""
    workers: dict[str, Share] = {}
    gpus: dict[str, float] = {}
    for members in sharing(requests):
        users, room = _users(members), each_gpu if members[0].gpus is None else members[0].gpus
        part = room if len(users) == 1 else math.floor(100 * room / len(users) + 1e-6) / 100
        for each in members:
            gpus[each.role] = room
            cpus = each_cpu if each.cpus is None else each.cpus
            workers[each.role] = Share(cpus, part if each in users else 0.0)
    return Shares(workers, gpus)


def assign(
    requests: Sequence[RoleRequest], shares: Shares, nodes: Sequence[NodeShare], *, strategy: str
) -> list[list[int]]:
    """The node of each bundle of each reservation: first fit, the largest bundles first.

    Ray may choose other nodes; that there is room is what counts.

    Raises:
        PlacementError: there is none for a bundle with the others in place; names role, wanted and left.
    """
    free = list(nodes)
    found = []
    for group in reservations(requests):
        places = [0] * len(group)
        used: set[int] = set()
        wanted = [shares.of(bundle) for bundle in group]
        for index in sorted(range(len(group)), key=lambda index: (-wanted[index].gpus, -wanted[index].cpus)):
            share, selector = wanted[index], selector_of(group[index])
            allowed = [number for number, node in enumerate(free) if matches(node.labels, selector)]
            place = _node_for(share, free, allowed, used, strategy_of(group, strategy))
            if place is None:
                left = "; ".join(f"{free[n].cpus:g} CPUs, {free[n].gpus:g} GPUs" for n in allowed)
                labels = f" with {in_words(selector)}" if selector else ""
                raise PlacementError(
                    f"{named(group[index])}: one worker needs {count(share.cpus, 'CPU')} and "
                    f"{count(share.gpus, 'GPU')} on one node{labels}, and with the others in place no "
                    f"node has them (strategy {strategy_of(group, strategy)}); left are {left or 'none'}"
                )
            used.add(place)
            free[place] = replace(free[place], cpus=free[place].cpus - share.cpus, gpus=free[place].gpus - share.gpus)
            places[index] = place
        found.append(places)
    return found


def _packs(requests: Sequence[RoleRequest], shares: Shares, nodes: Sequence[NodeShare], strategy: str) -> bool:
    try:
        assign(requests, shares, nodes, strategy=strategy)
    except PlacementError:
        return False
    return True


def named(bundle: Bundle) -> str:
    """`policy`, or `policy (with generator, reference)` where they share."""
    others = ", ".join(each.role for each in bundle[1:])
    return f"{bundle[0].role} (with {others})" if others else bundle[0].role


def count(number: float, name: str) -> str:
    """`1 GPU`, `2 GPUs`."""
    return f"{number:g} {name}" + ("" if number == 1 else "s")


def local_ranks(nodes: Sequence[str]) -> list[tuple[int, int]]:
    """Of each rank its number among those on its node, and how many they are."""
    return [(nodes[:rank].count(node), nodes.count(node)) for rank, node in enumerate(nodes)]


def _most_workers(members: Bundle) -> int:
    return max(each.workers for each in members)


def _gpu_share(together: Sequence[Bundle], gpus: float) -> float:
    """GPUs of each bundle for which none are named: one, or an equal part where there are fewer than bundles, but some.

    One also where there is none: that is a shortage.
    """
    fixed = sum(_most_workers(members) * members[0].gpus for members in together if members[0].gpus is not None)
    unset = [members for members in together if members[0].gpus is None]
    bundles = sum(map(_most_workers, unset))
    left = math.floor(gpus - fixed + 1e-6)
    # The ranks of one process group cannot share a GPU; they are reported as a shortage.
    whole = any(
        each.whole_gpus or (each.rendezvous and each.workers > 1 and each.gpus != 0)
        for members in unset
        for each in members
    )
    return 1.0 if bundles <= left or left < 1 or whole else math.floor(100 / math.ceil(bundles / left)) / 100


def _users(members: Bundle) -> list[RoleRequest]:
    """The roles that have a part of the GPU of the bundles that they share."""
    return [each for each in members if each is members[0] or each.gpus != 0]


def _refuse_parts(together: Sequence[Bundle], gpus: Mapping[str, float]) -> None:
    """Refuses the ranks of one process group on a part of a GPU, and parts of several GPUs.

    The ranks of a group that share their GPUs with other roles are each on another one.
    """
    for members in together:
        users, each = _users(members), gpus[members[0].role]
        for request in users:
            if request.rendezvous and request.workers > 1 and 0 < each < 1:
                raise PlacementError(
                    f"{request.role} has {request.workers} workers with {each:g} GPUs each: NCCL wants a "
                    f"whole GPU for each. Set {request.role}.workers to 1, or give each a GPU and let the others share"
                )
        if each > 1 and len(users) > 1:
            raise PlacementError(
                f"{', '.join(request.role for request in users[1:])}: colocate_with {users[0].role}, whose workers "
                f"have {each:g} GPUs each; wanted a role with 1 GPU or a part of one per worker"
            )


def _fit_nodes(requests: Sequence[RoleRequest], shares: Shares, nodes: Sequence[NodeShare], strategy: str) -> None:
    groups = reservations(requests)
    own = {f"{group[0][0].role}.strategy": group for group in groups if group[0][0].strategy is not None}
    others = [bundle for group in groups if group[0][0].strategy is None for bundle in group]
    pieces: dict[str, tuple[Share, list[Mapping[str, str]]]] = {}
    for setting, bundles in {"placement.strategy": others, **own}.items():
        if not bundles:
            continue
        kind, wanted = strategy_of(bundles, strategy), [shares.of(bundle) for bundle in bundles]
        if kind == "STRICT_SPREAD" and len(bundles) > len(nodes):
            raise PlacementError(
                f"{setting} STRICT_SPREAD puts each worker on its own node: {len(bundles)} workers, {len(nodes)} nodes"
            )
        if kind == "STRICT_PACK":
            whose = "all roles" if bundles is others else f"all of {named(bundles[0])}"
            whole = Share(sum(share.cpus for share in wanted), sum(share.gpus for share in wanted))
            pieces[f"{whose} on one node ({setting} STRICT_PACK)"] = whole, [selector_of(each) for each in bundles]
        else:
            pieces |= {
                named(bundle): (share, [selector_of(bundle)]) for bundle, share in zip(bundles, wanted, strict=True)
            }
    for name, (piece, selectors) in pieces.items():
        allowed = [node for node in nodes if all(matches(node.labels, selector) for selector in selectors)]
        if not any(piece.cpus <= node.cpus + 1e-6 and piece.gpus <= node.gpus + 1e-6 for node in allowed):
            largest = max(allowed, key=lambda node: (node.gpus, node.cpus), default=Share(0, 0))
            labels = " and ".join(dict.fromkeys(filter(None, map(in_words, selectors))))
            kind = "such node" if labels else "node"
            there = f"the largest {kind} has {count(largest.cpus, 'CPU')} and {count(largest.gpus, 'GPU')}"
            if labels and not allowed:
                there = f"none of {len(nodes)} nodes is such a one"
            raise PlacementError(
                f"{name}: one worker needs {count(piece.cpus, 'CPU')} and {count(piece.gpus, 'GPU')} on one node"
                f"{f' with {labels}' if labels else ''}; {there}"
            )


def _node_for(share: Share, free: Sequence[Share], allowed: Sequence[int], used: set[int], strategy: str) -> int | None:
    """Of the allowed nodes the one for the next bundle of a placement group that has bundles on the `used` ones."""
    room = [n for n in allowed if share.cpus <= free[n].cpus + 1e-6 and share.gpus <= free[n].gpus + 1e-6]
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
