"""`status.json` in a run's folder: how far the stage under way is and what it does, written anew every few seconds."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlhf_ray.distributed.tracing import DRIVER, Activity, Recorder, Span
from rlhf_ray.trainers.timing import QUESTIONS

FILE = "status.json"
EVERY_S = 5.0
_SETTLED_S = 0.5


@dataclass(frozen=True)
class Slowest:
    """The worker that an iteration waited for.

    Args:
        role: its role.
        rank: its rank.
        method: what it did.
        seconds: its calls of that method, added up.
        others_s: mean of the same over the other workers of the role; None where there is none.
    """

    role: str
    rank: int
    method: str
    seconds: float
    others_s: float | None


@dataclass(frozen=True)
class Status:
    """A stage of a run at one moment; times are Unix seconds of the driver's clock.

    Args:
        stage: its name.
        stages: the names of all stages of the run, in order.
        unit: what it counts, `iteration` or `step`.
        iteration: how many are done.
        total: how many there are.
        outcome: None while it goes on; then `done`, `stopped`, or the name of an error.
        written_s: when this was written.
        progress_s: when the last iteration ended; None before the first of this session.
        metrics: the last iteration's finite metrics.
        active: the calls under way, oldest first.
        slowest: the worker that the last iteration waited for; None before it.
    """

    stage: str
    stages: tuple[str, ...]
    unit: str
    iteration: int
    total: int
    outcome: str | None
    written_s: float
    progress_s: float | None
    metrics: Mapping[str, float]
    active: tuple[Activity, ...]
    slowest: Slowest | None


def slowest_worker(spans: Sequence[Span]) -> Slowest | None:
    """The worker that is furthest behind the others of its role; where no role has several, the one that took longest.

    None where no worker did anything.
    """
    seconds: dict[tuple[str, str], dict[int, float]] = {}
    for span in spans:
        if span.role != DRIVER and span.method not in QUESTIONS:
            ranks = seconds.setdefault((span.role, span.method), {})
            ranks[span.rank] = ranks.get(span.rank, 0.0) + span.end - span.start
    found = []
    for (role, method), ranks in seconds.items():
        rank = max(ranks, key=lambda each: ranks[each])
        others = [value for other, value in ranks.items() if other != rank]
        mean = sum(others) / len(others) if others else None
        found.append(Slowest(role, rank, method, ranks[rank], mean))
    behind = [each for each in found if each.others_s is not None]
    if behind:
        return max(behind, key=lambda each: each.seconds - (each.others_s or 0.0))
    return max(found, key=lambda each: each.seconds, default=None)


def read_status(text: str) -> Status | None:
    """What `status.json` says; None where the text is not of that form."""
    try:
        values: dict[str, Any] = json.loads(text)
        slowest = values["slowest"]
        return Status(
            **values
            | {
                "stages": tuple(values["stages"]),
                "active": tuple(Activity(**each) for each in values["active"]),
                "slowest": None if slowest is None else Slowest(**slowest),
            }
        )
    except (ValueError, TypeError, KeyError):
        return None


class StatusFile:
    """Keeps the file of a stage up to date, from a thread of its own; a context manager.

    Args:
        path: the file.
        stage: the stage's name.
        stages: the names of all stages.
        unit: what it counts.
        total: how many of them.
        recorder: knows the calls under way.
    """

    def __init__(
        self, path: Path, *, stage: str, stages: Sequence[str], unit: str, total: int, recorder: Recorder
    ) -> None:
        self._path = path
        self._recorder = recorder
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._closed = threading.Event()
        self._values: dict[str, Any] = {
            "stage": stage,
            "stages": tuple(stages),
            "unit": unit,
            "iteration": 0,
            "total": total,
            "outcome": None,
            "progress_s": None,
            "metrics": {},
            "slowest": None,
        }
        self._thread = threading.Thread(target=self._write_until_closed, name="status", daemon=True)

    def __enter__(self) -> Self:
        self.write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed.set()
        self._news.set()
        self._thread.join(timeout=EVERY_S)

    def resume(self, iteration: int) -> None:
        """The stage goes on after this iteration."""
        self._values |= {"iteration": iteration}

    def iteration(self, iteration: int, metrics: Mapping[str, float], slowest: Slowest | None) -> None:
        """An iteration has ended."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._values |= {"iteration": iteration, "progress_s": time.time(), "metrics": finite, "slowest": slowest}
        self._news.set()

    def end(self, outcome: str) -> None:
        """The stage has ended like this."""
        self._values |= {"outcome": outcome}
        self.write()

    def write(self) -> None:
        """Replaces the file; one that cannot be written is no reason to end a run."""
        with self._lock, suppress(OSError):
            status = Status(**self._values, written_s=time.time(), active=tuple(self._recorder.active()))
            partial = self._path.with_name(f".{FILE}.partial")
            partial.write_text(json.dumps(asdict(status)), encoding="utf-8")
            os.replace(partial, self._path)

    def _write_until_closed(self) -> None:
        while not self._closed.is_set():
            self._news.wait(EVERY_S)
            self._news.clear()
            # When an iteration has just ended, the calls of the next one are about to be sent.
            self._closed.wait(_SETTLED_S)
            self.write()
