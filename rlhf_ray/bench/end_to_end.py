"""Pipelines run whole, and what each of their steps cost, all processes of the run counted."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rlhf_ray.bench import workload
from rlhf_ray.bench.figures import Cost, cpu_seconds
from rlhf_ray.config import schema
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.pipeline import run_pipeline
from rlhf_ray.trainers.metric_rows import FILE, read_metrics

_LOOK_S = 0.02
_START_TIMEOUT_S = 240.0
_CALL_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Course:
    """The steps of a finished run.

    Args:
        rows: its metrics, one row a step.
        ends: when each step had ended: seconds of a clock, and CPU seconds of this process and all below it.
        looks: what `run`'s `look` saw then.
    """

    rows: Sequence[Mapping[str, Any]]
    ends: Sequence[tuple[float, float]]
    looks: Sequence[Mapping[str, float]] = ()

    def cost(self, units: str, *, first: int = 2) -> Cost:
        """What the steps from number `first` on did and took, without the last, in which nothing is fetched ahead.

        Args:
            units: metric that counts the work of a step, such as `policy/tokens`.
            first: the steps before it are the warm-up; 2 at least.
        """
        last = len(self.rows) - 1
        if last < first:
            raise ValueError(f"{last + 1} steps leave none after the warm-up of {first - 1}")
        (began, spent), (ended, in_all) = self.ends[first - 2], self.ends[last - 1]
        done = sum(float(row[units]) for row in self.rows[first - 1 : last])
        return Cost(done, in_all - spent, ended - began)

    def peak_memory_gib(self) -> dict[str, float]:
        """Role -> the most memory that one of its workers has had, in GiB."""
        ending = "/peak_memory_gib"
        names = sorted({name for row in self.rows for name in row if name.endswith(ending)})
        return {name.removesuffix(ending): max(float(row.get(name) or 0.0) for row in self.rows) for name in names}


def local_ray() -> Cluster:
    """A Ray of this benchmark's own, which the runs within join."""
    return Cluster("local", start_timeout_s=_START_TIMEOUT_S)


def run(
    stage: Mapping[str, Any],
    folder: Path,
    *,
    transport: str = "auto",
    look: Callable[[], Mapping[str, float]] | None = None,
) -> Course:
    """Runs a pipeline of one stage in this process and watches it.

    Args:
        stage: settings as in a pipeline file; nothing is evaluated, and no checkpoint is kept before the end.
        folder: for the run; there must be none in it. A reward function's module lies beside it.
        transport: how weights travel.
        look: is called whenever a step has ended.
    """
    placement = {"start_timeout_s": _START_TIMEOUT_S, "call_timeout_s": _CALL_TIMEOUT_S, "transport": transport}
    stages = [{"evaluation": {"every": 0}, "checkpoints": {"every": 0}, **stage}]
    config = schema.Pipeline.model_validate({"run_dir": str(folder), "placement": placement, "stages": stages})
    ends: list[tuple[float, float]] = []
    looks: list[Mapping[str, float]] = []
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(folder / FILE, ends, looks, look or dict, done), daemon=True)
    watch.start()
    try:
        run_pipeline(config, pipeline_dir=folder.parent, resume=False)
    finally:
        done.set()
        watch.join()
    rows = read_metrics(folder)
    first = sum(row["iteration"] == 0 for row in rows)
    return Course(rows[first:], ends[first:], looks[first:])


def family() -> list[int]:
    """Ids of this process and of all below it, Ray's and the actors'."""
    return [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]


def _watch(
    metrics: Path,
    ends: list[tuple[float, float]],
    looks: list[Mapping[str, float]],
    look: Callable[[], Mapping[str, float]],
    done: threading.Event,
) -> None:
    """Notes time and CPU seconds at the moment at which each row of metrics is written."""
    seen = 0
    while not done.wait(_LOOK_S):
        if not metrics.exists() or metrics.stat().st_size == seen:
            continue
        now, spent, seen_now = time.perf_counter(), cpu_seconds(family()), look()
        content = metrics.read_bytes()
        seen = len(content)
        new = content.count(b"\n") - len(ends)
        ends.extend([(now, spent)] * new)
        looks.extend([seen_now] * new)


def write_prompts(path: Path, prompts: Iterable[list[int]]) -> Path:
    """Prompts as JSON lines; gives the path, as the others do."""
    return _write(path, ({"prompt": workload.text(prompt)} for prompt in prompts))


def write_texts(path: Path, count: int) -> Path:
    """Prompts with responses of the workload, for supervised fine-tuning."""
    both = zip(workload.prompts(count), workload.responses(count), strict=True)
    return _write(path, ({"prompt": workload.text(prompt), "response": _answer(answer)} for prompt, answer in both))


def write_pairs(path: Path, count: int) -> Path:
    """Preference pairs of the workload."""
    return _write(
        path,
        (
            {"prompt": workload.text(prompt), "chosen": _answer(chosen), "rejected": _answer(rejected)}
            for prompt, chosen, rejected in workload.pairs(count)
        ),
    )


def _answer(tokens: list[int]) -> str:
    """The text that follows a prompt's, one token at least; whoever reads it puts the end-of-sequence token there."""
    return " " + workload.text([token for token in tokens if token] or [1])


def _write(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
