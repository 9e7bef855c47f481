"""What each worker did, and when: spans recorded by the groups' verbs, and by the driver around its own work."""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

DRIVER = "driver"
"""The role of the driver's own spans: rank 0 has what it says it does, rank 1 the time between its calls."""
BETWEEN_CALLS = "between calls"
_SHORTEST_GAP_S = 0.0005


@dataclass(frozen=True)
class Span:
    """One finished call on one worker.

    Args:
        role: the worker's role, or DRIVER.
        rank: its rank.
        method: the method, or what the driver did.
        start: Unix seconds of the worker's own clock; clocks of several nodes are taken as they are.
        end: likewise.
        iteration: the iteration that the call was made for; 0 before the first.
        tokens: tokens that the worker sampled or read; 0 where the call is not about tokens.
        nbytes: bytes of weights that it sent or received.
        cpu_s: CPU seconds of the worker's process meanwhile.
        place: node and GPU of the worker, where the span says that.
    """

    role: str
    rank: int
    method: str
    start: float
    end: float
    iteration: int = 0
    tokens: int = 0
    nbytes: int = 0
    cpu_s: float = 0.0
    place: str = ""


@dataclass(frozen=True)
class Activity:
    """One call that the driver has sent to a group and not yet seen the end of; since is in Unix seconds."""

    role: str
    method: str
    since: float
    workers: int = 1


class Recorder:
    """Collects spans; safe to read from another thread (the live view).

    `iteration` is the one under way, which calls and the driver's work are noted for; the trainer's run sets it.
    """

    def __init__(self) -> None:
        self.iteration = 0
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._active: dict[int, Activity] = {}
        self._spans: list[Span] = []
        self._quiet_since = time.time()

    def begin(self, role: str, method: str, *, workers: int = 1) -> int:
        """Notes a call to some workers of a group; gives the number that `finish` takes."""
        number, now = next(self._numbers), time.time()
        with self._lock:
            if not self._active and now - self._quiet_since >= _SHORTEST_GAP_S:
                self._spans.append(Span(DRIVER, 1, BETWEEN_CALLS, self._quiet_since, now, self.iteration))
            self._active[number] = Activity(role, method, now, workers)
        return number

    def finish(self, number: int, spans: Iterable[Span] = ()) -> None:
        """Ends a call with the spans of its workers (none when it failed)."""
        with self._lock:
            if self._active.pop(number, None) is not None and not self._active:
                self._quiet_since = time.time()
            self._spans.extend(spans)

    @contextmanager
    def driver(self, what: str) -> Iterator[None]:
        """Notes what the driver does within; uses may be nested."""
        start, cpu, iteration = time.time(), time.process_time(), self.iteration
        yield
        span = Span(DRIVER, 0, what, start, time.time(), iteration, cpu_s=time.process_time() - cpu)
        with self._lock:
            self._spans.append(span)

    def active(self) -> list[Activity]:
        """The calls under way, oldest first."""
        with self._lock:
            return list(self._active.values())

    def drain(self) -> list[Span]:
        """The spans since the last drain, in the order in which the driver saw them end."""
        with self._lock:
            spans, self._spans = self._spans, []
        return spans


def places_by_role(spans: Iterable[Span]) -> list[str]:
    """A line for each role of where its workers are; none where all are on one machine without a GPU."""
    places: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for span in spans:
        if span.place:
            places[span.role][span.place].append(span.rank)
    if all("no GPU" in place for found in places.values() for place in found) and (
        len({place for found in places.values() for place in found}) < 2
    ):
        return []
    return [
        f"{role} " + "; ".join(f"{', '.join(map(str, ranks))}: {place}" for place, ranks in found.items())
        for role, found in places.items()
    ]


def seconds_by_method(spans: Iterable[Span]) -> dict[tuple[str, str], float]:
    """(role, method) -> seconds of the slowest rank, its calls added up."""
    seconds: dict[tuple[str, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for span in spans:
        seconds[span.role, span.method][span.rank] += span.end - span.start
    return {key: max(by_rank.values()) for key, by_rank in seconds.items()}


def covered_seconds(intervals: Iterable[tuple[float, float]], *, start: float, end: float) -> float:
    """Seconds between start and end in at least one of the (start, end) intervals."""
    covered, reached = 0.0, start
    for begun, ended in sorted(intervals):
        begun, ended = max(begun, reached), min(ended, end)
        if ended > begun:
            covered += ended - begun
            reached = ended
    return covered
