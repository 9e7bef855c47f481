"""Generators that come and go while a run goes on: the number of them follows the wish in the run's folder.

    with Scaling(...) as scaling:                 # while it is open, `rlhf-ray scale` finds a stage that follows it
        for iteration in ...:
            scaling.begin(iteration)              # reads the wish; new generators are made meanwhile
            ...                                   # sample, judge, learn
            samples.wait()
            scaling.settle(samples, weights)      # they join, or leave and hand back what they have not finished
            weights.sync(version=iteration)       # all of them hold and attest the weights before they serve

Which generator samples a response decides nothing about it, so the run's result does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rlhf_ray.distributed.groups import WorkerGroup
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.trainers.sampling import SampleStream
from rlhf_ray.trainers.scale_file import ROLE, Standing, Wish, read_wish, remove_standing, write_standing
from rlhf_ray.trainers.weight_sync import WeightSync
from rlhf_ray.workers.generator import Generator


class Growth(Protocol):
    """Further workers on their way into a group, see `placement.Growth`."""

    @property
    def missing(self) -> int:
        """Workers for which there is no room so far."""

    @property
    def waits(self) -> bool:
        """Whether more workers may come."""

    def shortage(self) -> str:
        """What is missing, in words."""

    def build(self) -> None:
        """Starts the workers for which there is room by now."""

    def join(self) -> None:
        """Waits until they are made, and puts them into the group."""

    def close(self) -> None:
        """Ends what is on its way."""


class Room(Protocol):
    """Where workers are placed, see `placement.Placement`."""

    def fixed(self, role: str) -> str:
        """Why the number of a role's workers cannot change; empty where it can."""

    def grow(self, role: str, workers: int) -> Growth:
        """Asks for room for further workers."""

    def shrink(self, role: str, workers: int) -> None:
        """Ends all but the first workers."""


class Scaling:
    """Lets the number of a stage's generators follow the wish in the run's folder.

    Args:
        folder: the run's folder.
        stage: name of the stage.
        group: its generators.
        room: where they are placed.
        message: tells a person.
        done: iterations that are done when it starts.
        total: iterations of the whole stage; nothing is started in the last one.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        group: WorkerGroup[Generator],
        room: Room,
        *,
        message: Callable[[str], None],
        done: int,
        total: int,
    ) -> None:
        self._folder = folder
        self._stage = stage
        self._group = group
        self._room = room
        self._message = message
        self._iteration = done
        self._total = total
        self._since = done + 1
        self._wish: Wish | None = None
        self._settled = True
        self._note = ""
        self._growth: Growth | None = None

    def __enter__(self) -> Self:
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_up()
        remove_standing(self._folder)

    def begin(self, iteration: int) -> None:
        """Takes note of a new wish, and starts the generators that are missing and have room."""
        self._iteration = iteration
        if iteration == self._total:
            return
        wish = read_wish(self._folder)
        if wish is not None and wish.stage == self._stage and wish != self._wish:
            self._give_up()
            self._wish, self._settled, self._note = wish, False, ""
            if fixed := self._room.fixed(ROLE):
                self._settled = True
                self._say(fixed)
                self._write()
            elif wish.generator > self._group.size:
                self._growth = self._room.grow(ROLE, wish.generator - self._group.size)
        if self._growth is not None:
            self._growth.build()
            if self._growth.missing and not self._note:
                self._say(self._growth.shortage())
                self._write()

    def settle(self, samples: SampleStream, weights: WeightSync) -> None:
        """The generators that were started join, those that are too many leave; a weight sync has to follow.

        What goes wrong with new ones ends nothing: the run goes on with those that it has.
        """
        if self._wish is None or self._settled:
            return
        before, wanted, note, moved = self._group.size, self._wish.generator, "", 0
        if wanted < before:
            moved = samples.hand_back(stay=wanted)
            self._room.shrink(ROLE, wanted)
        elif self._growth is not None:
            try:
                self._growth.join()
            except RlhfRayError as error:
                note = f"a new worker could not be started: {str(error).splitlines()[0]}"
            if note or not self._growth.waits:
                note = note or (self._growth.shortage() if self._growth.missing else "")
                self._give_up()
        if self._group.size != before:
            self._since = self._iteration + 1
            weights.receivers_changed()
            change = f"{ROLE}: {before} -> {self._group.size} workers from iteration {self._since}"
            self._message(f"{change}; {moved} unfinished responses begin anew" if moved else change)
        if self._growth is None:
            self._settled = True
            if note != self._note:
                self._say(note)
            self._write()

    def _say(self, note: str) -> None:
        self._note = note
        if note:
            self._message(f"{ROLE}: {note}. The run goes on")

    def _give_up(self) -> None:
        """Forgets generators that are on their way."""
        if self._growth is not None:
            self._growth.close()
        self._growth = None

    def _write(self) -> None:
        number = "" if self._wish is None else self._wish.number
        standing = Standing(self._stage, self._group.size, self._since, number, self._settled, self._note)
        write_standing(self._folder, standing)
