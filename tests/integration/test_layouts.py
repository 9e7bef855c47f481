"""Layouts on 1, 2 and 4 fake nodes with logical GPUs: what Ray reserves is what a plan prints, bundle by bundle."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.load import load_pipeline
from rlhf_ray.errors import PlacementError
from rlhf_ray.plan.cluster import ClusterShape
from rlhf_ray.plan.placement import place, plan_placement
from tests.integration.fake_nodes import LAYOUTS, NODE, infeasible, overrides, requests_of


def shape(nodes: int) -> ClusterShape:
    return ClusterShape(f"{nodes} nodes", nodes, float(NODE["num_cpus"]), float(NODE["num_gpus"]), None, None)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the fake nodes gave; sockets lie in Ray's folder, and their paths must be short."""
    folder = tmp_path_factory.mktemp("nodes")
    short = Path(f"/tmp/rlhf_{os.getpid()}")
    short.symlink_to(folder)
    for name in ("ray", "home"):
        (folder / name).mkdir()
    alone = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Ray prefers the name that the user of this process has for it to one that a home folder gives.
    env = alone | {"RAY_TMPDIR": str(short), "HOME": str(folder / "home"), "RAY_USAGE_STATS_ENABLED": "0"}
    try:
        command = [sys.executable, "-m", "tests.integration.fake_nodes"]
        ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    finally:
        short.unlink()
    assert ran.returncode == 0, ran.stderr[-4000:]
    printed: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return printed


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bundles_are_those_of_the_plan(found: dict[str, Any], layout: str, nodes: int) -> None:
    stage = load_pipeline("pipelines/quickstart.yaml", overrides(layout, nodes)).stages[-1]
    (planned,) = plan_placement(stage, shape(nodes), strategy="PACK")
    assert planned.shortage is None
    wanted = [[share.bundle() for _, share in group] for group in planned.groups]
    reserved = found["layouts"][str(nodes)][layout]
    assert in_order(reserved["groups"]) == in_order(wanted)
    on = reserved["nodes"]
    for role in planned.roles:
        assert len(on[role.role]) == role.workers
        if role.shares_with is not None:
            assert on[role.role] == on[role.shares_with][: role.workers]
    gpus = Counter[str]()
    for role in planned.roles:
        gpus.update(dict.fromkeys(set(on[role.role]), 0))
        if role.shares_with is None:
            for node in on[role.role]:
                gpus[node] += int(role.room.gpus)
    assert max(gpus.values()) <= NODE["num_gpus"]
    assert len(gpus) == nodes


def in_order(groups: list[list[dict[str, float]]]) -> list[list[list[tuple[str, float]]]]:
    """The same, whatever the order of groups and of the resources of a bundle."""
    return sorted([sorted(bundle.items()) for bundle in group] for group in groups)


def test_uneven_nodes(found: dict[str, Any]) -> None:
    """Two engines of three GPUs on each node of eight, and one on the node of three."""
    assert sorted(Counter(found["uneven"]["nodes"]["generator"]).values()) == [1, 2, 2, 2, 2]


def test_idle_engines_give_their_gpus_to_the_next_stage(found: dict[str, Any]) -> None:
    assert found["after engines"] == {"policy": 1.0, "reference": 1.0}


def test_roles_are_on_the_nodes_whose_labels_they_ask_for(found: dict[str, Any]) -> None:
    """The policy on the four nodes of eight GPUs; the engines, one a newcomer, and the reference on the other."""
    nodes = found["labelled"]["nodes"]
    (small,) = {*nodes["generator"], *nodes["reference"]}
    assert (len(nodes["generator"]), len(nodes["policy"])) == (2, 8)
    assert small not in nodes["policy"]
    judge, policy = found["labelled"]["refused"]
    assert judge.startswith(
        "judge: one worker needs 0.5 CPUs and 1 GPU on one node with pool=small, and with the others"
    )
    assert policy.startswith(
        "policy: one worker needs 1 CPU and 1 GPU on one node with pool=!small, and with the others"
    )


def test_each_worker_is_where_it_was_placed(found: dict[str, Any]) -> None:
    workers = found["workers"]
    seen, nodes = workers["seen"], workers["nodes"]
    devices = [(node, each["CUDA_VISIBLE_DEVICES"]) for node, each in zip(nodes["policy"], seen["policy"], strict=True)]
    assert len(set(devices)) == 3
    sharers = zip(nodes["reference"], seen["reference"], strict=True)
    assert [(node, each["CUDA_VISIBLE_DEVICES"]) for node, each in sharers] == devices[:2]
    address = seen["critic"][0]["MASTER_ADDR"]
    assert workers["lines"][0] == f"policy 0: node {address}, GPU {devices[0][1]}"
    assert workers["lines"][-1] == f"critic 2: node {address}, no GPU"
    assert len(workers["trace"]) == len(workers["lines"]) == 8


def test_a_worker_that_sees_other_gpus_than_its_own_is_an_error(found: dict[str, Any]) -> None:
    message = r"^policy rank 0 is in the wrong place: got CUDA_VISIBLE_DEVICES with all GPUs; wanted GPU \d, which Ray"
    assert re.search(message, found["blind"]), found["blind"]


def test_ranks_over_two_nodes_have_local_ranks(found: dict[str, Any]) -> None:
    seen, nodes = found["workers"]["seen"], found["workers"]["nodes"]["critic"]
    assert sorted(Counter(nodes).values()) == [1, 2]
    for rank, (each, node) in enumerate(zip(seen["critic"], nodes, strict=True)):
        assert (each["RANK"], each["WORLD_SIZE"]) == (str(rank), "3")
        assert each["LOCAL_RANK"] == str(nodes[:rank].count(node))
        assert each["LOCAL_WORLD_SIZE"] == str(nodes.count(node))
    assert len({each["MASTER_ADDR"] for each in seen["critic"]}) == 1
    # A worker with a GPU sees that one alone.
    assert {(each["LOCAL_RANK"], each["LOCAL_WORLD_SIZE"]) for each in seen["policy"]} == {("0", "1")}


def test_what_cannot_be_placed_is_refused_with_role_and_shortage(found: dict[str, Any]) -> None:
    """Each within five seconds, else the process of the fake nodes had been ended."""
    assert len(found["refusals"]) == len(infeasible()) == 20
    for (role, _), (_, message) in zip(infeasible(), found["refusals"], strict=True):
        assert re.search(rf"\b{role}\b", message), message
        assert re.search(r"\d GPUs?|\d CPUs?", message), message
    assert "no error" not in {message for _, message in found["refusals"]}


@pytest.mark.parametrize(("role", "asked"), infeasible())
def test_a_plan_refuses_the_same(role: str, asked: list[Any]) -> None:
    requests = requests_of(asked, gpus=32) if isinstance(asked[0], str) else asked
    with pytest.raises(PlacementError, match=rf"\b{role}\b.*\d (GPU|CPU)s?\b"):
        place(requests, shape(4), strategy="PACK")


def test_what_others_hold_is_waited_for_and_then_named(found: dict[str, Any]) -> None:
    assert re.search(r"critic 2 x \(1 CPU, 1 GPU\); free are .* and 0 of 35 GPUs", found["held"]), found["held"]
