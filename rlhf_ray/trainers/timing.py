"""Where an iteration's time went: seconds per phase, rates, busy and idle shares, from the spans of its calls."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.distributed.supervision import waited_seconds
from rlhf_ray.distributed.tracing import DRIVER, Activity, Span, covered_seconds, seconds_by_method

QUESTIONS = ("memory", "counts")
"""What workers are asked for metrics, which is no phase of an iteration."""
SAMPLING = ("generate", "next_finished")
"""Calls that sample responses."""
# Calls that pass over an iteration's tokens; the policy's rate is that of learning, not of its log-probabilities.
_RATED = (*SAMPLING, "score", "logprobs", "answer_logprobs", "update")
_NO_RATE = (("policy", "logprobs"),)


@dataclass(frozen=True)
class Window:
    """The time of one iteration.

    Args:
        start: Unix seconds, comparable with spans.
        seconds: its length.
        cpu_s: CPU seconds of the driver's process in it.
        waited_s: seconds in which the driver only waited for workers.
    """

    start: float
    seconds: float
    cpu_s: float
    waited_s: float = 0.0

    @property
    def end(self) -> float:
        return self.start + self.seconds


class Stopwatch:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._start, self._monotonic, self._cpu = time.time(), time.monotonic(), time.process_time()
        self._waited = waited_seconds()

    def read(self) -> Window:
        """From the start until now."""
        seconds, cpu_s = time.monotonic() - self._monotonic, time.process_time() - self._cpu
        return Window(self._start, seconds, cpu_s, waited_seconds() - self._waited)


def span_metrics(
    spans: Sequence[Span], active: Sequence[Activity], window: Window, *, evaluation_s: float = 0.0
) -> dict[str, float]:
    """Times, rates and shares from the calls of one iteration.

    Args:
        spans: the calls that ended in it, an evaluation's left out.
        active: the calls under way at its end, which count as busy from when they were sent.
        window: the iteration.
        evaluation_s: seconds of it that an evaluation took.

    Returns:
        `time/iteration_s`; `time/<phase>_s` (of the slowest worker); `<role>/busy_share` (mean over its workers) and
        `time/idle_share` (no worker ran anything), both of the iteration without its evaluation;
        `<role>/tokens_per_s`: sampled tokens for the generator, prompt and response for the others;
        `driver/busy_share`: of the whole iteration, when the driver did anything but wait for workers; and
        `driver/cpu_share`, the driver's CPU seconds per second.
    """
    calls = [span for span in spans if span.role != DRIVER]
    metrics: dict[str, float] = {}
    for (role, method), seconds in seconds_by_method(calls).items():
        if method in QUESTIONS:
            continue
        name = f"time/{phase_name(role, method)}_s"
        metrics[name] = metrics.get(name, 0.0) + seconds
        tokens = sum(span.tokens for span in calls if (span.role, span.method) == (role, method))
        if tokens and seconds > 0 and (role, method) not in _NO_RATE and method in _RATED:
            metrics[f"{role}/tokens_per_s"] = tokens / seconds
    busy: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for span in calls:
        busy[span.role][span.rank].append((span.start, span.end))
    for activity in active:
        for rank in range(activity.workers):
            busy[activity.role][rank].append((activity.since, window.end))
    wall_s = max(window.seconds - evaluation_s, 1e-9)

    def share(intervals: Sequence[tuple[float, float]]) -> float:
        return min(covered_seconds(intervals, start=window.start, end=window.end) / wall_s, 1.0)

    for role, ranks in busy.items():
        metrics[f"{role}/busy_share"] = sum(map(share, ranks.values())) / len(ranks)
    everything = [interval for ranks in busy.values() for intervals in ranks.values() for interval in intervals]
    metrics["time/idle_share"] = 1.0 - share(everything)
    metrics["time/iteration_s"] = window.seconds
    metrics["driver/busy_share"] = 1.0 - min(window.waited_s / max(window.seconds, 1e-9), 1.0)
    metrics["driver/cpu_share"] = window.cpu_s / max(window.seconds, 1e-9)
    return metrics


def phase_name(role: str, method: str) -> str:
    """`generate` for the generators' sampling, else role and method: `policy_update`."""
    return "generate" if method in SAMPLING else f"{role}_{method}".replace("/", "_")
