"""A run's plan beside its metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf_ray import pipeline
from rlhf_ray.config import schema
from rlhf_ray.distributed.bundles import NodeShare, Share
from rlhf_ray.distributed.nodes import Node
from rlhf_ray.errors import ConfigError
from rlhf_ray.plan import prediction
from rlhf_ray.plan.cluster import cluster_as_object, cluster_of, parse_cluster, running_cluster
from rlhf_ray.plan.measured import written_cluster
from rlhf_ray.plan.prediction import Compared, RunPlan, compared, comparison_table

PLANNED = {
    "memory_gib": {"policy": 1.0, "generator": 2.0, "reward/best": 0.5},
    "iteration_s": 4.0,
    "tasks": [
        {"role": "generator", "name": "generate", "seconds": 1.0},
        {"role": "reward/best", "name": "reward_best_score", "seconds": 0.5},
        {"role": "policy", "name": "policy_logprobs", "seconds": 0.5},
        {"role": "policy", "name": "policy_update", "seconds": 1.5},
        {"role": "generator", "name": "sync", "seconds": 0.25},
    ],
}


def row(iteration: int, times: float, **more: Any) -> dict[str, Any]:
    return {
        "stage": "ppo",
        "iteration": iteration,
        "policy/peak_memory_gib": 0.5 * iteration,
        "time/generate_s": 2.0 * times,
        "time/policy_logprobs_s": 0.5 * times,
        "time/policy_update_s": 1.0 * times,
        "sync/time_s": 0.125 * times,
        "sync/probe_time_s": 0.125 * times,
        "time/iteration_s": 5.0 * times,
        **more,
    }


def test_roles_beside_their_plan() -> None:
    # The first iteration warms up; an evaluation is no part of an iteration.
    rows = [row(0, 50), row(1, 9), row(2, 1), row(3, 1, **{"time/iteration_s": 9.0, "time/evaluation_s": 4.0})]
    assert compared(PLANNED, rows) == [
        Compared("policy", 1.0, 1.5, 2.0, 1.5),
        Compared("generator", 2.0, None, 1.0, 2.0),
        Compared("reward/best", 0.5, None, 0.5, None),
        Compared("sync", None, None, 0.25, 0.25),
        Compared("iteration", None, None, 4.0, 5.0),
    ]
    console = Console(width=120, record=True)
    console.print(comparison_table(compared(PLANNED, rows)))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["policy", "1.00", "1.50", "1.50", "2.0", "s", "1.5", "s", "0.75"] in lines


def test_an_iteration_between_two_is_their_mean() -> None:
    rows = [row(1, 1), row(2, 1), row(3, 2)]
    assert compared(PLANNED, rows)[-1] == Compared("iteration", None, None, 4.0, 7.5)


def test_a_stage_without_an_iteration_has_nothing_to_compare() -> None:
    assert compared(PLANNED, [row(0, 1)]) == []


def test_a_running_cluster_of_uneven_nodes(tmp_path: Path) -> None:
    nodes = [
        Node("10.0.0.1", Share(8, 0), Share(8, 0), 30.0, ""),
        Node("10.0.0.2", Share(64, 8), Share(60, 5), 400.0, "H100", labels={"pool": "large"}),
    ]
    found = running_cluster(nodes, "two nodes")
    assert (found.nodes, found.total_cpus, found.total_gpus, found.gpu_gib, found.host_gib) == (2, 72, 8, 80, 30)
    assert list(found.all_nodes) == [NodeShare(8, 0, {}), NodeShare(60, 5, {"pool": "large"})]
    assert (found.capacity().free_gpus, found.capacity().gpus) == (5, 8)
    for cluster in (found, parse_cluster("2x8xH200-141")):
        written = json.loads(json.dumps(cluster_as_object(cluster)))
        assert (cluster_of(written), cluster_of(written).gpu) == (cluster, cluster.gpu)
    assert written_cluster(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:40], "it is no JSON"),
        (lambda text: "[]", "it has no cluster"),
        (lambda text: json.dumps({"stages": {}}), "it has no cluster"),
        (lambda text: text.replace('"nodes"', '"knots"'), "its cluster is described otherwise"),
        (lambda text: text.replace('"bfloat16"', '"float8"'), "its cluster is described otherwise"),
        (lambda text: text.replace('"free"', '"left"'), "its cluster is described otherwise"),
        (lambda text: json.dumps({"cluster": 8}), "its cluster is described otherwise"),
    ],
)
def test_a_plan_of_another_version_is_refused(tmp_path: Path, change: Callable[[str], str], words: str) -> None:
    cluster = running_cluster([Node("10.0.0.1", Share(8, 0), Share(8, 0), 30.0, "")], "one node")
    written = tmp_path / "plan.json"
    written.write_text(change(json.dumps({"cluster": cluster_as_object(cluster), "stages": {}})))
    with pytest.raises(ConfigError) as refused:
        written_cluster(tmp_path)
    assert str(refused.value).startswith(f"--measured: {written}: {words}")
    assert str(refused.value).endswith("wanted the folder of a run of this version of rlhf_ray")


def test_a_run_is_planned_on_its_own_cluster(
    tmp_path: Path, llama_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"text": "some words"}) + "\n")
    made = {"method": "sft", "policy": {"model": str(llama_directory)}, "data": {"train": str(data)}, "steps": 3}
    config = schema.Pipeline(run_dir=str(tmp_path), stages=[made])
    node = Node("10.0.0.1", Share(2, 0), Share(1, 0), 24.0, "")
    monkeypatch.setattr(prediction, "nodes_of_ray", lambda: [node])
    rows = [
        {"stage": "sft", "iteration": number, "time/iteration_s": 1.0, "time/policy_update_s": 1.0} for number in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    plan = RunPlan(config, {"sft": {"train": 1, "evaluation": 0}}, tmp_path)
    policy, iteration = plan.compare(config.stages[0])
    assert (policy.role, policy.measured_gib, policy.measured_s, iteration.measured_s) == ("policy", None, 1.0, 1.0)
    assert policy.planned_gib is not None
    assert policy.planned_gib > 0.5
    cluster = written_cluster(tmp_path)
    assert cluster is not None
    assert cluster.running == (node,)


def test_what_is_wrong_with_a_plan_ends_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    class Wrong:
        def compare(self, stage: Any) -> list[Compared]:
            raise ZeroDivisionError("by nothing")

    made = {"method": "sft", "policy": {"model": "m"}, "data": {"train": "d"}}
    stage = schema.Pipeline(run_dir="r", stages=[made]).stages[0]
    pipeline._show_plan(Wrong(), stage)  # type: ignore[arg-type]
    assert capsys.readouterr().out == "[sft] there is no plan to compare with: ZeroDivisionError: by nothing\n"
