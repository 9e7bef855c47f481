"""Deadlines of waits, by a clock and workers that are invented here: every third second one of them answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from rlhf_ray.distributed import supervision
from rlhf_ray.distributed.supervision import Call, Reply, as_they_come, wait
from rlhf_ray.distributed.work import Work
from rlhf_ray.errors import WorkerError


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]

    def first_answered(replies: list[Any], deadline: float) -> list[Any]:
        now[0] = min(now[0] + 3.0, max(now[0], deadline))
        return replies[-1:] if now[0] < deadline else []

    monkeypatch.setattr(supervision, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(supervision, "_first_answered", first_answered)
    monkeypatch.setattr(
        supervision, "_fetched", lambda done: {name: Reply(name, None, 0, 0, 0, Work()) for name in done}
    )


def calls(*timeouts: float) -> list[Call]:
    replies: list[Any] = ["a", "b", "c", "d"]
    return [
        Call(reply, "reward", rank, "score", timeout_s, "placement.call_timeout_s")
        for rank, (reply, timeout_s) in enumerate(zip(replies, timeouts, strict=False))
    ]


def test_a_wait_for_all_has_one_deadline() -> None:
    assert [reply.value for reply in wait(calls(10, 10, 10))] == ["a", "b", "c"]
    late = r"rank 0, score: no answer within 5 s \(placement.call_timeout_s; waited 5.0 s\); also .*: reward rank 1,"
    with pytest.raises(WorkerError, match=late):
        wait(calls(5, 5, 5))


def test_the_shortest_deadline_of_those_that_are_left_counts() -> None:
    assert len(wait(calls(10, 10, 4))) == 3
    with pytest.raises(WorkerError, match=r"reward rank 0, score: no answer within 4 s .*waited 4.0 s"):
        wait(calls(4, 10, 10))


def test_a_deadline_counts_from_one_arrival_to_the_next() -> None:
    assert [(index, reply.value) for index, reply in as_they_come(calls(5, 5, 5, 5))] == [
        (3, "d"),
        (2, "c"),
        (1, "b"),
        (0, "a"),
    ]
    with pytest.raises(WorkerError, match=r"reward rank 0, score: no answer within 2 s .*waited 2.0 s"):
        list(as_they_come(calls(2, 5)))


def test_a_death_is_named_instead_of_its_neighbour_s_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    def complains(call: Call, fetched: Reply | None) -> Reply:
        raise WorkerError(f"{call.where}: the connection was lost")

    def died(reply: Any, timeout: float) -> None:
        if reply == "a":
            raise RayActorError

    of_ray = SimpleNamespace(wait=lambda replies, **options: (replies, []), get=died)
    monkeypatch.setattr(supervision, "_answer", complains)
    monkeypatch.setattr(supervision, "ray", of_ray)
    with pytest.raises(WorkerError, match=r"^reward rank 0, score: the worker died: "):
        wait(calls(9, 9, 9))
