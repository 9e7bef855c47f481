"""Our side: a pipeline run from the command line, and what its steps cost all the processes that it started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Measured:
    """What some steps of a run did and took.

    Args:
        rows: their metrics.
        cpu_s: CPU seconds of the workers and of the driver.
        daemons_cpu_s: CPU seconds of Ray's own processes.
        wall_s: seconds that passed.
    """

    rows: list[dict[str, Any]]
    cpu_s: float
    daemons_cpu_s: float
    wall_s: float


def measured_run(stage: Mapping[str, Any], folder: Path, *, warm: int, steps: int) -> Measured:
    """Runs a pipeline of one stage in `folder`; measures the `steps` steps after the first `warm`.

    The stage should have one step more: what a step prepares for the next one belongs to the measured ones as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "pipeline.yaml"
    run_dir = folder / "run"
    file.write_text(yaml.safe_dump({"run_dir": str(run_dir), "seed": 1, **stage}), encoding="utf-8")
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as output:
        driver = subprocess.Popen(
            [sys.executable, "-m", "rlhf_ray", "run", str(file)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        marks = _watch(driver, run_dir / "metrics.jsonl", (warm, warm + steps))
        code = driver.wait()
    if code or len(marks) < 2:
        raise SystemExit(f"{file}: the run failed with {code}; the end of {log}:\n" + log.read_text()[-3000:])
    (before, start), (after, end) = marks
    spent = {kind: sum(after[kind].values()) - sum(_kept(before, after, kind)) for kind in after}
    rows = [row for row in _rows(run_dir / "metrics.jsonl") if warm < row["iteration"] <= warm + steps]
    return Measured(rows, spent["work"], spent["daemons"], end - start)


def _watch(
    driver: subprocess.Popen[bytes], metrics: Path, iterations: tuple[int, int]
) -> list[tuple[dict[str, dict[int, float]], float]]:
    """CPU seconds by process, and the time, at the end of each of these iterations."""
    marks: list[tuple[dict[str, dict[int, float]], float]] = []
    size = 0
    while driver.poll() is None:
        time.sleep(0.02)
        if len(marks) == len(iterations) or not metrics.exists() or metrics.stat().st_size == size:
            continue
        size = metrics.stat().st_size
        rows = _rows(metrics)
        if rows and rows[-1]["iteration"] >= iterations[len(marks)]:
            marks.append((_spent(driver.pid), time.perf_counter()))
    return marks


def _rows(metrics: Path) -> list[dict[str, Any]]:
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _spent(driver: int) -> dict[str, dict[int, float]]:
    """CPU seconds so far of the driver and Ray's workers (`work`), and of Ray's other processes (`daemons`)."""
    found: dict[str, dict[int, float]] = {"work": {}, "daemons": {}}
    for process in [psutil.Process(driver), *psutil.Process(driver).children(recursive=True)]:
        try:
            times, command = process.cpu_times(), process.cmdline()
        except psutil.NoSuchProcess:
            continue
        works = process.pid == driver or (command and command[0].startswith("ray::"))
        found["work" if works else "daemons"][process.pid] = times.user + times.system
    return found


def _kept(before: dict[str, dict[int, float]], after: dict[str, dict[int, float]], kind: str) -> list[float]:
    """What the processes that are still there had spent before."""
    return [before[kind].get(process, 0.0) for process in after[kind]]
