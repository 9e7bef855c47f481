"""Who shares a bundle, how much everybody gets, and where there is room."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.distributed.bundles import (
    Capacity,
    NodeShare,
    RoleRequest,
    Share,
    Shares,
    assign,
    fit,
    local_ranks,
    reservations,
    sharing,
    strategy_of,
)
from rlhf_ray.errors import PlacementError

LEARNERS = RoleRequest("policy", 2, rendezvous=True)
GUESTS = [
    RoleRequest("critic", 2, rendezvous=True, colocate_with="policy"),
    RoleRequest("judge", colocate_with="policy"),
]


def nodes(number: int, cpus: float, gpus: float) -> Capacity:
    return Capacity(number * cpus, number * gpus, number * cpus, number * gpus, [NodeShare(cpus, gpus)] * number)


def bundles(requests: list[RoleRequest], capacity: Capacity, *, strategy: str = "PACK") -> list[list[Share]]:
    shares = fit(requests, capacity, strategy=strategy, may_wait=False)
    return [[shares.of(bundle) for bundle in group] for group in reservations(requests)]


def test_guests_are_in_the_bundles_of_their_host() -> None:
    shares = fit([*GUESTS, LEARNERS], nodes(1, 8, 2), strategy="PACK", may_wait=False)
    assert shares == Shares(
        {"policy": Share(1, 0.33), "critic": Share(1, 0.33), "judge": Share(1, 0.33)},
        {"policy": 1.0, "critic": 1.0, "judge": 1.0},
    )
    assert bundles([*GUESTS, LEARNERS], nodes(1, 8, 2)) == [[Share(3, 1), Share(2, 1)]]
    assert [[each.role for each in members] for members in sharing([*GUESTS, LEARNERS])] == [
        ["policy", "critic", "judge"]
    ]


def test_ranks_of_one_group_are_on_a_gpu_each_though_others_share_it() -> None:
    one_gpu = nodes(1, 8, 1)
    with pytest.raises(PlacementError, match=r"^policy \(with critic, judge\) needs 2 GPUs; 1 of 1 are free"):
        fit([LEARNERS, *GUESTS], one_gpu, strategy="PACK", may_wait=False)
    half = RoleRequest("policy", 1, gpus=0.5)
    with pytest.raises(PlacementError, match=r"critic has 2 workers with 0.5 GPUs each: NCCL wants a whole"):
        fit([half, *GUESTS], nodes(1, 8, 2), strategy="PACK", may_wait=False)


def test_guests_of_a_role_that_is_not_there_share_with_each_other() -> None:
    judges = [RoleRequest("rule", gpus=0.0, colocate_with="policy"), RoleRequest("judge", 2, colocate_with="policy")]
    assert bundles(judges, nodes(1, 8, 4)) == [[Share(2, 1), Share(1, 1)]]
    shares = fit(judges, nodes(1, 8, 4), strategy="PACK", may_wait=False)
    assert shares.workers == {"judge": Share(1, 1), "rule": Share(1, 0)}


def test_without_a_gpu_only_cores_are_shared() -> None:
    assert bundles([LEARNERS, *GUESTS], nodes(1, 2, 0)) == [[Share(1.2, 0), Share(0.8, 0)]]


def test_a_guest_of_a_host_on_the_cpu_has_no_gpu() -> None:
    on_cpu = [RoleRequest("policy", gpus=0.0), RoleRequest("judge", colocate_with="policy")]
    assert bundles(on_cpu, nodes(1, 8, 4)) == [[Share(2, 0)]]


def test_engines_in_shared_bundles_are_not_kept() -> None:
    engine = RoleRequest("generator", 2, reuse="generator")
    assert len(reservations([engine])) == 2
    (group,) = reservations([engine, RoleRequest("judge", colocate_with="generator")])
    assert [[each.reuse for each in bundle] for bundle in group] == [[None, None], [None]]


def test_a_role_with_a_strategy_has_a_placement_group_of_its_own() -> None:
    engines = RoleRequest("generator", 2, gpus=1.0, reuse="generator", strategy="STRICT_SPREAD")
    roles = [RoleRequest("policy", gpus=2.0), RoleRequest("critic", gpus=1.0), engines]
    groups = reservations(roles)
    assert [[bundle[0].role for bundle in group] for group in groups] == [["policy", "critic"], ["generator"] * 2]
    assert [bundle[0].reuse for bundle in groups[1]] == [None, None]
    assert [strategy_of(group, "PACK") for group in groups] == ["PACK", "STRICT_SPREAD"]
    uneven, one_sided = ([NodeShare(8, gpus) for gpus in each] for each in ((4, 1), (5, 0)))
    shares = fit(roles, Capacity(16, 5, 16, 5, uneven), strategy="PACK", may_wait=False)
    assert assign(roles, shares, uneven, strategy="PACK") == [[0, 0], [0, 1]]
    with pytest.raises(PlacementError, match=r"generator: one worker needs 1 CPU and 1 GPU .*strategy STRICT_SPREAD"):
        assign(roles, shares, one_sided, strategy="PACK")


def test_what_a_role_s_own_strategy_cannot_be_is_named() -> None:
    spread = RoleRequest("reward/model", 3, gpus=0.0, strategy="STRICT_SPREAD")
    with pytest.raises(PlacementError, match=r"^reward/model.strategy STRICT_SPREAD .*: 3 workers, 2 nodes"):
        fit([spread, LEARNERS], nodes(2, 8, 1), strategy="PACK", may_wait=False)
    packed = RoleRequest("generator", 3, gpus=1.0, strategy="STRICT_PACK")
    with pytest.raises(PlacementError, match=r"^all of generator on one node \(generator.strategy STRICT_PACK\): one"):
        fit([packed], nodes(2, 8, 2), strategy="PACK", may_wait=False)


def test_whole_gpus_are_not_cut() -> None:
    roles = [RoleRequest(name, whole_gpus=True) for name in ("policy", "reference", "generator")]
    assert bundles(roles, nodes(1, 8, 3)) == [[Share(1, 1)] * 3]
    with pytest.raises(PlacementError, match=r"\(3 GPUs together\); 2 of 2 are free"):
        fit(roles, nodes(1, 8, 2), strategy="PACK", may_wait=False)
    assert bundles(roles, nodes(1, 8, 0)) == [[Share(1, 0)] * 3]


def test_several_gpus_are_not_shared() -> None:
    requests = [RoleRequest("generator", gpus=2.0), RoleRequest("judge", colocate_with="generator")]
    with pytest.raises(PlacementError, match=r"judge: colocate_with generator, whose workers have 2 GPUs each"):
        fit(requests, nodes(1, 8, 4), strategy="PACK", may_wait=False)


def test_cores_are_shared_so_that_the_bundles_pack() -> None:
    """15 workers on 2 x 4 cores: 0.53 each would leave 0.29 beside each bundle of seven, too little for the last."""
    guests = [RoleRequest(f"guest{number}", 2, colocate_with="policy") for number in range(6)]
    requests = [RoleRequest("policy", 2), *guests, RoleRequest("rule", gpus=0.0)]
    capacity = nodes(2, 4, 1)
    shares = fit(requests, capacity, strategy="PACK", may_wait=False)
    assign(requests, shares, capacity.nodes, strategy="PACK")
    assert shares.workers["rule"] == Share(0.5, 0)


@settings(max_examples=60)
@given(
    workers=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    hosts=st.integers(4, 6),
    number=st.integers(1, 4),
    gpus=st.integers(0, 4),
)
def test_a_bundle_has_what_its_workers_have(workers: list[int], hosts: int, number: int, gpus: int) -> None:
    guests = [RoleRequest(f"guest{rank}", count, colocate_with="policy") for rank, count in enumerate(workers)]
    requests = [RoleRequest("policy", hosts), *guests]
    try:
        shares = fit(requests, nodes(number, 8, gpus), strategy="PACK", may_wait=False)
    except PlacementError:
        return
    (group,) = reservations(requests)
    assert len(group) == hosts
    for bundle in group:
        room = shares.of(bundle)
        assert room.cpus == pytest.approx(sum(shares.workers[each.role].cpus for each in bundle))
        assert sum(shares.workers[each.role].gpus for each in bundle) <= room.gpus + 1e-9
    placed = [each.role for bundle in group for each in bundle]
    assert {request.role: request.workers for request in requests} == {role: placed.count(role) for role in placed}


def test_ranks_without_a_gpu_cut_those_of_their_host() -> None:
    """Only ranks that meet on GPUs need whole ones."""
    roles = [
        RoleRequest("generator", 4),
        RoleRequest("critic", 2, gpus=0.0, rendezvous=True, colocate_with="generator"),
    ]
    assert bundles(roles, nodes(1, 8, 2)) == [[Share(2, 0.5), Share(2, 0.5), Share(1, 0.5), Share(1, 0.5)]]


def places(*requests: RoleRequest, on: list[NodeShare]) -> list[int]:
    """The node of each bundle of roles that are packed together."""
    capacity = Capacity(99, 99, 99, 99, on)
    shares = fit(requests, capacity, strategy="PACK", may_wait=False)
    (found,) = assign(requests, shares, on, strategy="PACK")
    return found


def test_the_largest_bundle_is_placed_first() -> None:
    """That of the most GPUs, then of the most cores; else a smaller one would have taken its node."""
    scorer, learner = RoleRequest("reward", cpus=4, gpus=0), RoleRequest("policy", cpus=1, gpus=2)
    assert places(scorer, learner, on=[NodeShare(4, 2), NodeShare(4, 0)]) == [1, 0]
    small, large = RoleRequest("reward", cpus=1, gpus=1), RoleRequest("policy", cpus=4, gpus=1)
    assert places(small, large, on=[NodeShare(4, 1), NodeShare(1, 1)]) == [1, 0]


def test_what_is_packed_stays_on_a_node_that_is_used() -> None:
    pair, single = RoleRequest("policy", gpus=2), RoleRequest("critic", gpus=1)
    assert places(pair, single, on=[NodeShare(8, 1), NodeShare(8, 3)]) == [1, 1]


def test_local_ranks() -> None:
    assert local_ranks(["a", "b", "a", "a", "b"]) == [(0, 3), (0, 2), (1, 3), (2, 3), (1, 2)]


POOLS = [NodeShare(8, 2, {"pool": "large"}), NodeShare(8, 4, {"pool": "small", "market": "spot"}), NodeShare(8, 0, {})]
"""Three nodes with labels."""


def on_pools(*requests: RoleRequest, strategy: str = "PACK") -> list[list[int]]:
    capacity = Capacity(24, 6, 24, 6, POOLS)
    return assign(
        requests, fit(requests, capacity, strategy=strategy, may_wait=False), capacity.nodes, strategy=strategy
    )


def test_a_role_is_on_nodes_that_have_its_labels() -> None:
    large, small = {"pool": "large"}, {"pool": "small"}
    assert on_pools(RoleRequest("policy", 2, node_labels=small), RoleRequest("critic", 2, node_labels=large)) == [
        [1, 1, 0, 0]
    ]
    assert on_pools(RoleRequest("policy", 2, node_labels={"market": "!spot"})) == [[0, 0]]
    # Guests go where their host goes.
    assert on_pools(
        RoleRequest("policy", 2, node_labels=small), RoleRequest("critic", 2, colocate_with="policy", node_labels=large)
    ) == [[1, 1]]
    any_label = [NodeShare(8, 8)]
    requests = [RoleRequest("policy", 2, node_labels=small)]
    assert assign(requests, fit(requests, nodes(1, 8, 8), strategy="PACK", may_wait=False), any_label, strategy="PACK")


def test_a_shortage_of_labelled_nodes_names_the_labels() -> None:
    with pytest.raises(
        PlacementError,
        match=r"^policy: one worker needs 1 CPU and 3 GPUs on one node with pool=large; the largest such node has "
        r"8 CPUs and 2 GPUs$",
    ):
        on_pools(RoleRequest("policy", gpus=3, node_labels={"pool": "large"}))
    with pytest.raises(PlacementError, match=r"on one node with pool=none; none of 3 nodes is such a one$"):
        on_pools(RoleRequest("policy", gpus=1, node_labels={"pool": "none"}))
    with pytest.raises(
        PlacementError,
        match=r"with pool=large, and with the others in place no node has them .*; left are 6 CPUs, 0 GPUs$",
    ):
        on_pools(RoleRequest("policy", 3, gpus=1, node_labels={"pool": "large"}))
    with pytest.raises(
        PlacementError, match=r"all roles on one node \(placement.strategy STRICT_PACK\).* with pool=large"
    ):
        on_pools(
            RoleRequest("policy", 2, gpus=1, node_labels={"pool": "large"}),
            RoleRequest("critic", 1, gpus=1),
            strategy="STRICT_PACK",
        )
    with pytest.raises(PlacementError, match=r"with pool=large and pool=small; none of 3 nodes is such a one"):
        on_pools(
            RoleRequest("policy", node_labels={"pool": "large"}),
            RoleRequest("critic", node_labels={"pool": "small"}),
            strategy="STRICT_PACK",
        )
