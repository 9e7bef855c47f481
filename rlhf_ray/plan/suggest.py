"""The placement of a stage that fits a cluster and is the fastest by the estimate: plain settings of its roles.

First each role by itself: for each number of workers the settings that fit its memory with the least time. Then all of
them together, from the smallest: the devices go to the roles where they save most, as long as there are any.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config import schema
from rlhf_ray.config.role_rules import reward_names
from rlhf_ray.engines.deepspeed_training import effective_stage
from rlhf_ray.plan.arithmetic import arithmetic
from rlhf_ray.plan.cluster import PLENTY, ClusterShape
from rlhf_ray.plan.data import Lengths
from rlhf_ray.plan.estimate import estimator
from rlhf_ray.plan.hardware import GPUS
from rlhf_ray.plan.memory import plan_memory
from rlhf_ray.plan.placement import plan_placement
from rlhf_ray.plan.time import Factors, StageTime, role_settings

Change = dict[str, Any]
"""Settings of one role by their keys."""
_LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_LEAST_GAIN = 0.005
"""Share of an iteration that a change must save to be made."""


@dataclass(frozen=True)
class Suggestion:
    """What is proposed for a stage.

    Args:
        stage: its name.
        settings: by their keys within the stage; only those that differ from the pipeline's.
        iteration_s: seconds of an iteration with them.
        before_s: seconds with the pipeline's own; None where those do not fit.
        reason: why there is no proposal; empty where there is one.
    """

    stage: str
    settings: dict[str, Any]
    iteration_s: float | None
    before_s: float | None
    reason: str


def suggest(
    config: schema.Pipeline,
    stage: schema.Stage,
    rows: int | None,
    cluster: ClusterShape,
    lengths: Lengths,
    factors: Factors,
) -> Suggestion:
    """The fastest placement of a stage that fits."""
    return _Search(config, stage, rows, cluster, lengths, factors).run()


@dataclass(frozen=True)
class _Tried:
    """A stage that was tried; seconds are infinite where it does not fit."""

    seconds: float
    gpus: int
    misfits: tuple[str, ...]
    time: StageTime | None


class _Search:
    def __init__(
        self,
        config: schema.Pipeline,
        stage: schema.Stage,
        rows: int | None,
        cluster: ClusterShape,
        lengths: Lengths,
        factors: Factors,
    ) -> None:
        self._config, self._stage, self._rows, self._cluster = config, stage, rows, cluster
        self._lengths, self._factors = lengths, factors
        placed = plan_placement(stage, cluster, strategy=config.placement.strategy)[-1]
        self._roles = [role.role for role in placed.roles]
        self._devices = cluster.total_gpus or cluster.total_cpus

    def run(self) -> Suggestion:
        """The proposal."""
        before = self._try({})
        options = {role: self._options(role) for role in self._roles}
        lacking = [role for role, found in options.items() if not found]
        if lacking:
            why = f"{' and '.join(lacking)}: no number of workers fits, whatever ZeRO, micro-batches and offload are"
            return Suggestion(self._stage.name, {}, None, None, why)
        best = self._climb(options)
        if best is None:
            why = f"the smallest of all roles together do not fit {self._cluster.text}"
            return Suggestion(self._stage.name, {}, None, None, why)
        seconds, chosen = best
        before_s = None if math.isinf(before.seconds) else before.seconds
        if before_s is not None and before_s <= seconds * (1 + _LEAST_GAIN):
            return Suggestion(self._stage.name, {}, before_s, before_s, "")
        settings = {
            f"{self._section(role)}.{key}": value
            for role, change in chosen.items()
            for key, value in change.items()
            if getattr(role_settings(self._stage, role), key) != value
        }
        return Suggestion(self._stage.name, settings, seconds, before_s, "")

    # ------------------------------------------------------------------------------ one role

    def _options(self, role: str) -> list[Change]:
        """For each number of devices the role's settings that fit its own memory with the least time, if any do."""
        found = []
        for workers in _LADDER:
            if workers > self._devices or (workers > 1 and not self._scales(role)):
                break
            tried = [
                (self._of_role(role, change), number, change)
                for number, change in enumerate(self._variants(role, workers))
            ]
            fitting = [each for each in tried if not math.isinf(each[0])]
            if fitting:
                found.append(min(fitting, key=lambda each: each[:2])[2])
        return found

    def _scales(self, role: str) -> bool:
        """Whether more workers may help: functions on the driver's node are left as they are."""
        return not isinstance(role_settings(self._stage, role), schema.FunctionReward)

    def _variants(self, role: str, devices: int) -> Iterator[Change]:
        """Settings of a role on so many devices, the simplest first."""
        settings = role_settings(self._stage, role)
        on_gpu = bool(self._cluster.total_gpus) and settings.gpus != 0
        if isinstance(settings, schema.FunctionReward):
            yield {}
        elif isinstance(settings, schema.Generator):
            most = self._cluster.gpus if on_gpu else 1
            for parallel in (1, 2, 4, 8):
                if devices % parallel == 0 and parallel <= most:
                    yield {"workers": devices // parallel, "tensor_parallel": parallel}
        elif isinstance(settings, schema.Learner):
            yield from self._learner_variants(settings, devices, on_gpu=on_gpu)
        else:
            for tokens in self._budgets(settings.micro_batch_tokens, on_gpu=on_gpu):
                yield {"workers": devices, "micro_batch_tokens": tokens}

    def _learner_variants(self, settings: schema.Learner, workers: int, *, on_gpu: bool) -> Iterator[Change]:
        stages: tuple[int, ...] = (settings.zero,)
        if workers > 1:
            least = effective_stage(settings)
            stages = tuple(dict.fromkeys(max(least, each) for each in (0, 2, 3)))
        quantised = settings.lora is not None and settings.lora.quantise != "none"
        for zero, again, tokens in itertools.product(
            [each for each in stages if not (quantised and each == 3)],
            (False, True),
            self._budgets(settings.micro_batch_tokens, on_gpu=on_gpu),
        ):
            shared: Change = {"workers": workers, "zero": zero, "activation_checkpointing": again}
            for away in (False, True) if on_gpu and zero else (False,):
                yield shared | {"micro_batch_tokens": tokens, "cpu_offload": away}

    def _budgets(self, own: int | None, *, on_gpu: bool) -> Sequence[int | None]:
        return (own, 8192, 4096) if on_gpu and own is None else (own,)

    def _of_role(self, role: str, change: Change) -> float:
        """Seconds of the role's tasks; infinite where it does not fit its own memory, or not on the cluster alone."""
        found = self._try({role: change}, alone=role)
        return found.seconds

    # ------------------------------------------------------------------------------ all roles

    def _climb(self, options: Mapping[str, list[Change]]) -> tuple[float, dict[str, Change]] | None:
        """From the smallest options on, the step that saves most for each device, until none saves anything."""
        at = dict.fromkeys(options, 0)

        def tried(steps: Mapping[str, int]) -> _Tried:
            return self._try({role: options[role][step] for role, step in steps.items()})

        now = tried(at)
        if math.isinf(now.seconds):
            return None
        while True:
            better = []
            for step in self._steps(at, options):
                found = tried(step)
                saved = now.seconds - found.seconds
                if saved > _LEAST_GAIN * now.seconds:
                    better.append((saved / max(1, found.gpus - now.gpus), step, found))
            if not better:
                break
            _, at, now = max(better, key=lambda each: each[0])
        return now.seconds, {role: options[role][step] for role, step in at.items()}

    def _steps(self, at: Mapping[str, int], options: Mapping[str, list[Change]]) -> Iterator[dict[str, int]]:
        """One role larger, those that wait for each other larger together, and one larger at another's cost."""
        learners = [role for role in ("policy", "critic") if role in at]
        scorers = [role for role in at if role.startswith("reward/") or role == "reference"]
        groups = [[role] for role in at] + [learners, scorers, [*learners, *scorers], list(at)]
        for group in groups:
            larger = [role for role in group if at[role] + 1 < len(options[role])]
            if larger:
                yield {**at, **{role: at[role] + 1 for role in larger}}
        for up, down in itertools.permutations(at, 2):
            if at[up] + 1 < len(options[up]) and at[down] > 0:
                yield {**at, up: at[up] + 1, down: at[down] - 1}

    # ------------------------------------------------------------------------------------ try

    def _try(self, changes: Mapping[str, Change], *, alone: str | None = None) -> _Tried:
        """The stage with some roles' settings changed; `alone`: that role counts, and the others' room does not."""
        stage = changed(self._stage, changes)
        cluster = self._cluster
        placement = plan_placement(stage, cluster, strategy=self._config.placement.strategy)[-1]
        numbers = arithmetic(stage, self._rows, gpus=cluster.total_gpus)
        memory = plan_memory(self._config, stage, placement, numbers, cluster)
        misfits = tuple(role.role for role in memory.roles if role.fits is False)
        fits = placement.shortage is None and memory.fits is not False
        if alone is not None:
            own = next(role for role in placement.roles if role.role == alone)
            held = own.workers * (own.share.gpus if cluster.total_gpus else own.share.cpus)
            fits = alone not in misfits and held <= self._devices + 1e-6
        if not fits:
            return _Tried(math.inf, 0, misfits, None)
        time = estimator(self._config, numbers, placement, memory, cluster, self._lengths, self._factors)(stage)
        if alone is not None:
            return _Tried(sum(task.seconds for task in time.tasks if task.role == alone), time.gpus, misfits, time)
        return _Tried(time.iteration_s, time.gpus, misfits, time)

    def _section(self, role: str) -> str:
        stage: Any = self._stage
        if not role.startswith("reward/"):
            return role
        return f"reward.{reward_names(stage.reward).index(role.removeprefix('reward/'))}"


def changed(stage: schema.Stage, changes: Mapping[str, Change]) -> schema.Stage:
    """The stage with other settings of some of its roles."""
    any_stage: Any = stage
    updates: dict[str, Any] = {}
    rewards = list(getattr(any_stage, "reward", ()))
    for role, change in changes.items():
        settings = role_settings(stage, role).model_copy(update=change)
        if role.startswith("reward/"):
            rewards[reward_names(any_stage.reward).index(role.removeprefix("reward/"))] = settings
        else:
            updates[role] = settings
    if rewards:
        updates["reward"] = tuple(rewards)
    return stage.model_copy(update=updates)


def refusal(cluster: ClusterShape) -> str | None:
    """Why nothing can be suggested for a cluster; None where it can."""
    if (cluster.total_gpus or cluster.total_cpus) >= PLENTY:
        return "there is no cluster; name one with --cluster, --here or --address"
    if cluster.total_gpus and cluster.gpu is None:
        return f"there are no figures of the GPUs of {cluster.text}; known are {', '.join(GPUS)}"
    return None
