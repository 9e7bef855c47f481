"""What a plan prints is what Ray reserves, bundle by bundle."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from rlhf_ray.config.load import load_pipeline
from rlhf_ray.distributed.nodes import nodes_of_ray
from rlhf_ray.distributed.placement import Cluster, Share
from rlhf_ray.plan.cluster import ClusterShape
from rlhf_ray.plan.placement import plan_placement

OVERRIDES = ["ppo.policy.workers=2", "ppo.generator.workers=2", "ppo.generator.tensor_parallel=2"]
# The tests' own Ray has no GPUs, and a process joins one Ray at a time.
RESERVE = """
import json, sys
from ray.util.placement_group import placement_group_table
from rlhf_ray.config.load import load_pipeline
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.plan.placement import stage_requests
stage = load_pipeline("pipelines/quickstart.yaml", sys.argv[1:]).stages[-1]
with Cluster("local", num_cpus=16, num_gpus=10, start_timeout_s=120) as cluster:
    with cluster.reserve(stage_requests(stage, gpus=cluster.gpus)):
        groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
        print(json.dumps([[group["bundles"][number] for number in sorted(group["bundles"])] for group in groups]))
"""


def test_the_bundles_are_those_that_ray_reserves() -> None:
    """With logical GPUs: nothing is started on them."""
    stage = load_pipeline("pipelines/quickstart.yaml", OVERRIDES).stages[-1]
    shape = ClusterShape("one node", 1, cpus=16.0, gpus=10.0, gpu_gib=None, host_gib=None)
    (planned,) = plan_placement(stage, shape, strategy="PACK")
    assert planned.shortage is None
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", RESERVE, *OVERRIDES]
    printed = subprocess.run(command, env=alone, check=True, stdout=subprocess.PIPE, text=True, timeout=240).stdout
    reserved = json.loads(printed.splitlines()[-1])
    wanted = [[share.bundle() for _, share in group] for group in planned.groups]
    assert _in_order(reserved) == _in_order(wanted)


def test_the_nodes_of_a_running_ray(cluster: Cluster) -> None:
    (node,) = nodes_of_ray()
    assert node.has == Share(4, 0)
    assert 0 <= node.free.cpus <= 4
    assert node.memory_gib > 1
    assert node.gpu == ""


def _in_order(groups: list[list[dict[str, float]]]) -> list[list[list[tuple[str, float]]]]:
    """The same, whatever the order of groups and of the resources of a bundle."""
    return sorted([sorted(bundle.items()) for bundle in group] for group in groups)
