"""The timeline of an iteration: who ran what, and when."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.distributed.tracing import DRIVER, covered_seconds
from rlhf_ray.report.history import RunHistory
from rlhf_ray.trainers.timing import SAMPLING

SHOWN_ITERATIONS = 24
MOST_CALLS = 3000
START = "start"
"""The label of what lies before a stage's first iteration of the last session."""


@dataclass(frozen=True)
class _Interval:
    label: str
    start: float
    end: float


def timelines(run: RunHistory) -> dict[str, list[dict[str, Any]]]:
    """Each stage's iterations, as the page's script takes them: rows, and calls as seconds from its beginning.

    Some iterations of a long stage are shown: first, last, and evenly chosen ones between.
    """
    roles = {event["pid"]: event["args"]["name"] for event in run.events if event["name"] == "process_name"}
    calls = [event for event in run.events if event["ph"] == "X" and event["pid"] in roles]
    found = {}
    for stage in run.stages:
        own = sorted((event for event in calls if event["cat"] == stage.name), key=lambda event: event["ts"])
        found[stage.name] = [_iteration(own, roles, interval) for interval in _intervals(own, roles)]
    return found


def _intervals(calls: Sequence[dict[str, Any]], roles: dict[int, str]) -> list[_Interval]:
    """The start of the stage and the chosen iterations; of an iteration that was repeated after a kill, the last."""
    whole = [call for call in calls if roles[call["pid"]] == DRIVER and call["name"] == "iteration"]
    by_number = {call["args"]["iteration"]: call for call in whole}
    numbers = sorted(by_number)
    if not numbers:
        return []
    stride = max(1, -(-len(numbers) // SHOWN_ITERATIONS))
    chosen = sorted({numbers[0], *numbers[::-1][::stride]})
    intervals = [
        _Interval(
            str(number), by_number[number]["ts"] / 1e6, (by_number[number]["ts"] + by_number[number]["dur"]) / 1e6
        )
        for number in chosen
    ]
    first = by_number[numbers[0]]["ts"]
    before = [call for call in calls if call["ts"] + call["dur"] <= first and call["name"] != "iteration"]
    if before:
        intervals.insert(0, _Interval(START, before[0]["ts"] / 1e6, first / 1e6))
    return intervals


def _iteration(calls: Sequence[dict[str, Any]], roles: dict[int, str], interval: _Interval) -> dict[str, Any]:
    within = [
        call
        for call in calls
        if call["ts"] / 1e6 < interval.end
        and (call["ts"] + call["dur"]) / 1e6 > interval.start
        and not (roles[call["pid"]] == DRIVER and call["name"] == "iteration")
    ]
    # The longest ones, where there are too many to draw.
    within = sorted(within, key=lambda call: -call["dur"])[:MOST_CALLS]
    ranks: dict[str, set[int]] = defaultdict(set)
    for call in within:
        ranks[roles[call["pid"]]].add(call["tid"])
    rows: list[str] = []
    shown = []
    for call in sorted(within, key=lambda call: (roles[call["pid"]] != DRIVER, call["ts"])):
        role = roles[call["pid"]]
        row = role if role == DRIVER or len(ranks[role]) == 1 else f"{role} {call['tid']}"
        if row not in rows:
            rows.append(row)
        args = call["args"]
        start, seconds = call["ts"] / 1e6 - interval.start, call["dur"] / 1e6
        counts = [args.get(name, 0) for name in ("tokens", "bytes", "cpu_s")]
        name = "generate" if call["name"] in SAMPLING else call["name"]
        shown.append([rows.index(row), name, round(start, 5), round(seconds, 5), *counts, args["iteration"]])
    workers = [(call["ts"] / 1e6, (call["ts"] + call["dur"]) / 1e6) for call in within if roles[call["pid"]] != DRIVER]
    seconds = interval.end - interval.start
    busy = covered_seconds(workers, start=interval.start, end=interval.end)
    return {
        "label": interval.label,
        "seconds": round(seconds, 4),
        "idle": round(1 - busy / seconds, 4) if seconds > 0 else 0.0,
        "rows": rows,
        "calls": shown,
    }
