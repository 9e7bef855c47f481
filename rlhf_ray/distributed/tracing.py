"""What each worker did, and when: spans recorded by the groups' verbs."""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """One finished call on one worker; start and end are Unix seconds of the worker's clock."""

    role: str
    rank: int
    method: str
    start: float
    end: float


@dataclass(frozen=True)
class Activity:
    """One call that the driver has sent to a group and not yet seen the end of; since is in Unix seconds."""

    role: str
    method: str
    since: float


class Recorder:
    """Collects spans; safe to read from another thread (the live view)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._active: dict[int, Activity] = {}
        self._spans: list[Span] = []

    def begin(self, role: str, method: str) -> int:
        """Notes a call to a group; gives the number that `finish` takes."""
        number = next(self._numbers)
        with self._lock:
            self._active[number] = Activity(role, method, time.time())
        return number

    def finish(self, number: int, spans: Iterable[Span] = ()) -> None:
        """Ends a call with the spans of its workers (none when it failed)."""
        with self._lock:
            self._active.pop(number, None)
            self._spans.extend(spans)

    def active(self) -> list[Activity]:
        """The calls under way, oldest first."""
        with self._lock:
            return list(self._active.values())

    def drain(self) -> list[Span]:
        """The spans since the last drain, in the order in which the driver saw them end."""
        with self._lock:
            spans, self._spans = self._spans, []
        return spans


def seconds_by_method(spans: Iterable[Span]) -> dict[tuple[str, str], float]:
    """(role, method) -> seconds of the slowest rank, its calls added up."""
    seconds: dict[tuple[str, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for span in spans:
        seconds[span.role, span.method][span.rank] += span.end - span.start
    return {key: max(by_rank.values()) for key, by_rank in seconds.items()}


def busy_seconds(spans: Iterable[Span]) -> dict[str, float]:
    """role -> seconds in calls, added up over its workers; divide by workers and wall time for the busy share."""
    seconds: dict[str, float] = defaultdict(float)
    for span in spans:
        seconds[span.role] += span.end - span.start
    return dict(seconds)
