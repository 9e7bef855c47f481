"""What an earlier run took, over what is worked out for it: the factors by which a plan's times are corrected.

The model of the work is made for the earlier run's own settings, lengths and hardware, so its figures count for other
settings too: more workers, another length, a larger model. Other hardware has the same factors only by assumption.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rlhf_ray.config import schema
from rlhf_ray.config.load import CONFIG_FILE, load_pipeline, read_origin
from rlhf_ray.errors import ConfigError
from rlhf_ray.plan.arithmetic import arithmetic
from rlhf_ray.plan.cluster import ClusterShape, cluster_of
from rlhf_ray.plan.data import Lengths, data_lengths
from rlhf_ray.plan.estimate import estimator
from rlhf_ray.plan.memory import plan_memory
from rlhf_ray.plan.placement import plan_placement
from rlhf_ray.plan.time import Factors, Task
from rlhf_ray.trainers.metric_rows import PLAN_FILE, read_metrics

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """Figures of an earlier run for the stages of a pipeline.

    Args:
        lengths: by stage.
        factors: by stage, and by the name of a task.
    """

    lengths: dict[str, Lengths]
    factors: dict[str, Factors]


NOTHING = Measured({}, {})


def read_measured(run_dir: Path, config: schema.Pipeline, cluster: ClusterShape) -> Measured:
    """The figures of a run for a pipeline, from its stage of the same name, or else of the same method.

    Args:
        run_dir: the run's folder.
        config: the pipeline that is planned.
        cluster: what the run ran on where its folder does not say.

    Raises:
        ConfigError: there is no run in the folder, it is of another version, or it has no stage like any of the
            pipeline's.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise ConfigError(f"--measured: {run_dir} holds no run (there is no {CONFIG_FILE})")
    earlier = load_pipeline(run_dir / CONFIG_FILE, pipeline_dir=read_origin(run_dir)[0])
    # What is free at a run's end, with its engines kept, is not what it was placed on.
    cluster = (written_cluster(run_dir) or cluster).emptied()
    lengths, factors = {}, {}
    for stage in config.stages:
        alike = [each for each in earlier.stages if each.method == stage.method]
        alike.sort(key=lambda each: each.name != stage.name)
        rows = steady_rows(read_metrics(run_dir, alike[0].name)) if alike else []
        if not rows:
            continue
        found = measured_lengths(alike[0], rows)
        lengths[stage.name] = _within(found, stage)
        factors[stage.name] = _factors(earlier, alike[0], rows, found, cluster)
    if not factors:
        methods = ", ".join(stage.method for stage in config.stages)
        raise ConfigError(f"--measured: {run_dir} has finished no iteration of a stage like those here ({methods})")
    return Measured(lengths, factors)


def steady_rows(rows: Sequence[Row]) -> list[Row]:
    """The iterations of a stage without the first, in which things warm up, where there are others."""
    trained = [row for row in rows if row["iteration"] > 0]
    return list(trained[1:] or trained)


def task_seconds(task: str, rows: Sequence[Row]) -> float | None:
    """Median seconds of a task over iterations; None where none of them has it."""
    if task == "sync":
        found = [row["sync/time_s"] + row["sync/probe_time_s"] for row in rows if row.get("sync/time_s") is not None]
    else:
        found = [row[f"time/{task}_s"] for row in rows if row.get(f"time/{task}_s") is not None]
    return median(found) if found else None


def measured_lengths(stage: schema.Stage, rows: Sequence[Row]) -> Lengths:
    """Mean lengths of a stage's rows, by its metrics."""
    planned = data_lengths(stage)
    if isinstance(stage, schema.Ppo | schema.Collect):
        responses = [row["response/length_mean"] for row in rows if "response/length_mean" in row]
        longest = [row["response/length_max"] for row in rows if "response/length_max" in row]
        if not responses:
            return planned
        response = fmean(responses)
        samples = stage.sampling.samples_per_prompt
        samples *= stage.prompts_per_iteration if isinstance(stage, schema.Ppo) else stage.prompts_per_batch
        tokens = [found for row in rows if (found := _tokens(row)) is not None]
        prompt = max(1.0, fmean(tokens) / samples - response) if tokens else planned.prompt
        return Lengths(prompt, response, fmean(longest) if longest else planned.longest)
    tokens = [row["policy/tokens"] for row in rows if row.get("policy/tokens")]
    if not tokens:
        return planned
    together = 1 if isinstance(stage, schema.Sft) else 2
    return replace(planned, prompt=fmean(tokens) / stage.batch_size / together)


def _tokens(row: Row) -> float | None:
    """Tokens that one pass over an iteration's samples reads, by the rate of a role that passes over them once."""
    for name, rate in row.items():
        role = name.removesuffix("/tokens_per_s")
        own = role.replace("/", "_")
        spent = row.get(f"time/{own}_score_s") or row.get(f"time/{own}_logprobs_s")
        if role != name and role not in ("generator", "policy", "critic") and rate and spent:
            return float(rate * spent)
    return None


def _within(lengths: Lengths, stage: schema.Stage) -> Lengths:
    """The lengths under the limits of another stage."""
    sampling = getattr(stage, "sampling", None)
    if sampling is None:
        return replace(lengths, response=0.0, longest=0.0)
    most = float(sampling.max_new_tokens)
    return replace(lengths, response=min(lengths.response, most), longest=min(lengths.longest, most))


def _factors(
    config: schema.Pipeline, stage: schema.Stage, rows: Sequence[Row], lengths: Lengths, cluster: ClusterShape
) -> Factors:
    numbers = arithmetic(stage, None, gpus=cluster.total_gpus)
    placement = plan_placement(stage, cluster, strategy=config.placement.strategy)[-1]
    memory = plan_memory(config, stage, placement, numbers, cluster)
    if cluster.gpu is None and any(role.share.gpus for role in placement.roles):
        raise ConfigError("--measured: the run used GPUs of which there are no figures")
    tasks = estimator(config, numbers, placement, memory, cluster, lengths, {})(stage).tasks
    return {task.name: found for task in tasks if (found := _factor(task, rows)) is not None}


def _factor(task: Task, rows: Sequence[Row]) -> float | None:
    found = task_seconds(task.name, rows)
    return found / task.seconds if found is not None and task.seconds else None


def written_cluster(run_dir: Path) -> ClusterShape | None:
    """The cluster that a run's folder names; None where it names none.

    Raises:
        ConfigError: its plan.json is damaged, or of another version.
    """
    path = run_dir / PLAN_FILE
    if not path.is_file():
        return None
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(written, dict) or "cluster" not in written:
            raise _unread(path, "it has no cluster")
        return cluster_of(written["cluster"])
    except ValueError as error:
        raise _unread(path, f"it is no JSON ({error})") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise _unread(path, f"its cluster is described otherwise ({type(error).__name__}: {error})") from None


def _unread(path: Path, why: str) -> ConfigError:
    return ConfigError(f"--measured: {path}: {why}; wanted the folder of a run of this version of rlhf_ray")
