"""The nodes of a Ray cluster: what each has, and what of it is free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import ray
from ray._private.state import available_resources_per_node

from rlhf_ray.distributed.bundles import Capacity, NodeShare, Share
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_ray.distributed.jobs import JobServer

RAY_PORT = 6379
_JOIN_S = 10.0
_ACCELERATOR = "accelerator_type:"


@dataclass(frozen=True)
class Node:
    """One node that is up.

    Args:
        address: its IP address.
        has: CPU cores and GPUs.
        free: those that nobody has reserved.
        memory_gib: what Ray gives to workers and objects together.
        gpu: the type of its GPUs as Ray names it; empty where it has none, or Ray does not know it.
        gpu_gib: memory of its smallest GPU; None where it has none, or it is not known.
        labels: what it was labelled with, and what Ray adds to that.
    """

    address: str
    has: Share
    free: Share
    memory_gib: float
    gpu: str
    gpu_gib: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


def cluster_nodes(address: str) -> list[Node]:
    """The nodes of a running cluster.

    Args:
        address: of its dashboard, http://HOST:8265 or HOST:8265; or, on one of its machines, `auto` or HOST:6379.

    Raises:
        ConfigError: nobody answers, the token is wrong, or there is no such address.
        LostError: it answers no more.
    """
    if address == "auto" or address.endswith(f":{RAY_PORT}"):
        try:
            with Cluster(address, start_timeout_s=_JOIN_S):
                return nodes_of_ray()
        except ConfigError as error:
            raise ConfigError(str(error).replace("placement.address", "--address")) from None
    from rlhf_ray.distributed import jobs

    return nodes_of_dashboard(jobs.connect(address))


def nodes_of_dashboard(server: JobServer) -> list[Node]:
    """The nodes that a dashboard tells of."""
    report = server.state("/api/cluster_status")["clusterStatus"]["loadMetricsReport"]
    used = report["usageByNode"]
    seen = server.state("/nodes?view=summary")["summary"]
    gpus = {node["raylet"]["nodeId"]: node.get("gpus") or [] for node in seen if node.get("raylet")}
    found = []
    for node in server.state("/api/v0/nodes?detail=1")["result"]["result"]:
        if node["state"] == "ALIVE":
            there, usage = node["resources_total"], used.get(node["node_id"], {})
            left = {name: there.get(name, 0.0) - usage.get(name, [0.0])[0] for name in ("CPU", "GPU")}
            memory = [each["memoryTotal"] / 1024 for each in gpus.get(node["node_id"], ()) if each.get("memoryTotal")]
            found.append(_node(node["node_ip"], there, left, min(memory, default=None), node["labels"]))
    return found


def nodes_of_ray() -> list[Node]:
    """The nodes of the Ray that this process is connected to."""
    free = available_resources_per_node()
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            left = free.get(node["NodeID"], {})
            found.append(_node(node["NodeManagerAddress"], node["Resources"], left, None, node["Labels"]))
    return found


def _node(
    address: str,
    there: Mapping[str, float],
    left: Mapping[str, float],
    gpu_gib: float | None,
    labels: Mapping[str, str] | None,
) -> Node:
    return Node(
        address=address,
        has=_share(there),
        free=_share(left),
        memory_gib=(there.get("memory", 0.0) + there.get("object_store_memory", 0.0)) / 2**30,
        gpu=next((name.removeprefix(_ACCELERATOR) for name in there if name.startswith(_ACCELERATOR)), ""),
        gpu_gib=gpu_gib,
        labels=labels or {},
    )


def _share(resources: Mapping[str, float]) -> Share:
    return Share(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def capacity(nodes: list[Node]) -> Capacity:
    """All nodes together."""
    return Capacity(
        cpus=sum(node.has.cpus for node in nodes),
        gpus=sum(node.has.gpus for node in nodes),
        free_cpus=sum(node.free.cpus for node in nodes),
        free_gpus=sum(node.free.gpus for node in nodes),
        nodes=[NodeShare(node.has.cpus, node.has.gpus, node.labels) for node in nodes],
    )
