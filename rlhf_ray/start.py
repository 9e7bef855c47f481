"""The last checks of a pipeline, and its start."""

from __future__ import annotations

import sys
from pathlib import Path

from rlhf_ray.config.effects import generator_of, rewards_of
from rlhf_ray.config.rules import warnings
from rlhf_ray.config.schema import FunctionReward, Pipeline
from rlhf_ray.terminal import sigterm_exits


def start_run(config: Pipeline, *, pipeline_dir: Path, resume: bool) -> None:
    """Checks what can be checked before models load, then runs the pipeline to its end."""
    from rlhf_ray.doctor import check_floors

    generators = [generator for stage in config.stages if (generator := generator_of(stage)) is not None]
    check_floors(engine=any(generator.engine == "vllm" for generator in generators))
    check_functions(config, pipeline_dir)
    for line in warnings(config):
        print(f"warning: {line}", file=sys.stderr, flush=True)
    with sigterm_exits():
        from rlhf_ray.pipeline import run_pipeline

        run_pipeline(config, pipeline_dir=pipeline_dir, resume=resume)


def check_functions(config: Pipeline, pipeline_dir: Path) -> None:
    """Loads every reward function here, so that a wrong one is not found by its worker, after an earlier stage."""
    from rlhf_ray.workers.reward_functions import check_function

    for stage in config.stages:
        for reward in rewards_of(stage):
            if isinstance(reward, FunctionReward):
                check_function(reward.function, pipeline_dir, reward.arguments)
