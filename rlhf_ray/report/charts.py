"""Which charts a report has: metrics over iterations, several runs in one chart."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_ray.report.history import StageHistory

MOST_POINTS = 1500
"""Points of a line; of longer ones every so many are shown."""


@dataclass(frozen=True)
class Chart:
    """What one chart shows.

    Args:
        title: what is measured.
        unit: of the vertical axis.
        metrics: (metric, its label), the first one drawn strongest.
        spread: metric whose distance below and above the first one is shaded.
        scale: `log` for a logarithmic axis, `share` for one from 0 to 100 %.
    """

    title: str
    unit: str
    metrics: tuple[tuple[str, str], ...]
    spread: str | None = None
    scale: str = "linear"


CHARTS = (
    Chart(
        "Reward",
        "score",
        (("reward/mean", "training samples"), ("evaluation/reward_mean", "held-out prompts")),
        spread="reward/std",
    ),
    Chart("KL to the reference", "nats per response", (("kl/per_sequence", "training samples"),)),
    Chart("Loss", "nats", (("policy/loss", "training"), ("evaluation/loss", "held-out"))),
    Chart("Held-out accuracy", "share of pairs", (("evaluation/accuracy", "held-out pairs"),), scale="share"),
    Chart("Margin of the pairs", "reward", (("dpo/margin_mean", "training"), ("evaluation/margin_mean", "held-out"))),
    Chart(
        "Response length",
        "tokens",
        (("response/length_mean", "training samples"), ("evaluation/length_mean", "held-out prompts")),
    ),
    Chart(
        "Generator and learner differ by",
        "nats per token",
        (("generator/logprob_diff_mean", "mean"), ("generator/logprob_diff_max", "largest")),
        scale="log",
    ),
    Chart("Policy loss", "", (("policy/surrogate", "surrogate"),)),
    Chart("Critic loss", "", (("critic/loss", "training"),)),
    Chart("Critic's explained variance", "share", (("critic/explained_variance", "training"),)),
    Chart("Entropy", "nats per token", (("policy/entropy", "training"),)),
    Chart("Responses that end by themselves", "share", (("response/finished_share", "training"),), scale="share"),
    Chart("Clipped tokens", "share", (("policy/clip_fraction", "training"),)),
    Chart("Gradient norm", "", (("policy/grad_norm", "policy"), ("critic/grad_norm", "critic"))),
    Chart("KL coefficient", "", (("kl/coefficient", "training"),)),
    Chart("Learning rate", "", (("policy/learning_rate", "policy"), ("critic/learning_rate", "critic"))),
)
_PART = re.compile(r"evaluation/(\w+)_mean|reward/(\w+)_mean")
# Names of that form that are no scorer's.
_NO_PARTS = {"reward", "length", "margin", "shaped"}


def learning_charts(stages: Sequence[tuple[int, StageHistory]]) -> list[dict[str, Any]]:
    """The charts of one stage of several runs, as the page's script takes them.

    Args:
        stages: number of the run, and its history of the stage.
    """
    charts = [*CHARTS]
    parts = _parts([stage for _, stage in stages])
    if len(parts) > 1:
        metrics = [(f"evaluation/{part}_mean", f"{part}, held-out") for part in parts]
        metrics += [(f"reward/{part}_mean", part) for part in parts]
        charts.insert(2, Chart("Each scorer's mean", "score", tuple(metrics)))
    if any(stage.values("policy/surrogate") for _, stage in stages):
        charts = [chart for chart in charts if chart.title != "Loss"]
    return [found for chart in charts if (found := _with_points(chart, stages))["series"]]


def share_charts(stages: Sequence[tuple[int, StageHistory]]) -> list[dict[str, Any]]:
    """Busy and idle shares over the iterations of one stage, and its pace."""
    busy = {name for _, stage in stages for row in stage.rows for name in row if name.endswith("/busy_share")}
    roles = sorted(name.removesuffix("/busy_share") for name in busy)
    charts = (
        Chart("Busy", "share of an iteration", tuple((f"{role}/busy_share", role) for role in roles), scale="share"),
        Chart(
            "Idle, and the driver's own CPU",
            "share of an iteration",
            (("time/idle_share", "no worker runs"), ("driver/cpu_share", "CPU of the driver")),
            scale="share",
        ),
        Chart("Time of an iteration", "seconds", (("time/iteration_s", "iteration"),)),
        Chart(
            "Tokens per second",
            "tokens/s",
            tuple((f"{role}/tokens_per_s", role) for role in roles),
            scale="log",
        ),
    )
    return [found for chart in charts if (found := _with_points(chart, stages))["series"]]


def _parts(stages: Sequence[StageHistory]) -> list[str]:
    """Names of the scorers that have a mean of their own."""
    names = {name for stage in stages for row in stage.rows for name in row}
    scorers = {match[2] for name in names if (match := _PART.fullmatch(name)) and match[2]}
    return sorted(scorers - _NO_PARTS)


def _with_points(chart: Chart, stages: Sequence[tuple[int, StageHistory]]) -> dict[str, Any]:
    series = []
    for run, stage in stages:
        for place, (metric, label) in enumerate(chart.metrics):
            points = stage.values(metric)
            if not points or not any(value for _, value in points):
                continue
            spread = dict(stage.values(chart.spread)) if chart.spread and place == 0 else {}
            kept = _thinned(points)
            series.append(
                {
                    "run": run,
                    "place": place,
                    "label": label,
                    "sparse": len(points) < len(stage.rows) * 0.7,
                    "x": [iteration for iteration, _ in kept],
                    "y": [_short(value) for _, value in kept],
                    "spread": [_short(spread.get(iteration, 0.0)) for iteration, _ in kept] if spread else [],
                }
            )
    shown = asdict(chart)
    del shown["metrics"], shown["spread"]
    return shown | {"series": series}


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about MOST_POINTS of them, the last one among them."""
    stride = math.ceil(len(points) / MOST_POINTS)
    return points if stride <= 1 else points[(len(points) - 1) % stride :: stride]


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
