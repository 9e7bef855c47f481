"""A cluster's nodes as its dashboard tells of them."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.distributed import placement
from rlhf_ray.distributed.bundles import NodeShare
from rlhf_ray.distributed.nodes import Node, capacity, cluster_nodes, nodes_of_dashboard
from rlhf_ray.distributed.placement import Share
from rlhf_ray.errors import ConfigError

GIB = 2**30


class Dashboard:
    """Answers as Ray 2.60 does, in what is read of it."""

    def state(self, path: str) -> Any:
        return {
            "/api/cluster_status": {
                "clusterStatus": {
                    "loadMetricsReport": {"usageByNode": {"a": {"CPU": [1.5, 8.0]}, "b": {"GPU": [3.0, 4.0]}}}
                }
            },
            "/nodes?view=summary": {
                "summary": [
                    {"raylet": {"nodeId": "a"}},
                    {"raylet": {"nodeId": "b"}, "gpus": [{"memoryTotal": 81920}, {"memoryTotal": 40960}]},
                ]
            },
            "/api/v0/nodes?detail=1": {
                "result": {
                    "result": [
                        {
                            "node_id": "a",
                            "node_ip": "10.0.0.1",
                            "state": "ALIVE",
                            "labels": {"pool": "large"},
                            "resources_total": {"CPU": 8.0, "memory": 20.0 * GIB, "object_store_memory": 10.0 * GIB},
                        },
                        {
                            "node_id": "b",
                            "node_ip": "10.0.0.2",
                            "state": "ALIVE",
                            "labels": None,
                            "resources_total": {"CPU": 16.0, "GPU": 4.0, "accelerator_type:A100": 1.0},
                        },
                        {"node_id": "c", "node_ip": "10.0.0.3", "state": "DEAD", "resources_total": {"CPU": 99.0}},
                    ]
                }
            },
        }[path]


def test_nodes_that_are_up_and_what_is_free_of_them() -> None:
    found = nodes_of_dashboard(Dashboard())  # type: ignore[arg-type]
    assert found == [
        Node("10.0.0.1", Share(8, 0), Share(6.5, 0), 30.0, "", None, {"pool": "large"}),
        Node("10.0.0.2", Share(16, 4), Share(16, 1), 0.0, "A100", 40.0),
    ]
    together = capacity(found)
    assert (together.cpus, together.gpus, together.free_cpus, together.free_gpus) == (24, 4, 22.5, 1)
    assert together.nodes == [NodeShare(8, 0, {"pool": "large"}), NodeShare(16, 4, {})]


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "127.0.0.1:1", "ray://127.0.0.1:10001", "127.0.0.1:1:6379"])
def test_an_address_where_nobody_is(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests may have a Ray open in this process, which would be taken for the one that is meant.
    monkeypatch.setattr(placement, "_connection", None)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1"):
        cluster_nodes(address)
