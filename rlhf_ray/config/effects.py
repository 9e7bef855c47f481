"""Settings that have no effect in a pipeline; given all the same, they are errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_ray.config.layouts import roles_of
from rlhf_ray.config.paths import DATA_ENDINGS, is_local
from rlhf_ray.config.problems import KeyPath, Problem
from rlhf_ray.config.schema import (
    Collect,
    Critic,
    Dpo,
    FunctionReward,
    Generator,
    Learner,
    NewModel,
    Pipeline,
    Ppo,
    Reference,
    Reward,
    Source,
    Stage,
    Workers,
)

_Silent = tuple[Sequence[str], str, Sequence[str]]


def without_effect(pipeline: Pipeline) -> list[Problem]:
    """Every setting that this pipeline never reads, whether it is given or not."""
    found: list[Problem] = []
    for index, stage in enumerate(pipeline.stages):
        for keys, reason, causes in _silent(stage):
            path: KeyPath = ("stages", index)
            text = f"has no effect {reason}; remove it"
            because = tuple((*path, *_split(cause)) for cause in causes)
            found += [Problem((*path, *_split(key)), text, because) for key in keys]
    return found


def _split(key: str) -> KeyPath:
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def _silent(stage: Stage) -> Iterator[_Silent]:
    """Keys without effect, why, and the keys that make it so."""
    if isinstance(stage, Collect):
        yield from _silent_collect(stage)
    elif stage.data.evaluation is None:
        yield ["evaluation"], "without data.evaluation", ["data.evaluation"]
    if generator_of(stage) is None:
        yield ["policy.offload"], "without a generator, which it makes room for", []
    for role, learner in learners(stage):
        if isinstance(learner, Critic) and learner.kind == "value_head":
            continue
        yield from _silent_learner(str(role[0]), learner)
    for split in ("train", "evaluation"):
        yield from _silent_sources(getattr(stage.data, split) or (), f"data.{split}")
    if isinstance(stage, Ppo | Dpo):
        yield from _silent_reference(stage)
    for position, reward in enumerate(rewards_of(stage)):
        if not isinstance(reward, FunctionReward):
            yield from _silent_revision(f"reward.{position}", reward.model)
    generator = generator_of(stage)
    if generator is not None:
        yield from _silent_generator(generator)
    if isinstance(stage, Ppo | Collect) and stage.data.prompt_length is not None:
        yield ["data.too_long"], "with data.prompt_length, which cuts every prompt", ["data.prompt_length"]
    for key, settings in roles_of(stage).values():
        yield from _silent_sharing(".".join(map(str, key)), settings)
    if isinstance(stage, Ppo):
        yield from _silent_ppo(stage)
    if isinstance(stage, Dpo):
        yield from _silent_dpo(stage)


def _silent_collect(stage: Collect) -> Iterator[_Silent]:
    yield ["data.evaluation", "checkpoints.best"], "in a collect stage, which evaluates nothing", []
    yield ["generator.sleep"], "in a collect stage, which has no learners to make room for", []
    yield from _silent_revision("policy", stage.policy.model)
    uses = {
        "best_worst": ["min_margin"],
        "threshold": ["min_margin", "max_pairs"],
        "best_of_n": [],
        "resample": ["beta", "draws"],
    }
    for key in ("min_margin", "max_pairs", "beta", "draws"):
        if key not in uses[stage.keep]:
            by = " and ".join(keep for keep, used in uses.items() if key in used)
            yield [key], f"with keep: {stage.keep} ({by} only)", ["keep"]
    if stage.prompts is None:
        sources = range(len(stage.data.train)) if len(stage.data.train) > 1 else ()
        keys = ["data.shuffle", *(f"data.train.{position}.weight" for position in sources)]
        yield keys, "without `prompts`: each prompt is sampled once, in the data's order", []


def _silent_learner(role: str, learner: Learner) -> Iterator[_Silent]:
    if learner.zero == 0:
        yield [f"{role}.cpu_offload"], f"with {role}.zero 0 (it needs ZeRO 1, 2 or 3)", [f"{role}.zero"]
    if learner.optimizer.schedule == "constant":
        cause = f"{role}.optimizer.schedule"
        yield [f"{role}.optimizer.final_ratio"], f"while {cause} is constant", [cause]
    if isinstance(learner, Critic) and learner.lora is not None:
        yield [f"{role}.lora.result"], "on a critic, which is no result of its stage", []
    yield from _silent_revision(role, learner.model)


def _silent_revision(role: str, model: str | NewModel | None) -> Iterator[_Silent]:
    causes = [f"{role}.model"]
    if model is None:
        yield [f"{role}.revision"], f"without {role}.model", causes
    elif isinstance(model, NewModel):
        yield [f"{role}.revision"], "on a fresh model", causes
    elif model.startswith("stage:"):
        yield [f"{role}.revision"], "on the result of a stage", causes
    elif is_local(model) or Path(model).is_dir():
        yield [f"{role}.revision"], f"on a local directory ({model})", causes


def _silent_reference(stage: Ppo | Dpo) -> Iterator[_Silent]:
    yield from _silent_revision("reference", stage.reference.model)
    if stage.policy.lora is None:
        yield ["reference.adapter_off"], "without policy.lora", ["policy.lora"]
    elif stage.adapter_is_off_in_reference:
        keys = [f"reference.{key}" for key in Reference.model_fields if key not in ("adapter_off", "model", "revision")]
        reason = "while the reference is the policy's network with its adapter off (reference.adapter_off: false)"
        yield keys, reason, ["reference.adapter_off", "policy.lora"]


def _silent_sharing(role: str, settings: Workers) -> Iterator[_Silent]:
    if settings.colocate_with is not None:
        keys = [f"{role}.whole_gpus", f"{role}.strategy", f"{role}.node_labels"]
        yield keys, f"with {role}.colocate_with", [f"{role}.colocate_with"]
    elif settings.gpus is not None:
        yield [f"{role}.whole_gpus"], f"with {role}.gpus", [f"{role}.gpus"]
    elif isinstance(settings, FunctionReward):
        yield [f"{role}.whole_gpus"], "on a function without gpus", [f"{role}.gpus"]


def _silent_sources(sources: Sequence[Source], key: str) -> Iterator[_Silent]:
    if len(sources) == 1:
        yield [f"{key}.0.weight"], "on a single source", [key]
    for position, source in enumerate(sources):
        name = f"{key}.{position}"
        if source.stage is not None:
            keys = [f"{name}.split", f"{name}.subset", f"{name}.revision"]
            yield keys, f"on the data of a stage ({source.path})", [f"{name}.path"]
        elif source.path.startswith("synthetic:"):
            yield [f"{name}.subset", f"{name}.revision"], "on a synthetic corpus", [f"{name}.path"]
        elif source.path.endswith(DATA_ENDINGS):
            keys = [f"{name}.split", f"{name}.subset", f"{name}.revision"]
            yield keys, f"on a file ({source.path})", [f"{name}.path"]
        elif is_local(source.path) or Path(source.path).is_dir():
            yield [f"{name}.subset", f"{name}.revision"], f"on a directory ({source.path})", [f"{name}.path"]


def _silent_ppo(stage: Ppo) -> Iterator[_Silent]:
    estimator = stage.advantages.estimator
    cause = ["advantages.estimator"]
    if estimator != "gae":
        keys = ["advantages.gamma", "advantages.lam", "advantages.bootstrap_truncated"]
        yield keys, f"with {estimator} (gae only)", cause
        yield ["value_loss"], f"with {estimator}: there is no critic", cause
    if estimator != "group_relative":
        yield ["advantages.divide_by_std"], f"with {estimator} (group_relative only)", cause
    yield from _silent_critic(stage)
    yield from _silent_kl(stage)
    if stage.old_logprobs == "generator":
        reason = "with old_logprobs: generator, where there is no difference to correct"
        yield ["correction"], reason, ["old_logprobs"]
    elif stage.correction.mode == "off":
        yield ["correction.cap"], "while correction.mode is off", ["correction.mode"]
    elif not stage.corrects_generator:
        reason = "while correction.mode is auto and the generator runs in float32 (set the mode to on to use it)"
        yield ["correction.cap"], reason, ["correction.mode", "generator.dtype", "staleness"]
    if stage.staleness > 0:
        yield ["chunk_samples"], "with staleness: a batch is sampled before it is scored", ["staleness"]
    else:
        yield ["interrupted"], "with staleness 0: weights change when all responses are finished", ["staleness"]
    if stage.evaluation.temperature == 0 and stage.data.evaluation is not None:
        reason = "while evaluation.temperature is 0: greedy samples of a prompt are all the same"
        yield ["evaluation.samples_per_prompt"], reason, ["evaluation.temperature"]


def _silent_critic(stage: Ppo) -> Iterator[_Silent]:
    critic = stage.critic
    if critic is not None and critic.kind == "value_head":
        own = [key for key in Critic.model_fields if key != "kind"]
        reason = "on a value head, which shares the policy's network (set it under policy)"
        yield [f"critic.{key}" for key in own], reason, ["critic.kind"]
    elif stage.advantages.estimator == "gae":
        reason = "unless critic.kind is value_head: a critic of its own has its own learning rate"
        yield ["value_loss.coefficient"], reason, ["critic"]


def _silent_kl(stage: Ppo) -> Iterator[_Silent]:
    if stage.kl_place == "off":
        own = [f"kl.{key}" for key in type(stage.kl).model_fields if key != "place"]
        yield ["reference", *own], "while kl.place is off", ["kl.place"]
    elif stage.kl.controller == "fixed":
        yield ["kl.target", "kl.horizon"], "while kl.controller is fixed", ["kl.controller"]


def _silent_dpo(stage: Dpo) -> Iterator[_Silent]:
    kind, cause = stage.loss.kind, ["loss.kind"]
    for key, wanted in (("label_smoothing", "sigmoid"), ("gamma", "simpo"), ("odds_coefficient", "orpo")):
        if kind != wanted:
            yield [f"loss.{key}"], f"with {kind} ({wanted} only)", cause
    if kind == "orpo":
        yield ["loss.beta"], "with orpo, which is weighed by odds_coefficient", cause
        yield ["loss.nll_coefficient"], "with orpo, which has the chosen answers' likelihood in it", cause
    if not stage.needs_reference:
        yield ["reference", "cache", "cache_dir"], f"with {kind}, which has no reference", cause
    elif not stage.cache:
        yield ["cache_dir"], "while cache is false", ["cache"]
    yield ["data.columns.margin"], "in a dpo stage, whose losses read no margin", []
    if stage.data.evaluation is None:
        yield ["generator"], "without data.evaluation, whose prompts it samples for", ["data.evaluation"]
    if stage.generator is None:
        keys = ["evaluation.prompts", "evaluation.temperature", "evaluation.max_new_tokens"]
        yield keys, "without a generator", ["generator"]
    if not stage.reward:
        yield ["pairs"], "without a reward", ["reward"]
    elif not stage.scores_pairs and stage.generator is None:
        reason = "without `pairs` settings, for which training pairs are scored, and without a generator"
        yield ["reward"], reason, ["pairs", "generator"]


def _silent_generator(generator: Generator) -> Iterator[_Silent]:
    if generator.engine == "hf":
        keys = ["kv_cache_gib", "memory_share", "prefix_caching", "compile"]
        yield [f"generator.{key}" for key in keys], "with the hf engine (vllm only)", ["generator.engine"]
    elif generator.gpus == 0:
        yield ["generator.memory_share"], "with generator.gpus 0", ["generator.gpus"]


def learners(stage: Stage) -> list[tuple[KeyPath, Learner]]:
    """The sections of a stage that are trained."""
    found: list[tuple[KeyPath, Learner]] = []
    if not isinstance(stage, Collect):
        found.append((("policy",), stage.policy))
    if isinstance(stage, Ppo) and stage.critic is not None:
        found.append((("critic",), stage.critic))
    return found


def rewards_of(stage: Stage) -> tuple[Reward, ...]:
    """The scorers of a stage; none where its method has none."""
    return stage.reward if isinstance(stage, Ppo | Dpo | Collect) else ()


def generator_of(stage: Stage) -> Generator | None:
    """The engines of a stage; None where it has none."""
    return stage.generator if isinstance(stage, Ppo | Dpo | Collect) else None
