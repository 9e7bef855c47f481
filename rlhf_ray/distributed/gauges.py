"""A run's metrics on Ray's metrics endpoint, where Prometheus and Ray's dashboard find them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ray.util.metrics import Gauge

PREFIX = "rlhf_ray_"
"""Stands before every name; on the endpoint Ray puts its own `ray_` before it."""
_TAGS = ("run", "stage")


class RayGauges:
    """Publishes the newest row of a stage's metrics from this process, one gauge for each metric.

    A tracker of `trainers.metrics`. To be written to while connected to Ray; Ray sends the values on every ten seconds
    or so, for as long as this process lives.

    Args:
        run: the run's name, the tag `run` of every gauge.
        stage: the stage's name, the tag `stage`.
    """

    def __init__(self, *, run: str, stage: str) -> None:
        self._tags = {"run": run, "stage": stage}
        self._gauges: dict[str, Gauge] = {}

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Sets every metric's gauge, and `rlhf_ray_iteration`; a metric that the row lacks keeps its last value."""
        for name, value in {"iteration": iteration, **metrics}.items():
            self._gauge(name).set(float(value))

    def write_histogram(self, iteration: int, name: str, values: Sequence[float]) -> None:
        """Nothing: the endpoint has numbers only."""

    def flush(self) -> None:
        """Nothing: Ray sends on its own."""

    def close(self) -> None:
        """Nothing: the last values stay until the process ends."""

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            gauge = Gauge(gauge_name(name), description=f"{name} of metrics.jsonl", tag_keys=_TAGS)
            gauge.set_default_tags(self._tags)
            self._gauges[name] = gauge
        return self._gauges[name]


def gauge_name(metric: str) -> str:
    """The gauge of a metric: `kl/per_sequence` becomes `rlhf_ray_kl_per_sequence`."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", metric)
