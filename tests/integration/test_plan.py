"""What a plan prints is what Ray reserves, bundle by bundle."""

from __future__ import annotations

from ray.util.placement_group import placement_group_table

from rlhf_ray.config.load import load_pipeline
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.plan.cluster import ClusterShape
from rlhf_ray.plan.placement import plan_placement, stage_requests


def test_the_bundles_are_those_that_ray_reserves() -> None:
    """With logical GPUs: nothing is started on them."""
    overrides = ["ppo.policy.workers=2", "ppo.generator.workers=2", "ppo.generator.tensor_parallel=2"]
    stage = load_pipeline("pipelines/quickstart.yaml", overrides).stages[-1]
    shape = ClusterShape("one node", 1, cpus=16.0, gpus=10.0, gpu_gib=None, host_gib=None)
    (planned,) = plan_placement(stage, shape, strategy="PACK")
    assert planned.shortage is None
    with (
        Cluster(num_cpus=16, num_gpus=10, start_timeout_s=60) as cluster,
        cluster.reserve(stage_requests(stage, gpus=cluster.gpus)),
    ):
        reserved = [
            [sorted(group["bundles"][number].items()) for number in sorted(group["bundles"])]
            for group in placement_group_table().values()
            if group["state"] == "CREATED"
        ]
    wanted = [[sorted(share.bundle().items()) for _, share in group] for group in planned.groups]
    assert sorted(reserved) == sorted(wanted)
