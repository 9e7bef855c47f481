"""What `rlhf-ray status` prints of a run: of its folder, or of what its job says."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from rlhf_ray.config.load import CONFIG_FILE
from rlhf_ray.distributed.tracing import Activity
from rlhf_ray.trainers.lock import owner_of
from rlhf_ray.trainers.metric_rows import FILE as METRICS
from rlhf_ray.trainers.metric_rows import read_metrics
from rlhf_ray.trainers.status import EVERY_S, FILE, Status, read_status
from rlhf_ray.trainers.view import duration, in_words, phase, shown

_SILENT_S = 12 * EVERY_S


def holds_a_run(folder: Path) -> bool:
    """Whether a run's folder lies there."""
    return (folder / CONFIG_FILE).is_file()


def folder_rows(folder: Path) -> dict[str, str]:
    """Name and text of each line on the run in a folder, whoever started it."""
    owner = owner_of(folder)
    file = folder / FILE
    status = read_status(file.read_text(encoding="utf-8")) if file.is_file() else None
    last = status is not None and status.outcome == "done" and status.stage == status.stages[-1]
    state = f"going on in {owner}" if owner else "done" if last else "not running"
    if not owner and not last:
        state += f"; go on with  rlhf-ray resume {folder}"
    rows = {"run": str(folder.resolve()), "state": state}
    if status is not None:
        return rows | status_rows(status, now=time.time(), running=owner is not None)
    numbers = read_metrics(folder)
    if not numbers:
        return rows
    row = numbers[-1]
    since = time.time() - (folder / METRICS).stat().st_mtime
    return rows | {"phase": f"{row['stage']}: {row['iteration']} done", "progress": _progress(since, row)}


def status_rows(status: Status, *, now: float, running: bool) -> dict[str, str]:
    """Name and text of each line on a stage: its phase, its progress and its slowest worker.

    Args:
        status: what the run has written.
        now: Unix seconds.
        running: whether the run is known to go on.
    """
    place = status.stages.index(status.stage) + 1 if status.stage in status.stages else 1
    stage = f"{status.stage} (stage {place} of {len(status.stages)})"
    done = f"{stage}: {status.unit} {status.iteration} of {status.total} done"
    if status.outcome == "done":
        rows = {"phase": done}
    elif status.outcome is not None:
        rows = {"phase": f"{done}; {'' if status.outcome == 'stopped' else 'failed by '}{status.outcome}"}
    elif running:
        rows = {"phase": f"{done}; now {_now(status.active, now)}"}
        if now - status.written_s > _SILENT_S:
            rows["silent"] = f"the driver has written nothing for {duration(now - status.written_s)}"
    else:
        rows = {"phase": f"{done}; it has ended without a word"}
    if status.progress_s is not None:
        rows["progress"] = _progress(now - status.progress_s, status.metrics)
    if status.slowest is not None:
        slow = status.slowest
        others = "" if slow.others_s is None else f", the others of its role {slow.others_s:.1f} s"
        rows["slowest"] = f"{slow.role} rank {slow.rank}: {in_words(slow.method)} {slow.seconds:.1f} s{others}"
    return rows


def _now(active: tuple[Activity, ...], now: float) -> str:
    """The calls under way, in words."""
    if not active:
        return "the driver"
    return ", ".join(f"{phase(call)} for {duration(now - call.since)}" for call in active)


def _progress(since_s: float, metrics: Mapping[str, float]) -> str:
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    return " | ".join([f"{duration(since_s)} ago", *(f"{label} {value}" for label, value in shown(numbers))])
