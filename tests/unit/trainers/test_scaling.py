"""Wishes for more or fewer generators: when they are read, what becomes of them, and what a person is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.errors import WorkerError
from rlhf_ray.trainers.scale_file import Standing, Wish, is_under_way, read_standing, read_wish, wish_for
from rlhf_ray.trainers.scaling import Scaling


class FakeGrowth:
    """Newcomers of whom some have no room yet; `deadline` says whether room is still waited for."""

    def __init__(self, room: FakeRoom, workers: int) -> None:
        self.room = room
        self.left = workers
        self.building = 0
        self.closed = False

    @property
    def missing(self) -> int:
        return self.left

    @property
    def waits(self) -> bool:
        return self.building > 0 or (self.left > 0 and self.room.patient)

    def shortage(self) -> str:
        return f"no room for {self.left} more"

    def build(self) -> None:
        self.building = min(self.left, self.room.free)
        self.left -= self.building
        self.room.free -= self.building

    def join(self) -> None:
        if self.room.broken:
            self.building = 0
            raise WorkerError("generator rank 2, start: no such model\nTraceback: ...")
        self.room.size += self.building
        self.building = 0

    def close(self) -> None:
        self.closed = True


class FakeRoom:
    """A group and the room around it."""

    role = "generator"

    def __init__(self, *, size: int = 2, free: int = 9) -> None:
        self.size = size
        self.free = free
        self.patient = True
        self.broken = False
        self.unfinished = 0
        self.why_fixed = ""
        self.events: list[Any] = []
        self.growths: list[FakeGrowth] = []

    def fixed(self, role: str) -> str:
        return self.why_fixed

    def grow(self, role: str, workers: int) -> FakeGrowth:
        self.events.append(("grow", role, workers))
        self.growths.append(FakeGrowth(self, workers))
        return self.growths[-1]

    def shrink(self, role: str, workers: int) -> None:
        self.events.append(("shrink", role, workers))
        self.size = workers

    def hand_back(self, stay: int) -> int:
        self.events.append(("hand back", stay))
        return self.unfinished

    def receivers_changed(self) -> None:
        self.events.append("receivers changed")


class Course:
    """Iterations of a stage of ten."""

    def __init__(self, folder: Path, **room: int) -> None:
        self.folder = folder
        self.room: Any = FakeRoom(**room)
        self.said: list[str] = []
        self.iteration = 0
        self.scaling = Scaling(folder, "ppo", self.room, self.room, message=self.said.append, done=0, total=10)

    def iterate(self, to: int) -> list[Any]:
        """Runs the iterations up to this one; what happened."""
        self.room.events = []
        while self.iteration < to:
            self.iteration += 1
            self.scaling.begin(self.iteration)
            self.scaling.settle(self.room, self.room)
        events: list[Any] = self.room.events
        return events

    def standing(self) -> Standing:
        found = read_standing(self.folder)
        assert found is not None
        return found


def test_without_a_wish_nothing_happens(tmp_path: Path) -> None:
    course = Course(tmp_path)
    with course.scaling:
        assert course.iterate(3) == []
        assert course.standing() == Standing("ppo", 2, 1, "", True, "")
    assert read_standing(tmp_path) is None
    assert course.said == []


def test_new_ones_join_before_the_sync_and_leaving_ones_hand_back_first(tmp_path: Path) -> None:
    course = Course(tmp_path)
    with course.scaling:
        more = wish_for(tmp_path, stage="ppo", generator=4)
        assert course.iterate(2) == [("grow", "generator", 2), "receivers changed"]
        assert course.standing() == Standing("ppo", 4, 2, more.number, True, "")
        fewer = wish_for(tmp_path, stage="ppo", generator=1)
        course.room.unfinished = 3
        assert course.iterate(4) == [("hand back", 1), ("shrink", "generator", 1), "receivers changed"]
        assert course.standing() == Standing("ppo", 1, 4, fewer.number, True, "")
        same = wish_for(tmp_path, stage="ppo", generator=1)
        assert course.iterate(6) == []
        assert course.standing() == Standing("ppo", 1, 4, same.number, True, "")
    assert course.said == [
        "generator: 2 -> 4 workers from iteration 2",
        "generator: 4 -> 1 workers from iteration 4; 3 unfinished responses begin anew",
    ]


def test_room_that_is_not_there_is_waited_for_and_those_that_have_it_serve_meanwhile(tmp_path: Path) -> None:
    course = Course(tmp_path, free=1)
    with course.scaling:
        wish = wish_for(tmp_path, stage="ppo", generator=5)
        course.iterate(2)
        assert course.room.size == 3
        assert course.standing() == Standing("ppo", 2, 1, wish.number, False, "no room for 2 more")
        course.room.free = 1
        course.iterate(4)
        assert course.room.size == 4
        course.room.patient = False
        course.iterate(5)
        assert course.standing() == Standing("ppo", 4, 4, wish.number, True, "no room for 1 more")
        assert course.iterate(8) == []
    assert course.room.growths[0].closed
    assert course.said == [
        "generator: no room for 2 more. The run goes on",
        "generator: 2 -> 3 workers from iteration 2",
        "generator: 3 -> 4 workers from iteration 4",
        "generator: no room for 1 more. The run goes on",
    ]


def test_a_shortage_that_is_final_is_said_once(tmp_path: Path) -> None:
    course = Course(tmp_path, free=0)
    course.room.patient = False
    with course.scaling:
        wish = wish_for(tmp_path, stage="ppo", generator=3)
        course.iterate(4)
        assert course.standing() == Standing("ppo", 2, 1, wish.number, True, "no room for 1 more")
    assert course.said == ["generator: no room for 1 more. The run goes on"]


def test_a_worker_that_cannot_be_made_ends_nothing(tmp_path: Path) -> None:
    course = Course(tmp_path)
    course.room.broken = True
    with course.scaling:
        wish = wish_for(tmp_path, stage="ppo", generator=3)
        assert course.iterate(3) == [("grow", "generator", 1)]
        note = "a new worker could not be started: generator rank 2, start: no such model"
        assert course.standing() == Standing("ppo", 2, 1, wish.number, True, note)
        course.room.broken = False
        wish_for(tmp_path, stage="ppo", generator=3)
        assert course.iterate(4) == [("grow", "generator", 1), "receivers changed"]
        assert course.standing().note == ""


def test_a_number_that_cannot_change_is_said(tmp_path: Path) -> None:
    course = Course(tmp_path)
    course.room.why_fixed = "they share placement groups with others"
    with course.scaling:
        for wanted in (3, 1):
            wish = wish_for(tmp_path, stage="ppo", generator=wanted)
            assert course.iterate(course.iteration + 1) == []
            note = "they share placement groups with others"
            assert course.standing() == Standing("ppo", 2, 1, wish.number, True, note)


def test_the_end_of_a_stage_ends_what_is_on_its_way(tmp_path: Path) -> None:
    course = Course(tmp_path, free=0)
    with course.scaling:
        wish_for(tmp_path, stage="ppo", generator=5)
        course.iterate(2)
        assert not course.room.growths[0].closed
    assert course.room.growths[0].closed


def test_a_newer_wish_takes_the_place_of_one_that_waits(tmp_path: Path) -> None:
    course = Course(tmp_path, free=0)
    with course.scaling:
        wish_for(tmp_path, stage="ppo", generator=5)
        course.iterate(2)
        wish_for(tmp_path, stage="ppo", generator=1)
        course.iterate(3)
        assert course.room.growths[0].closed
        assert course.room.size == 1


def test_wishes_for_another_stage_and_in_the_last_iteration_are_left(tmp_path: Path) -> None:
    course = Course(tmp_path)
    with course.scaling:
        wish_for(tmp_path, stage="other", generator=5)
        assert course.iterate(9) == []
        wish_for(tmp_path, stage="ppo", generator=5)
        assert course.iterate(10) == []


def test_a_resumed_stage_follows_the_wish_again(tmp_path: Path) -> None:
    wish_for(tmp_path, stage="ppo", generator=3)
    course = Course(tmp_path)
    with course.scaling:
        assert course.iterate(1) == [("grow", "generator", 1), "receivers changed"]


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"stage": "ppo", "generator": 3}', '{"stage": "ppo", "generator": 0, "number": "a"}',
             '{"stage": "ppo", "generator": true, "number": "a"}', '{"stage": 1, "generator": 2, "number": "a"}']
)  # fmt: skip
def test_a_file_that_is_no_wish_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "scale.json").write_text(text)
    assert read_wish(tmp_path) is None


def test_a_wish_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_wish(tmp_path) is None
    wish = wish_for(tmp_path, stage="ppo", generator=3)
    assert read_wish(tmp_path) == wish == Wish("ppo", 3, wish.number)
    assert wish_for(tmp_path, stage="ppo", generator=3) != wish
    assert json.loads((tmp_path / "scale.json").read_text())["generator"] == 3
    assert not is_under_way(tmp_path)
