"""A pipeline file made real: its stages in order, on one cluster."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from rlhf_ray.config import schema
from rlhf_ray.config.load import run_files
from rlhf_ray.distributed.background import in_background
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.distributed.tracing import Recorder
from rlhf_ray.plan import check_data
from rlhf_ray.plan.networks import check_synced
from rlhf_ray.plan.prediction import RunPlan, comparison_table
from rlhf_ray.stages.collect import run_collect
from rlhf_ray.stages.dpo import run_dpo
from rlhf_ray.stages.ppo import run_ppo
from rlhf_ray.stages.site import Site, StageData, known_before_start, load_data, stage_result
from rlhf_ray.stages.supervised import run_supervised
from rlhf_ray.trainers.metrics import check_tracking
from rlhf_ray.trainers.run import RunFolder

_WIDTH = 120


def run_pipeline(config: schema.Pipeline, *, pipeline_dir: Path, resume: bool) -> None:
    """Runs the stages in order, or goes on where an earlier run of the folder stopped.

    Args:
        config: the pipeline; `run_dir` is its folder.
        pipeline_dir: where reward functions are looked up.
        resume: go on in a folder that holds this run; else the folder must not hold one.

    Raises:
        UserError: config, data or a model is wrong; before any worker starts where it can be known.
        Interrupted: asked to stop; the run can be resumed.
        RlhfRayError: anything else that went wrong, with role, rank and method.
    """
    check_tracking(config.tracking)
    rows = check_data(config)
    files = run_files(config, pipeline_dir=pipeline_dir)
    folder = RunFolder.open(config.run_dir) if resume else RunFolder.create(config.run_dir, files)
    with folder:
        results = [stage_result(folder, stage) for stage in config.stages]
        if results[-1] is not None and None not in results:
            print(f"{folder.path} is done; its result is {results[-1].output}", flush=True)
            return
        recorder = Recorder()
        # Ray's start is mostly waiting, and passes while data is encoded; what is wrong with it ends the run at once.
        early = in_background(lambda: _early_data(config))
        placement = config.placement
        with Cluster(
            placement.address,
            strategy=placement.strategy,
            start_timeout_s=placement.start_timeout_s,
            call_timeout_s=placement.call_timeout_s,
            recorder=recorder,
        ) as cluster:
            site = Site(config, folder, cluster, recorder, pipeline_dir, early.result())
            plan = RunPlan(config, rows, folder.path)
            for stage in config.stages:
                if site.result(stage) is None:
                    _run_stage(site, stage)
                    _show_plan(plan, stage)


def _early_data(config: schema.Pipeline) -> dict[str, StageData]:
    """The data that no stage of this pipeline makes, by stage; before it is encoded the models are looked at."""
    check_synced(config)
    return {s.name: load_data(s, str(s.policy.model), config.seed) for s in known_before_start(config)}


def _show_plan(plan: RunPlan, stage: schema.Stage) -> None:
    """Prints the stage beside its plan. Whatever is wrong with a plan is said, and ends no run."""
    try:
        found = plan.compare(stage)
    except Exception as error:
        print(f"[{stage.name}] there is no plan to compare with: {type(error).__name__}: {error}", flush=True)
        return
    if found:
        print(f"[{stage.name}] planned and measured, for each worker and iteration", flush=True)
        width = None if sys.stdout.isatty() else _WIDTH
        Console(highlight=False, width=width).print(comparison_table(found))


def _run_stage(site: Site, stage: schema.Stage) -> None:
    match stage:
        case schema.Sft() | schema.RewardModel():
            run_supervised(site, stage)
        case schema.Ppo():
            run_ppo(site, stage)
        case schema.Dpo():
            run_dpo(site, stage)
        case schema.Collect():
            run_collect(site, stage)
