"""What a plan reserves is what the stages ask for, and what it proposes fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.config import schema
from rlhf_ray.config.load import load_pipeline
from rlhf_ray.distributed.bundles import RoleRequest, Share
from rlhf_ray.distributed.nodes import Node
from rlhf_ray.errors import ConfigError, PlacementError
from rlhf_ray.plan.cluster import ClusterShape, parse_cluster, running_cluster, unnamed_cluster
from rlhf_ray.plan.placement import StagePlacement, place, plan_placement

REWARD: dict[str, Any] = {"kind": "model", "model": "r"}


def ppo(**settings: Any) -> Any:
    made = {"method": "ppo", "iterations": 1, "policy": {"model": "m"}, "reward": [REWARD], "data": {"train": "p"}}
    return schema.Pipeline(run_dir="r", stages=[made | settings]).stages[0]


def test_a_text_is_nodes_of_gpus_or_of_cores() -> None:
    assert parse_cluster("2x8xH100-80") == ClusterShape("2x8xH100-80", 2, 1e6, 8, 80, None)
    assert parse_cluster("3x16xcpu-62.5") == ClusterShape("3x16xcpu-62.5", 3, 16, 0, None, 62.5)


@pytest.mark.parametrize(
    "text", ["", "8xH100-80", "2x8xH100", "0x8xH100-80", "2x0xA-1", "2x8xH100-0", "2x-8xA-1", "axbxC-1"]
)
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="2x8xH100-80"):
        parse_cluster(text)


def test_the_bundles_of_a_ppo_stage() -> None:
    stage = ppo(
        policy={"model": "m", "workers": 4},
        reward=[REWARD, {"kind": "function", "function": "f:f", "workers": 2}],
        generator={"workers": 2, "tensor_parallel": 2},
    )
    (found,) = plan_placement(stage, parse_cluster("2x8xH100-80"), strategy="PACK")
    one, none = Share(1, 1), Share(1, 0)
    learners = (("policy", one),) * 4 + (("critic", one), ("reference", one), ("reward/model", one))
    # Engines outlive a stage, so each has a placement group of its own.
    engine = (("generator", Share(1, 2)),)
    assert found.groups == ((*learners, ("reward/function", none), ("reward/function", none)), engine, engine)
    assert (found.shortage, found.changes) == (None, ())
    assert found.wanted == Share(11, 11)
    # Seven GPUs of the first node are taken, so both engines go to the second.
    assert found.roles[-1].nodes == {1: 2}


def test_roles_that_name_no_gpu_share_those_that_there_are() -> None:
    (found,) = plan_placement(ppo(), parse_cluster("1x1xA100-40"), strategy="PACK")
    assert {role.role: role.share.gpus for role in found.roles} == dict.fromkeys(
        ["policy", "critic", "reference", "reward/model", "generator"], 0.2
    )


def test_a_machine_without_a_gpu() -> None:
    (found,) = plan_placement(ppo(), parse_cluster("1x2xCPU-8"), strategy="PACK")
    assert {role.share for role in found.roles} == {Share(0.4, 0)}
    assert found.shortage is None


def test_too_many_learners_are_named_and_made_fewer() -> None:
    stage = ppo(policy={"model": "m", "workers": 16})
    (found,) = plan_placement(stage, parse_cluster("2x8xH100-80"), strategy="PACK")
    assert found.shortage is not None
    assert "policy needs 16 GPUs" in found.shortage
    # Four other roles of one GPU each.
    assert found.changes == ("policy.workers=12", "3 such nodes instead of 2")


def test_bundles_that_do_not_pack_are_found() -> None:
    """Six GPUs on two nodes are no place for three engines of two."""
    stage = ppo(
        policy={"model": "m", "gpus": 0},
        critic={"gpus": 0},
        reference={"gpus": 0},
        reward=[REWARD | {"gpus": 0}],
        generator={"workers": 3, "tensor_parallel": 2},
    )
    (found,) = plan_placement(stage, parse_cluster("2x3xL4-24"), strategy="PACK")
    assert found.shortage is not None
    assert found.shortage.startswith("generator: one worker needs")
    assert found.changes[0] in ("generator.workers=2", "generator.tensor_parallel=1")


def test_an_engine_that_needs_gpus_where_there_are_none() -> None:
    (found,) = plan_placement(ppo(generator={"tensor_parallel": 2}), parse_cluster("1x8xCPU-64"), strategy="PACK")
    assert found.shortage is not None
    assert "tensor_parallel: got 2, wanted 1" in found.shortage


def test_an_engine_is_cut_by_halves() -> None:
    """Of 8 GPUs there are 4; three would not divide its heads."""
    zero: dict[str, Any] = {"gpus": 0}
    stage = ppo(
        policy={"model": "m"} | zero,
        critic=zero,
        reference=zero,
        reward=[REWARD | zero],
        generator={"tensor_parallel": 8},
    )
    (found,) = plan_placement(stage, parse_cluster("1x4xL4-24"), strategy="PACK")
    assert found.changes == ("generator.tensor_parallel=4",)


def test_nobody_wants_a_gpu_where_there_are_none() -> None:
    (found,) = plan_placement(ppo(policy={"model": "m", "cpus": 9}), parse_cluster("1x8xCPU-64"), strategy="PACK")
    assert found.shortage is not None
    assert found.wanted == Share(13, 0)


def test_scoring_of_pairs_comes_first() -> None:
    made = {
        "method": "dpo",
        "policy": {"model": "m"},
        "data": {"train": "d"},
        "reward": [REWARD],
        "pairs": {"relabel": True},
    }
    stage = schema.Pipeline(run_dir="r", stages=[made]).stages[0]
    found = plan_placement(stage, unnamed_cluster(), strategy="PACK")
    assert [(each.while_, [role.role for role in each.roles]) for each in found] == [
        ("scoring pairs", ["reward/model"]),
        ("training", ["policy", "reference"]),
    ]


@pytest.mark.parametrize("strategy", ["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"])
def test_strategies(strategy: str) -> None:
    requests = [RoleRequest("policy", 2, gpus=1.0), RoleRequest("reward", gpus=1.0)]
    _, nodes = place(requests, parse_cluster("3x4xH100-80"), strategy=strategy)
    together = {"policy": {0: 2}, "reward": {0: 1}}
    apart = {"policy": {0: 1, 1: 1}, "reward": {2: 1}}
    assert nodes == (together if "PACK" in strategy else apart)


requests_of_roles = st.lists(
    st.builds(
        RoleRequest,
        role=st.sampled_from(["policy", "critic", "reference", "generator"]),
        workers=st.integers(1, 6),
        cpus=st.one_of(st.none(), st.sampled_from([0.5, 2.0])),
        gpus=st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        reuse=st.sampled_from([None, "generator"]),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda request: request.role,
)


@settings(max_examples=100)
@given(
    requests=requests_of_roles,
    nodes=st.integers(1, 4),
    each=st.integers(1, 4),
    strategy=st.sampled_from(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]),
)
def test_no_node_gives_more_than_it_has(requests: list[RoleRequest], nodes: int, each: int, strategy: str) -> None:
    cluster = parse_cluster(f"{nodes}x{each}xL4-24")
    try:
        shares, found = place(requests, cluster, strategy=strategy)
    except PlacementError:
        return
    for request in requests:
        assert sum(found[request.role].values()) == request.workers
    for node in range(nodes):
        assert sum(found[each.role].get(node, 0) * shares.workers[each.role].gpus for each in requests) <= each + 1e-6


@pytest.mark.parametrize(
    ("asked", "proposed"),
    [
        (["ppo.reward.0.workers=9"], "reward.0.workers=4"),
        # No change of one is enough: half of both, and what has one worker is not named.
        (["ppo.generator.workers=6", "ppo.reference.workers=5"], "reference.workers=2 generator.workers=3"),
    ],
)
def test_what_is_proposed_fits_as_an_override(asked: list[str], proposed: str) -> None:
    def planned(overrides: list[str]) -> StagePlacement:
        gpus = [f"ppo.{role}.gpus=1" for role in ("policy", "critic", "reference", "reward.0", "generator")]
        config = load_pipeline("pipelines/quickstart.yaml", gpus + overrides)
        return plan_placement(config.stages[-1], parse_cluster("1x8xL4-24"), strategy="PACK")[0]

    found = planned(asked)
    assert found.shortage is not None
    change, nodes = found.changes
    assert change == proposed
    assert planned([*asked, *(f"ppo.{part}" for part in change.split())]).shortage is None
    assert nodes == "2 such nodes instead of 1"


def test_roles_that_share_bundles_are_planned_together() -> None:
    stage = ppo(
        policy={"model": "m", "workers": 4},
        critic={"workers": 4, "colocate_with": "policy"},
        reference={"workers": 2, "colocate_with": "policy"},
        generator={"gpus": 1},
    )
    (found,) = plan_placement(stage, parse_cluster("2x8xH100-80"), strategy="PACK")
    three, two = ("policy + critic + reference", Share(3, 1)), ("policy + critic", Share(2, 1))
    assert found.groups == ((three, three, two, two, ("reward/model", Share(1, 1))), (("generator", Share(1, 1)),))
    assert found.wanted == Share(12, 6)
    roles = {role.role: role for role in found.roles}
    assert (roles["reference"].shares_with, roles["reference"].room) == ("policy", Share(3, 1))
    assert roles["reference"].share == roles["policy"].share == Share(1, 0.33)
    assert roles["reference"].nodes == {0: 2}
    # The first bundle has all three roles, the last one two.
    assert roles["policy"].room == Share(3, 1)
    assert (roles["policy"].shares_with, roles["generator"].shares_with) == (None, None)


def test_sharers_get_fewer_workers_together() -> None:
    stage = ppo(
        policy={"model": "m", "workers": 12},
        critic={"workers": 12, "colocate_with": "policy"},
        reference={"gpus": 0},
        reward=[REWARD | {"gpus": 0}],
    )
    (found,) = plan_placement(stage, parse_cluster("1x8xH100-80"), strategy="PACK")
    assert found.shortage is not None
    assert "policy (with critic) needs 12 GPUs" in found.shortage
    assert found.changes == ("policy.workers=7 critic.workers=7", "2 such nodes instead of 1")


BUSY = running_cluster(
    [
        Node("10.0.0.1", Share(64, 8), Share(64, 6), 500.0, "H100"),
        Node("10.0.0.2", Share(64, 4), Share(0, 0), 500.0, "H100"),
    ],
    "two nodes",
)


def test_more_nodes_of_a_running_cluster_are_like_its_largest() -> None:
    """Of twelve GPUs six are free; 19 are wanted, and eight come with each node."""
    learner = {"model": "m", "workers": 4}
    stage = ppo(policy=learner, critic=learner, generator={"workers": 9}, prompts_per_iteration=256)
    (found,) = plan_placement(stage, BUSY, strategy="PACK")
    assert found.shortage is not None
    assert found.changes[-1] == "2 more nodes like the largest"
    assert BUSY.with_nodes(4).total_gpus == 28
    assert [node.gpus for node in BUSY.with_nodes(4).all_nodes] == [6, 0, 8, 8]


def test_a_busy_cluster_is_not_one_without_gpus() -> None:
    full = running_cluster([replace(BUSY.running[0], free=Share(64, 0))], "one node")
    (found,) = plan_placement(ppo(), full, strategy="PACK")
    assert found.shortage is not None
    assert "policy needs 1 GPU, critic needs 1 GPU" in found.shortage
    assert "0 of 8 are free" in found.shortage
    assert found.changes == ("1 more node like the largest",)


def test_a_change_that_makes_workers_share_says_so() -> None:
    """Two ranks of the policy want a GPU each; one alone shares with the others."""
    (found,) = plan_placement(ppo(policy={"model": "m", "workers": 2}), parse_cluster("1x2xH100-80"), strategy="PACK")
    assert found.changes[0] == "policy.workers=1 (workers then share GPUs)"
