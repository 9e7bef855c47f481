"""What a run's folder tells: its stages with their metrics, its calls, its samples and its settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from rlhf_ray.config.load import CONFIG_FILE
from rlhf_ray.errors import ConfigError
from rlhf_ray.trainers.metric_rows import PLAN_FILE, read_metrics
from rlhf_ray.trainers.model_card import redact
from rlhf_ray.trainers.trace import FILE as TRACE
from rlhf_ray.trainers.trace import read_trace

SHOWN_SAMPLES = 8


@dataclass(frozen=True)
class Sample:
    """One response; the score is NaN where there was none."""

    prompt: str
    response: str
    score: float


@dataclass(frozen=True)
class Samples:
    """Samples from the beginning and the end of a stage.

    Args:
        kind: `evaluation`, where both sides answer the same prompts in the same order, or `rollouts`.
        first: the iteration of `before`.
        last: the iteration of `after`.
        total: prompts in the last file, of which only some are here.
    """

    kind: str
    first: int
    last: int
    total: int
    before: list[Sample]
    after: list[Sample]


@dataclass(frozen=True)
class StageHistory:
    """One stage.

    Args:
        rows: its rows of metrics.jsonl.
        elapsed_s: seconds spent in it; None while it is not done.
        samples: None where it keeps none.
        planned_gib: peak memory of one worker of each role as it was planned; empty where it was not.
    """

    name: str
    method: str
    rows: list[dict[str, Any]]
    elapsed_s: float | None
    samples: Samples | None
    planned_gib: dict[str, float]

    @property
    def iteration(self) -> int:
        """The last iteration that ended."""
        return int(self.rows[-1]["iteration"])

    def values(self, metric: str) -> list[tuple[int, float]]:
        """(iteration, value) of every row that has a number for the metric."""
        return [(row["iteration"], row[metric]) for row in self.rows if isinstance(row.get(metric), int | float)]


@dataclass(frozen=True)
class RunHistory:
    """One run.

    Args:
        name: its folder's name.
        stages: those that have metrics, in the order in which they ran.
        planned: names of all stages of the pipeline.
        events: of its trace.
        settings: the resolved config, what looks like a secret taken out.
    """

    name: str
    path: Path
    stages: tuple[StageHistory, ...]
    planned: tuple[str, ...]
    events: list[dict[str, Any]]
    settings: dict[str, Any]

    @property
    def is_done(self) -> bool:
        return all(stage.elapsed_s is not None for stage in self.stages) and len(self.stages) == len(self.planned)


def read_run(path: Path) -> RunHistory:
    """The history of a run, finished or not.

    Raises:
        ConfigError: the folder holds no run, cannot be read, or has no metrics yet.
    """
    wanted = "wanted the run_dir of a `rlhf-ray run`"
    if not (path / CONFIG_FILE).is_file():
        what = f"holds no run (no {CONFIG_FILE})" if path.is_dir() else "is a file" if path.exists() else "is no folder"
        raise ConfigError(f"{path} {what}; {wanted}")
    try:
        rows = read_metrics(path)
        events = read_trace(path / TRACE)
        settings = yaml.safe_load((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}; {wanted}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path / CONFIG_FILE}: is damaged: {error}; {wanted}") from error
    if not rows:
        raise ConfigError(f"{path} has no metrics yet: no iteration has ended; try again when one has")
    methods, planned = _methods(settings), _planned_gib(path / PLAN_FILE)
    names = list(dict.fromkeys(row["stage"] for row in rows))
    stages = tuple(
        StageHistory(
            name=name,
            method=methods.get(name, name),
            rows=[row for row in rows if row["stage"] == name],
            elapsed_s=_elapsed_s(path / name / "done.json"),
            samples=_samples(path / name),
            planned_gib=planned.get(name, {}),
        )
        for name in names
    )
    return RunHistory(
        name=path.resolve().name,
        path=path,
        stages=stages,
        planned=tuple(methods) or tuple(names),
        events=events,
        settings=redact(settings) if isinstance(settings, dict) else {},
    )


def _planned_gib(path: Path) -> dict[str, dict[str, float]]:
    """Stage -> role -> GiB; none where nothing was planned, or the file is damaged."""
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        return {stage: dict(planned["memory_gib"]) for stage, planned in stages.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _methods(settings: Any) -> dict[str, str]:
    """Stage -> method; none where the config is not one of a pipeline."""
    stages = settings.get("stages") if isinstance(settings, dict) else None
    found = [stage for stage in stages or () if isinstance(stage, dict)]
    return {str(stage["name"]): str(stage["method"]) for stage in found if {"name", "method"} <= stage.keys()}


def _elapsed_s(done: Path) -> float | None:
    try:
        return float(json.loads(done.read_text(encoding="utf-8"))["elapsed_s"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _samples(stage: Path) -> Samples | None:
    """From the first and last evaluation; where there is only one, or none, from the first and last rollouts."""
    for kind in ("evaluation", "rollouts"):
        files = sorted((stage / kind).glob("iteration_*.parquet"))
        if len(files) < 2:
            continue
        try:
            before, after = _read_samples(files[0]), _read_samples(files[-1])
        except (OSError, pa.ArrowException, KeyError, ValueError):
            continue
        first, last = (int(file.stem.removeprefix("iteration_")) for file in (files[0], files[-1]))
        total = len(after)
        if kind == "evaluation":
            both = [prompt for prompt in after if prompt in before]
            before, after = ({prompt: samples[prompt] for prompt in both} for samples in (before, after))
        shown = (list(samples.values())[:SHOWN_SAMPLES] for samples in (before, after))
        return Samples(kind, first, last, total, *shown)
    return None


def _read_samples(path: Path) -> dict[int, Sample]:
    """The first sample of each prompt, by the prompt's number."""
    columns = ["prompt_id", "prompt", "response", "score"]
    found: dict[int, Sample] = {}
    for row in pq.read_table(path, columns=columns, partitioning=None).to_pylist():
        score = float("nan") if row["score"] is None else row["score"]
        found.setdefault(row["prompt_id"], Sample(row["prompt"], row["response"], score))
    return found
