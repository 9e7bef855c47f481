"""Which hosts of earlier groups a request can use; without Ray, whose handles are names here."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.distributed.bundles import RoleRequest, Share
from rlhf_ray.distributed.connection import Connection, Slot
from rlhf_ray.distributed.environment import worker_environment

SHARE = Share(1, 0.5)
WANTED: dict[str, Any] = {"env": {"COLOUR": "red"}, "reuse": "engine", "node_labels": {"pool": "large"}}


def connection(hosts: int) -> Connection:
    """One on which hosts that served WANTED wait, the oldest first."""
    found = Connection(ours=True, opened=False, folder=None)
    kept = WANTED | {"env": worker_environment(SHARE, WANTED["env"])}
    nowhere: Any = None
    found.idle = [Slot(nowhere, number, SHARE, SHARE, host=f"host {number}", **kept) for number in range(hosts)]
    return found


def taken(hosts: int, **changes: Any) -> list[Any]:
    there = connection(hosts)
    slots = there.take(RoleRequest("generator", **(WANTED | changes)))
    assert [slot.host for slot in slots] + [slot.host for slot in there.idle] == [f"host {n}" for n in range(hosts)]
    return [slot.host for slot in slots]


def test_hosts_of_an_equal_request_are_taken() -> None:
    assert taken(2) == ["host 0"]
    assert taken(2, workers=2, cpus=1.0, gpus=0.5) == ["host 0", "host 1"]
    assert taken(1, workers=2) == ["host 0"]


@pytest.mark.parametrize(
    "changes",
    [
        {"reuse": None},
        {"reuse": "other"},
        {"cpus": 2.0},
        {"gpus": 1.0},
        {"gpus": 0.0},
        {"env": {"COLOUR": "blue"}},
        {"env": {}},
        {"node_labels": {}},
        {"node_labels": {"pool": "!large"}},
        {"node_labels": {"pool": "large", "market": "spot"}},
    ],
)
def test_hosts_of_another_request_are_left(changes: dict[str, Any]) -> None:
    assert taken(2, **changes) == []
