"""A stage on more and more GPUs, its batch unchanged: how fast it is, and what it is held up by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config import schema
from rlhf_ray.plan.time import StageTime, role_settings

MOST_GPUS = 4096
"""As far as is looked."""


def scaled(stage: schema.Stage, factor: int, roles: Sequence[str]) -> schema.Stage:
    """The stage with so many times the workers of these roles; of a critic by default one is written."""
    changes: dict[str, Any] = {}
    any_stage: Any = stage
    for role in roles:
        if not role.startswith("reward/"):
            own = role_settings(stage, role)
            changes[role] = own.model_copy(update={"workers": factor * own.workers})
    if getattr(any_stage, "reward", None):
        changes["reward"] = tuple(
            each.model_copy(update={"workers": factor * each.workers}) for each in any_stage.reward
        )
    return stage.model_copy(update=changes)


@dataclass(frozen=True)
class Scale:
    """A stage on more GPUs.

    Args:
        factor: by which the workers of every role are multiplied.
        gpus: whole GPUs of all roles.
        iteration_s: seconds of an iteration.
        efficiency: the speed over `factor` times that of the plan.
        limit: what grows most beyond its fair part of the time; empty at the plan itself.
    """

    factor: int
    gpus: int
    iteration_s: float
    efficiency: float
    limit: str


def scaling(
    estimate: Callable[[schema.Stage], StageTime], stage: schema.Stage, roles: Sequence[str], *, most: int
) -> tuple[list[Scale], str]:
    """The stage with 1, 2, 4, ... times its workers, the batch unchanged, as long as it has at most `most` GPUs.

    Where it ends earlier, since the batch is too small, the text says so; it is empty else.
    """
    base = estimate(stage)
    found = [Scale(1, base.gpus, base.iteration_s, 1.0, "")]
    factor = 2
    while base.gpus and base.gpus * factor <= most:
        if stops := too_many_learners(stage, factor, roles):
            return found, stops
        time = estimate(scaled(stage, factor, roles))
        efficiency = base.iteration_s / (factor * time.iteration_s)
        found.append(Scale(factor, time.gpus, time.iteration_s, efficiency, _limit(base, time, factor)))
        factor *= 2
    return found, ""


def too_many_learners(stage: schema.Stage, factor: int, roles: Sequence[str]) -> str:
    """In words, why no pipeline may have so many times the workers: some would have no row; empty where it may."""
    learners = {role: factor * role_settings(stage, role).workers for role in ("policy", "critic") if role in roles}
    if isinstance(stage, schema.Collect) or not learners:
        return ""
    rows, larger = _least_rows(stage)
    role, workers = max(learners.items(), key=lambda each: each[1])
    if workers <= rows:
        return ""
    return f"the batch is too small for {workers:,} {role} workers, {rows:,} rows at a time; {larger}"


def _least_rows(stage: schema.Ppo | schema.Sft | schema.RewardModel | schema.Dpo) -> tuple[int, str]:
    """Rows of the smallest mini-batch of a stage, of which every worker needs one, and how there can be more."""
    if isinstance(stage, schema.Ppo):
        samples = stage.prompts_per_iteration * stage.sampling.samples_per_prompt
        fewer = " or lower mini_batches" if stage.mini_batches > 1 else ""
        return samples // stage.mini_batches, f"raise prompts_per_iteration{fewer}"
    return stage.batch_size, "raise batch_size"


def _limit(base: StageTime, time: StageTime, factor: int) -> str:
    """In words, the phase that is longest beyond its part of the time at perfect scaling."""
    excess = {phase: seconds - base.phases[phase] / factor for phase, seconds in time.phases.items()}
    phase = max(excess, key=lambda each: excess[each])
    tasks = [task for task in time.tasks if task.phase == phase]
    if phase == "driver":
        return "the driver: calls to every worker, and its work on the samples"
    longest = max(tasks, key=lambda task: task.seconds)
    few = longest.rows < longest.workers
    if phase == "generate":
        return f"fewer prompts ({longest.rows:,}) than generators" if few else "generation tail: the longest response"
    if phase == "turns":
        return "turns: bytes to host memory and back"
    if phase == "sync":
        return "sync: bytes over the network" if longest.waiting > longest.seconds / 2 else "sync: loading the weights"
    if longest.waiting > longest.seconds / 2:
        return "learner communication: all-reduce of gradients"
    what = "scoring" if phase == "score" else "learning"
    return f"{what}: fewer rows ({longest.rows:,}) than workers of {longest.role}" if few else what
