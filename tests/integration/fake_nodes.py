"""Reserves layouts on fake nodes with logical GPUs, and prints what Ray gave as JSON; a test runs it as a process.

A process joins one Ray at a time, and the tests have theirs. Nothing runs on the GPUs: there are none.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ray.cluster_utils import Cluster as FakeNodes
from ray.util.placement_group import placement_group_table

from rlhf_ray.config.load import load_pipeline
from rlhf_ray.distributed.bundles import RoleRequest
from rlhf_ray.distributed.groups import gather
from rlhf_ray.distributed.place import Place
from rlhf_ray.distributed.placement import Cluster, Placement
from rlhf_ray.errors import PlacementError
from rlhf_ray.plan.placement import stage_requests

LAYOUTS = ("separate", "colocated", "shared_scorers")
NODE = {"num_cpus": 16, "num_gpus": 8}
UNEVEN = {"num_cpus": 4, "num_gpus": 3, "labels": {"pool": "small"}}
DEADLINE_S = 5


def overrides(layout: str, nodes: int) -> list[str]:
    """Settings that need most of so many nodes' GPUs, and more than one node where there are several."""
    workers = {"separate": 2 * nodes, "colocated": 7 * nodes, "shared_scorers": 2 * nodes}[layout]
    return [
        f"placement.layout={layout}",
        f"ppo.policy.workers={workers}",
        f"ppo.critic.workers={workers}",
        f"ppo.generator.workers={workers}",
        "ppo.prompts_per_iteration=1024",
    ]


def infeasible() -> list[tuple[str, Sequence[Any]]]:
    """Requests that four nodes and the uneven one cannot serve, each with the role that is at fault."""
    by_settings = {
        "policy": [
            ["ppo.policy.workers=36"],
            ["ppo.policy.workers=33", "placement.layout=separate"],
            ["ppo.policy.workers=36", "placement.layout=colocated"],
            ["ppo.policy.gpus=0.5", "ppo.policy.workers=2"],
            ["ppo.policy.cpus=17"],
            ["ppo.policy.cpus=16", "ppo.policy.workers=5"],
        ],
        "critic": [
            ["ppo.critic.workers=36"],
            ["ppo.critic.cpus=64"],
            ["ppo.critic.workers=34", "placement.layout=shared_scorers"],
        ],
        "reference": [
            ["ppo.reference.gpus=9"],
            ["ppo.reference.workers=36", "ppo.reference.gpus=1"],
            ["ppo.reference.cpus=100"],
        ],
        "reward/learned": [
            ["ppo.reward.0.workers=40", "placement.layout=separate"],
            ["ppo.reward.0.gpus=8.5"],
            ["ppo.reward.0.cpus=16.5"],
        ],
        "generator": [
            ["ppo.generator.tensor_parallel=16"],
            ["ppo.generator.tensor_parallel=8", "ppo.generator.workers=5"],
            # Nine engines of three GPUs have room, and 30 GPUs would be there for ten.
            ["ppo.generator.tensor_parallel=3", "ppo.generator.workers=10"],
        ],
    }
    found: list[tuple[str, Sequence[Any]]] = [
        (role, settings) for role, several in by_settings.items() for settings in several
    ]
    found.append(("scorer", [RoleRequest("scorer", gpus=2.0), RoleRequest("judge", colocate_with="scorer")]))
    found.append(("scorer", [RoleRequest("scorer", 5, cpus=10.0, gpus=1.0)]))
    return found


class Witness:
    """Says what its process was given."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def environment(self) -> dict[str, str]:
        """The variables of its place."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES")
        return {name: os.environ.get(name, "") for name in names}


@contextmanager
def within_deadline() -> Iterator[None]:
    """Ends this process where what is within takes longer."""
    signal.alarm(DEADLINE_S)
    try:
        yield
    finally:
        signal.alarm(0)


def requests_of(settings: Sequence[str], *, gpus: float) -> list[RoleRequest]:
    """What the PPO stage of the quickstart asks for under these settings."""
    asked = ["ppo.prompts_per_iteration=1024", *settings]
    return stage_requests(load_pipeline("pipelines/quickstart.yaml", asked).stages[-1], gpus=gpus)


def reserved(placement: Placement, roles: Sequence[str]) -> dict[str, Any]:
    """The bundles of Ray's placement groups, and the nodes of each role's workers."""
    groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    return {
        "groups": [[group["bundles"][number] for number in sorted(group["bundles"])] for group in groups],
        "nodes": {role: placement.nodes(role) for role in roles},
    }


def layouts(cluster: Cluster, nodes: int) -> dict[str, Any]:
    """What each layout gets."""
    found = {}
    for layout in LAYOUTS:
        requests = requests_of(overrides(layout, nodes), gpus=cluster.gpus)
        with cluster.reserve(requests) as placement:
            found[layout] = reserved(placement, [request.role for request in requests])
    return found


def refusals(cluster: Cluster) -> list[tuple[str, str]]:
    """The role that is at fault in each request, and what the refusal says."""
    found = []
    for role, asked in infeasible():
        made = requests_of(asked, gpus=cluster.gpus) if isinstance(asked[0], str) else asked
        with within_deadline():
            try:
                with cluster.reserve(made):
                    found.append((role, "no error"))
            except PlacementError as error:
                found.append((role, str(error)))
    return found


def workers(cluster: Cluster) -> dict[str, Any]:
    """Where the workers of a small layout are, and what they see."""
    requests = [
        RoleRequest("policy", 3, cpus=1.0, gpus=1.0, rendezvous=True),
        RoleRequest("reference", 2, colocate_with="policy"),
        # Three of these do not fit on one node.
        RoleRequest("critic", 3, cpus=5.5, gpus=0.0, rendezvous=True),
    ]
    with cluster.reserve(requests) as placement:
        groups = {request.role: placement.start(request.role, Witness) for request in requests}
        lines = placement.verify()
        seen = gather(*(group.all(Witness.environment) for group in groups.values()))
        nodes = {role: placement.nodes(role) for role in groups}
    spans = [span for span in cluster.recorder.drain() if span.place]
    return {
        "lines": lines,
        "seen": dict(zip(groups, seen, strict=True)),
        "nodes": nodes,
        "trace": [[span.role, span.rank, span.place] for span in spans],
    }


def labelled(cluster: Cluster, impatient: Cluster) -> dict[str, Any]:
    """The nodes of roles that ask for them by labels, one with a newcomer, and what is said where there are too few."""
    small = {"pool": "small"}
    requests = [
        RoleRequest("policy", 8, gpus=1.0, cpus=1.0, node_labels={"pool": "!small"}),
        RoleRequest("generator", 1, gpus=1.0, cpus=1.0, reuse="generator", node_labels=small),
        RoleRequest("reference", 1, gpus=1.0, cpus=1.0, node_labels=small),
    ]
    with cluster.reserve(requests) as placement:
        placement.start("generator", Witness)
        growth = placement.grow("generator", 1)
        while growth.missing and growth.waits:
            growth.build()
        growth.join()
        nodes = {request.role: placement.nodes(request.role) for request in requests}
    refused = []
    for asked in ([RoleRequest("judge", 4, gpus=1.0, cpus=0.5, node_labels=small)], [replace(requests[0], workers=33)]):
        with within_deadline():
            try:
                with impatient.reserve(asked):
                    refused.append("no error")
            except PlacementError as error:
                refused.append(str(error))
    return {"nodes": nodes, "refused": refused}


def after_engines(cluster: Cluster) -> dict[str, float]:
    """The GPUs of roles that name none, after a stage whose idle engines hold all of them."""
    engines = RoleRequest("generator", 2, gpus=4.0, cpus=1.0, reuse="generator")
    with cluster.reserve([engines]) as placement:
        placement.start("generator", Witness).all(Witness.environment).result()
    with cluster.reserve([RoleRequest("policy"), RoleRequest("reference", 7)]) as placement:
        return {role: placement.share(role).gpus for role in ("policy", "reference")}


def blind(cluster: Cluster) -> str:
    """What is said of a worker that Ray has not confined to its GPU."""
    env = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    with cluster.reserve([RoleRequest("policy", gpus=1.0, env=env)]) as placement:
        placement.start("policy", Witness)
        try:
            return placement.verify()[0]
        except PlacementError as error:
            return str(error)


def main() -> None:
    """Grows the cluster, and prints all that was found."""
    found: dict[str, Any] = {"layouts": {}}
    fake = FakeNodes(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        with (
            Cluster(fake.address, start_timeout_s=240) as cluster,
            Cluster(fake.address, start_timeout_s=2) as impatient,
        ):
            for nodes in (1, 2, 4):
                while len(fake.list_all_nodes()) < nodes:
                    fake.add_node(**NODE)
                fake.wait_for_nodes()
                found["layouts"][str(nodes)] = layouts(cluster, nodes)
                if nodes == 1:
                    found["after engines"] = after_engines(cluster)
                if nodes == 2:
                    found["workers"] = workers(cluster)
                    found["blind"] = blind(cluster)
            fake.add_node(**UNEVEN)
            fake.wait_for_nodes()
            engines = [RoleRequest("generator", 9, gpus=3.0, cpus=1.0)]
            with cluster.reserve(engines) as placement:
                found["uneven"] = reserved(placement, ["generator"])
            found["labelled"] = labelled(cluster, impatient)
            found["refusals"] = refusals(impatient)
            with cluster.reserve([RoleRequest("policy", 35, gpus=1.0, cpus=1.0)]), within_deadline():
                try:
                    with impatient.reserve([RoleRequest("critic", 2, gpus=1.0)]):
                        found["held"] = "no error"
                except PlacementError as error:
                    found["held"] = str(error)
    finally:
        fake.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
