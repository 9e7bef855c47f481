"""A row of metrics on the endpoint that Prometheus reads."""

from __future__ import annotations

import re
import time
from urllib.request import urlopen

import ray

from rlhf_ray.distributed.gauges import RayGauges
from rlhf_ray.distributed.placement import Cluster
from tests.cluster_files import queries, ray_metrics


def test_prometheus_finds_the_newest_row(cluster: Cluster) -> None:
    tracker = RayGauges(run="a run", stage="ppo")
    tracker.write(1, {"reward/mean": -1.0})
    tracker.write(2, {"reward/mean": 0.25, "kl/per_sequence": float("nan"), "generator/tokens_per_s": 7205})
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    endpoint = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {"iteration": "2.0", "reward_mean": "0.25", "generator_tokens_per_s": "7205.0", "not_finite": "1.0"}
    deadline = time.monotonic() + 60
    found: dict[str, str] = {}
    # Ray sends what was set every ten seconds.
    while found != wanted:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
        lines = urlopen(endpoint, timeout=10).read().decode().splitlines()
        ours = [line for line in lines if line.startswith("ray_rlhf_ray_") and 'run="a run"' in line]
        assert all('stage="ppo"' in line for line in ours)
        found = {line.split("{")[0].removeprefix("ray_rlhf_ray_"): line.split()[-1] for line in ours}
    tracker.close()
    named = {name for name in ray_metrics() for query in queries() if re.search(rf"\b{name}\b", query)}
    published = {line.split("{")[0] for line in lines}
    # Only a machine with a GPU has this one.
    assert named - published <= {"ray_node_gpus_utilization"}
