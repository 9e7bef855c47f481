"""Rules between the settings of a PPO stage."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_ray.config.effects import learners
from rlhf_ray.config.problems import KeyPath, Problem
from rlhf_ray.config.role_rules import active_filters, prompt_rules, sampling_rules
from rlhf_ray.config.schema import Critic, Ppo

GROUP_ESTIMATORS = ("group_relative", "leave_one_out", "reinforce_baseline")


def ppo_rules(stage: Ppo, path: KeyPath) -> Iterator[Problem]:
    """What a PPO stage cannot be."""
    yield from _estimator(stage, path)
    yield from _kl(stage, path)
    yield from _sampling(stage, path)
    yield from _batches(stage, path)
    yield from _turns(stage, path)
    yield from prompt_rules(stage.data, (*path, "data"))


def _estimator(stage: Ppo, path: KeyPath) -> Iterator[Problem]:
    estimator = stage.advantages.estimator
    if estimator not in GROUP_ESTIMATORS:
        return
    cause = (*path, "advantages", "estimator")
    if stage.critic is not None:
        yield Problem(
            (*path, "critic"),
            f"got a critic, but {estimator} has none; remove it, or set advantages.estimator to gae",
            because=(cause,),
        )
    if stage.sampling.samples_per_prompt < 2:
        yield Problem(
            (*path, "sampling", "samples_per_prompt"),
            f"got {stage.sampling.samples_per_prompt}, wanted at least 2: {estimator} compares a prompt's samples",
            because=(cause,),
        )


def _kl(stage: Ppo, path: KeyPath) -> Iterator[Problem]:
    kl, where = stage.kl, (*path, "kl")
    place = stage.kl_place
    if place == "loss" and kl.estimator == "k1":
        yield Problem(
            (*where, "estimator"),
            "got k1, wanted k2 or k3: as a loss k1 has no expected gradient",
            because=((*where, "place"), (*path, "advantages", "estimator")),
        )
    if place == "off" or kl.controller != "adaptive":
        return
    if kl.target is None:
        yield Problem(
            (*where, "target"),
            "missing; the adaptive controller needs a target in nats per sequence, such as 6",
            because=((*where, "controller"), (*where, "place")),
        )
    if kl.coefficient == 0:
        yield Problem(
            (*where, "coefficient"),
            "got 0, wanted above 0: the adaptive controller multiplies it, so it would stay 0",
            because=((*where, "controller"), (*where, "place")),
        )
    samples = stage.prompts_per_iteration * stage.sampling.samples_per_prompt
    if samples >= 5 * kl.horizon:
        yield Problem(
            (*where, "horizon"),
            f"got {kl.horizon:g}, wanted more than a fifth of an iteration's {samples} samples",
            because=((*path, "prompts_per_iteration"), (*path, "sampling", "samples_per_prompt")),
        )


def _sampling(stage: Ppo, path: KeyPath) -> Iterator[Problem]:
    sampling, where = stage.sampling, (*path, "sampling")
    yield from sampling_rules(sampling, where, greedy="greedy sampling is for evaluation (evaluation.temperature)")
    longest = stage.evaluation.max_new_tokens
    if longest is not None and sampling.min_new_tokens > longest:
        yield Problem(
            (*path, "evaluation", "max_new_tokens"),
            f"got {longest}, wanted at least sampling.min_new_tokens, {sampling.min_new_tokens}",
            because=((*where, "min_new_tokens"),),
        )
    filters = active_filters(sampling)
    if stage.old_logprobs == "generator" and filters:
        yield Problem(
            (*path, "old_logprobs"),
            f"got generator, wanted learner: with {', '.join(filters)} the generator's log-probabilities are not the "
            "policy's",
            because=tuple((*where, name) for name in filters),
        )


def _turns(stage: Ppo, path: KeyPath) -> Iterator[Problem]:
    if stage.staleness == 0:
        return
    asked = [((*path, "generator", "sleep"), stage.generator.sleep)]
    asked += [((*path, *role, "offload"), learner.offload) for role, learner in learners(stage)]
    for where, on in asked:
        if on:
            yield Problem(
                where,
                f"got true, wanted false, or staleness 0: with staleness {stage.staleness} the generators sample while "
                "the learners train, so neither can leave the GPU",
                because=((*path, "staleness"),),
            )


def _batches(stage: Ppo, path: KeyPath) -> Iterator[Problem]:
    samples = stage.prompts_per_iteration * stage.sampling.samples_per_prompt
    sizes = ((*path, "prompts_per_iteration"), (*path, "sampling", "samples_per_prompt"))
    product = f"{stage.prompts_per_iteration} prompts x {stage.sampling.samples_per_prompt} samples"
    if stage.mini_batches > samples:
        yield Problem(
            (*path, "mini_batches"),
            f"got {stage.mini_batches}, wanted at most the samples of an iteration, {samples} ({product})",
            because=sizes,
        )
        return
    for role, learner in learners(stage):
        if isinstance(learner, Critic) and learner.kind == "value_head":
            continue
        if learner.workers > samples // stage.mini_batches:
            yield Problem(
                (*path, *role, "workers"),
                f"got {learner.workers}, but a mini-batch has only {samples // stage.mini_batches} samples "
                f"({product} / {stage.mini_batches} mini-batches); wanted at least one for each worker",
                because=(*sizes, (*path, "mini_batches")),
            )
