"""A run's metrics on Ray's metrics endpoint, where Prometheus and Ray's dashboard find them."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping, Sequence

from ray.util.metrics import Gauge

PREFIX = "rlhf_ray_"
"""Stands before every name; on the endpoint Ray puts its own `ray_` before it."""
OWN = ("iteration", "not_finite")
"""What is published besides the metrics: the row's iteration, and how many of its metrics are NaN or infinite."""
_TAGS = ("run", "stage")
# Ray forgets a gauge that was not set for twenty seconds; an iteration may take longer.
_REPEAT_S = 5.0
_STOP_S = 5.0


class RayGauges:
    """Publishes the newest row of a stage's metrics from this process, one gauge for each metric.

    A tracker of `trainers.metrics`. To be written to while connected to Ray; until it is closed, a thread repeats the
    values. The endpoint takes finite numbers only: a metric that is not one is missing there until it is one again.

    Args:
        run: the run's name, the tag `run` of every gauge.
        stage: the stage's name, the tag `stage`.
    """

    def __init__(self, *, run: str, stage: str) -> None:
        self._tags = {"run": run, "stage": stage}
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[str, float] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Sets every metric's gauge and those of `OWN`; a metric that the row lacks keeps its last value."""
        with self._lock:
            self._values |= {name: float(value) for name, value in metrics.items()}
            wrong = [name for name, value in self._values.items() if not math.isfinite(value)]
            for name in wrong:
                del self._values[name]
            self._values |= {"iteration": float(iteration), "not_finite": float(len(wrong))}
        self.repeat()
        if self._thread is None:
            self._thread = threading.Thread(target=self._repeat_until_closed, name="gauges", daemon=True)
            self._thread.start()

    def repeat(self) -> None:
        """Sets every gauge to its value again."""
        with self._lock:
            for name, value in self._values.items():
                self._gauge(name).set(value)

    def write_histogram(self, iteration: int, name: str, values: Sequence[float]) -> None:
        """Nothing: the endpoint has numbers only."""

    def flush(self) -> None:
        """Nothing: Ray sends on its own."""

    def close(self) -> None:
        """Lets the values go: some twenty seconds later they are no longer on the endpoint."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=_STOP_S)

    def _repeat_until_closed(self) -> None:
        while not self._closed.wait(_REPEAT_S):
            self.repeat()

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            gauge = Gauge(gauge_name(name), description=f"{name} of metrics.jsonl", tag_keys=_TAGS)
            gauge.set_default_tags(self._tags)
            self._gauges[name] = gauge
        return self._gauges[name]


def gauge_name(metric: str) -> str:
    """The gauge of a metric: `kl/per_sequence` becomes `rlhf_ray_kl_per_sequence`."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", metric)
