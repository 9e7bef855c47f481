"""Groups whose workers come and go; the hosts are names here, and note who is asked."""

from __future__ import annotations

from typing import Any

from rlhf_ray.distributed.groups import RayGroup
from rlhf_ray.distributed.supervision import Call
from rlhf_ray.distributed.tracing import Recorder

asked: list[str] = []


class Host:
    def __init__(self, name: str) -> None:
        self.name = name
        self.call = self

    def remote(self, method: str) -> Any:
        asked.append(self.name)
        return self.name


class Worker:
    def work(self) -> None: ...


def group_of(names: str) -> tuple[RayGroup[Worker], list[str]]:
    """A group, and whose hosts were released."""
    released: list[str] = []
    built = [Call(name, "generator", rank, "start", 1.0, "s") for rank, name in enumerate(names)]  # type: ignore[arg-type]
    group: RayGroup[Worker] = RayGroup(
        "generator",
        [Host(name) for name in names],
        collective=False,
        timeout_s=1.0,
        recorder=Recorder(),
        built=built,
        release=lambda idle: released.append(names),
    )
    return group, released


def workers(group: RayGroup[Worker]) -> str:
    asked.clear()
    group.all(Worker.work)
    assert group.size == len(asked)
    return "".join(asked)


def test_the_first_ones_stay() -> None:
    group, _ = group_of("abc")
    group.leave(1)
    assert workers(group) == "a"


def test_newcomers_come_after_those_that_are_there() -> None:
    group, released = group_of("ab")
    newcomers, theirs = group_of("cd")
    group.join(newcomers)
    assert workers(group) == "abcd"
    newcomers.close()
    group.close()
    assert (released, theirs) == (["ab"], [])


def test_a_part_ends_nobody() -> None:
    group, released = group_of("abc")
    part = group.part(2)
    assert workers(part) == "ab"
    part.close()
    assert released == []
    assert workers(group) == "abc"
