"""A run's plan beside what each of its stages took: memory and seconds by role.

plan.json in the run's folder has the cluster, and by stage GiB of each role's worker and seconds of each task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rlhf_ray.config import schema
from rlhf_ray.distributed.nodes import nodes_of_ray
from rlhf_ray.plan.arithmetic import arithmetic, known_rows
from rlhf_ray.plan.cluster import ClusterShape, cluster_as_object, running_cluster
from rlhf_ray.plan.data import data_lengths
from rlhf_ray.plan.estimate import estimate_stage, seconds
from rlhf_ray.plan.hardware import measure_core
from rlhf_ray.plan.measured import Row, steady_rows, task_seconds
from rlhf_ray.plan.memory import plan_memory
from rlhf_ray.plan.placement import plan_placement
from rlhf_ray.trainers.durable import write_text
from rlhf_ray.trainers.metric_rows import PLAN_FILE, read_metrics


@dataclass(frozen=True)
class Compared:
    """One role beside its plan; None where one of the two is not known.

    Args:
        role: its name; `iteration` for the whole of it.
        planned_gib: peak memory of a worker.
        measured_gib: of the worker that had most.
        planned_s: seconds of an iteration that it works.
        measured_s: median over the iterations.
    """

    role: str
    planned_gib: float | None
    measured_gib: float | None
    planned_s: float | None
    measured_s: float | None


class RunPlan:
    """The plan of a run on the cluster where it runs; of each stage it is worked out when the stage is done.

    Building networks takes seconds that a run's start should not: what is known beforehand is all that it uses.

    Args:
        config: the pipeline.
        rows: of each stage's data, as `check_data` counts them.
        run_dir: the run's folder.
    """

    def __init__(self, config: schema.Pipeline, rows: Mapping[str, dict[str, int]], run_dir: Path) -> None:
        self._config, self._rows, self._run_dir = config, rows, run_dir
        self._cluster: ClusterShape | None = None

    def compare(self, stage: schema.Stage) -> list[Compared]:
        """A stage that is done beside its plan, which is written to plan.json; empty where it has no iteration."""
        if self._cluster is None:
            self._cluster = running_cluster(nodes_of_ray(), "the cluster of this run")
            if not self._cluster.total_gpus:
                self._cluster = replace(self._cluster, core=measure_core())
        planned = predict(self._config, stage, known_rows(stage, self._rows[stage.name]), self._cluster)
        path = self._run_dir / PLAN_FILE
        before = json.loads(path.read_text(encoding="utf-8"))["stages"] if path.is_file() else {}
        plan = {"cluster": cluster_as_object(self._cluster), "stages": {**before, stage.name: planned}}
        write_text(path, json.dumps(plan, indent=1, allow_nan=False))
        return compared(planned, read_metrics(self._run_dir, stage.name))


def predict(config: schema.Pipeline, stage: schema.Stage, rows: int | None, cluster: ClusterShape) -> dict[str, Any]:
    """A stage's part of plan.json.

    Args:
        config: the pipeline.
        stage: one of its stages.
        rows: of its data; None where an earlier stage writes them.
        cluster: what it runs on, of which all is taken to be free.
    """
    cluster = cluster.emptied()
    numbers = arithmetic(stage, rows, gpus=cluster.total_gpus)
    placement = plan_placement(stage, cluster, strategy=config.placement.strategy)[-1]
    memory = plan_memory(config, stage, placement, numbers, cluster)
    lengths = data_lengths(stage)
    time = estimate_stage(config, stage, numbers, placement, memory, cluster, lengths, {}, most_gpus=0).time
    return {
        "memory_gib": {role.role: round(role.total, 4) for role in memory.roles},
        "iteration_s": None if time is None else time.iteration_s,
        "tasks": [
            {"role": task.role, "name": task.name, "seconds": task.seconds} for task in (time.tasks if time else ())
        ],
    }


def compared(planned: Mapping[str, Any], rows: Sequence[Row]) -> list[Compared]:
    """A stage's rows of metrics beside its part of plan.json."""
    steady = steady_rows(rows)
    if not steady:
        return []
    tasks: dict[str, list[Mapping[str, Any]]] = {}
    for task in planned["tasks"]:
        tasks.setdefault("sync" if task["name"] == "sync" else task["role"], []).append(task)
    names = list(dict.fromkeys([*planned["memory_gib"], *tasks]))
    found = []
    for name in names:
        own = tasks.get(name, [])
        measured = [task_seconds(task["name"], steady) for task in own]
        known = [each for each in measured if each is not None]
        peaks = [row[f"{name}/peak_memory_gib"] for row in rows if row.get(f"{name}/peak_memory_gib")]
        found.append(
            Compared(
                name,
                planned["memory_gib"].get(name),
                max(peaks) if peaks else None,
                sum(task["seconds"] for task in own) if own else None,
                sum(known) if own and len(known) == len(own) else None,
            )
        )
    whole = [row["time/iteration_s"] - row.get("time/evaluation_s", 0.0) for row in steady if "time/iteration_s" in row]
    if planned["iteration_s"] is not None and whole:
        found.append(Compared("iteration", None, None, planned["iteration_s"], median(whole)))
    return found


def comparison_table(found: Sequence[Compared]) -> Table:
    """Planned beside measured."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("role")
    for heading in ("planned GiB", "measured", "ratio", "planned time", "measured", "ratio"):
        table.add_column(heading, justify="right")
    for each in found:
        table.add_row(
            each.role,
            *(("" if value is None else f"{value:.2f}") for value in (each.planned_gib, each.measured_gib)),
            _ratio(each.measured_gib, each.planned_gib),
            *(("" if value is None else seconds(value)) for value in (each.planned_s, each.measured_s)),
            _ratio(each.measured_s, each.planned_s),
        )
    return table


def _ratio(measured: float | None, planned: float | None) -> str:
    return f"{measured / planned:.2f}" if measured is not None and planned else ""
