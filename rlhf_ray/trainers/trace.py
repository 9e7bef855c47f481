"""`trace.json`: every call of a run in the Trace Event Format, which ui.perfetto.dev and chrome://tracing open.

One process per role, one thread per rank; the driver has a thread for what it says it does and one for the time between
its calls. The file is valid JSON after every write, and a run that was killed goes on with it. Times are Unix
microseconds of each worker's own clock. What a killed session did after its last checkpoint stays: it took place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_ray.distributed.tracing import DRIVER, Span
from rlhf_ray.trainers.durable import write_file
from rlhf_ray.trainers.timing import QUESTIONS

FILE = "trace.json"
LIMIT_BYTES = 64 << 20
"""Beyond this the older half of the calls is dropped; at 200 bytes a call that is more than 150,000 calls."""

_HEAD, _TAIL = b"[\n", b"\n]\n"
_DRIVER_THREADS = ("loop", "between calls")


class TraceFile:
    """The trace of a run, open to append to."""

    def __init__(self, path: Path, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._processes: dict[str, int] = {}
        self._threads: set[tuple[int, int]] = set()
        self._end = 0
        events = list(_events(path))
        for _, event in events:
            if event["name"] == "process_name":
                self._processes[event["args"]["name"]] = event["pid"]
            elif event["name"] == "thread_name":
                self._threads.add((event["pid"], event["tid"]))
        self._replace([line for line, _ in events])

    def write(self, stage: str, spans: Iterable[Span]) -> None:
        """Appends the calls of a stage, in one write."""
        lines = [line for span in spans if span.method not in QUESTIONS for line in self._described(stage, span)]
        if not lines:
            return
        text = ",\n".join(lines).encode()
        self._file.seek(self._end)
        self._file.write((b"" if self._end == len(_HEAD) else b",\n") + text + _TAIL)
        self._file.flush()
        self._end = self._file.tell() - len(_TAIL)
        if self._end > self._limit_bytes:
            self._drop_older_half()

    def sync(self) -> None:
        """Waits until everything is on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the file."""
        self.sync()
        self._file.close()

    def _described(self, stage: str, span: Span) -> Iterator[str]:
        pid = self._processes.get(span.role)
        if pid is None:
            pid = self._processes[span.role] = len(self._processes)
            yield _name("process_name", pid, 0, span.role)
        if (pid, span.rank) not in self._threads:
            self._threads.add((pid, span.rank))
            is_driver = span.role == DRIVER
            yield _name("thread_name", pid, span.rank, _DRIVER_THREADS[span.rank] if is_driver else f"rank {span.rank}")
        start, end = round(span.start * 1e6), round(span.end * 1e6)
        counts = {"tokens": span.tokens, "bytes": span.nbytes, "cpu_s": round(span.cpu_s, 6), "place": span.place}
        yield json.dumps(
            {
                "ph": "X",
                "name": span.method,
                "cat": stage,
                "pid": pid,
                "tid": span.rank,
                "ts": start,
                "dur": max(end - start, 0),
                "args": {"stage": stage, "iteration": span.iteration} | {k: v for k, v in counts.items() if v},
            }
        )

    def _drop_older_half(self) -> None:
        events = list(_events(self._path))
        names = [line for line, event in events if event["ph"] == "M"]
        calls = [line for line, event in events if event["ph"] != "M"]
        self._file.close()
        self._replace(names + calls[len(calls) // 2 :])

    def _replace(self, lines: Sequence[str]) -> None:
        """The file anew with these events, whole."""
        content = _HEAD + ",\n".join(lines).encode()

        def write(partial: Path) -> None:
            partial.write_bytes(content + _TAIL)

        write_file(self._path, write)
        self._file = self._path.open("r+b")
        self._end = len(content)


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace in order, names included; none where there is no file; torn lines are left out."""
    return [event for _, event in _events(path)]


def _events(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each event, after its line."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            text = line.strip().removesuffix(",")
            if text.startswith("{"):
                with suppress(ValueError):
                    yield text, json.loads(text)


def _name(what: str, pid: int, tid: int, name: str) -> str:
    return json.dumps({"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}})
