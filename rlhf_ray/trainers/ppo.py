"""Proximal policy optimization (arXiv:1707.06347) and its relatives without a critic.

One iteration: the generators sample responses, the scorers and networks judge them, the learners
update policy and critic, and the new weights go to the generators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlhf_ray.algorithms.advantages import (
    broadcast_to_tokens,
    gae,
    group_relative,
    leave_one_out,
    reinforce_baseline,
)
from rlhf_ray.algorithms.kl import AdaptiveKlController, FixedKlController
from rlhf_ray.algorithms.masked import masked_whiten
from rlhf_ray.algorithms.policy_losses import ClippedPolicyLoss, KlLoss, ValueLoss, truncated_importance_weights
from rlhf_ray.algorithms.rewards import shape_scores, token_rewards
from rlhf_ray.config import schema
from rlhf_ray.data.batches import Experience, Rollouts
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.distributed.groups import Pending, WorkerGroup, gather
from rlhf_ray.shapes import SequenceFloat, TokenFloat
from rlhf_ray.trainers.evaluation import evaluate_prompts, weighted_sum, worker_metrics
from rlhf_ray.trainers.metrics import experience_metrics, prefixed, rollout_metrics
from rlhf_ray.trainers.reference import reference_logprobs
from rlhf_ray.trainers.run import StageRun
from rlhf_ray.trainers.weight_sync import WeightSync
from rlhf_ray.workers.generator import Generator
from rlhf_ray.workers.learner import Learner, Values
from rlhf_ray.workers.objectives import JointObjective, Objective, PolicyObjective, ValueObjective
from rlhf_ray.workers.scorers import ReferenceScorer, RewardScorer

KlController = FixedKlController | AdaptiveKlController


@dataclass(frozen=True)
class PpoGroups:
    """The worker groups of a PPO stage.

    Args:
        critic: the policy group itself where the value head sits on the policy's trunk; None for the group estimators.
        reference: None where the KL term is off, or where the policy with its adapter off is the reference.
        rewards: one group for each scorer, by its name in the metrics.
    """

    policy: WorkerGroup[Learner]
    critic: WorkerGroup[Learner] | None
    reference: WorkerGroup[ReferenceScorer] | None
    generator: WorkerGroup[Generator]
    rewards: dict[str, WorkerGroup[RewardScorer]]


def train_ppo(
    config: schema.Ppo,
    groups: PpoGroups,
    prompts: PromptSet,
    held_out: PromptSet | None,
    weights: WeightSync,
    kl: KlController,
    run: StageRun,
) -> None:
    """Runs the iterations that are left, each ending with synced, attested weights."""
    weights.sync(version=run.iteration)
    if run.iteration == 0:
        run.record(evaluate(config, groups, held_out, run, iteration=0))
    for iteration in run.remaining():
        batch = prompts.batch(iteration - 1, config.prompts_per_iteration)
        rollouts = groups.generator.split(
            Generator.generate, batch, config.sampling, iteration=iteration
        ).result()  # y ~ pi_old(.|x)
        parts, reference, old, values = gather_judgements(config, groups, rollouts)
        scores = weighted_sum(config.reward, parts)
        experience, summary = make_experience(config, rollouts, scores, reference, old, values, kl.coefficient)
        run.write_rollouts(rollouts, scores=scores, parts=parts, kl=summary.kl_per_sequence)
        if config.attests_rollouts:
            weights.check_rollouts(rollouts, old)
        losses = update(config, groups, experience, kl.coefficient, iteration)
        metrics = rollout_metrics(rollouts, scores, parts) | experience_metrics(experience, rollouts) | summary.metrics
        metrics["kl/coefficient"] = kl.coefficient
        metrics["generator/policy_version_lag"] = float((iteration - 1 - rollouts.oldest_versions()).max())
        if summary.kl_per_sequence is not None:
            kl.update(float(summary.kl_per_sequence.mean()), len(rollouts))
        metrics |= losses | weights.sync(version=iteration)
        metrics |= worker_metrics(memory_asked(groups), groups.rewards)
        metrics = {name: value for name, value in metrics.items() if not name.startswith(unmeasured(config))}
        if run.evaluation_due(iteration, every=config.evaluation.every):
            metrics |= evaluate(config, groups, held_out, run, iteration=iteration)
        run.finish_iteration(metrics)


def unmeasured(config: schema.Ppo) -> tuple[str, ...]:
    """Beginnings of the names of metrics that say nothing in this pipeline."""
    without_reference = ("kl/",) if config.kl_place == "off" else ()
    without_old = ("generator/logprob_diff",) if config.old_logprobs == "generator" else ()
    return without_reference + without_old


def memory_asked(groups: PpoGroups) -> dict[str, Pending[list[float]]]:
    """The peak memory of each role's workers, the scorers' aside."""
    asked = {"policy": groups.policy.all(Learner.memory), "generator": groups.generator.all(Generator.memory)}
    if groups.critic is not None and groups.critic is not groups.policy:
        asked["critic"] = groups.critic.all(Learner.memory)
    if groups.reference is not None:
        asked["reference"] = groups.reference.all(ReferenceScorer.memory)
    return asked


def evaluate(
    config: schema.Ppo, groups: PpoGroups, held_out: PromptSet | None, run: StageRun, *, iteration: int
) -> dict[str, float]:
    """Metrics on the held-out prompts, whose samples are kept; none where there are no such prompts."""
    if held_out is None:
        return {}
    with run.evaluating():
        sampling = evaluation_sampling(config)
        found = evaluate_prompts(
            groups.generator, held_out.all(), sampling, scorers=groups.rewards, rewards=config.reward
        )
        run.write_evaluation(found.rollouts, iteration=iteration, scores=found.scores, parts=found.parts)
    return found.metrics


def evaluation_sampling(config: schema.Ppo) -> schema.Sampling:
    """How an evaluation samples: lengths and stop strings are training's, filters and penalties are off."""
    settings = config.evaluation
    return schema.Sampling(
        temperature=settings.temperature,
        samples_per_prompt=settings.samples_per_prompt,
        min_new_tokens=config.sampling.min_new_tokens,
        max_new_tokens=settings.max_new_tokens or config.sampling.max_new_tokens,
        stop=config.sampling.stop,
    )


def gather_judgements(
    config: schema.Ppo, groups: PpoGroups, rollouts: Rollouts
) -> tuple[dict[str, SequenceFloat], TokenFloat, TokenFloat, Values]:
    """Each scorer's scores [B] by name, log pi_ref and log pi_old [B, T], and the values, asked for at once."""
    temperature = config.sampling.temperature
    sequences = rollouts.sequences
    scores = [group.split(RewardScorer.score, rollouts) for group in groups.rewards.values()]
    reference = (
        None
        if config.kl_place == "off"
        else reference_logprobs(groups.reference, groups.policy, sequences, temperature)
    )
    recompute = config.old_logprobs == "learner"
    old = groups.policy.split(Learner.logprobs, sequences) if recompute else None
    values = groups.critic and groups.critic.split(Learner.values, sequences)
    asked: list[Pending[Any]] = [*scores, *(pending for pending in (reference, old, values) if pending)]
    gather(*asked)  # whichever fails first is raised at once

    old_logprobs = old.result() if old else rollouts.generator_logprobs
    zeros = torch.zeros_like(rollouts.generator_logprobs)
    return (
        dict(zip(groups.rewards, (pending.result() for pending in scores), strict=True)),
        reference.result() if reference else old_logprobs,
        old_logprobs,
        values.result() if values else Values(zeros, zeros[:, 0]),
    )


@dataclass(frozen=True)
class Summary:
    """What the loop needs of an iteration's experience: KL per sequence [B] in nats (None where off), and metrics."""

    kl_per_sequence: SequenceFloat | None
    metrics: dict[str, float]


def make_experience(
    config: schema.Ppo,
    rollouts: Rollouts,
    scores: SequenceFloat,
    reference: TokenFloat,
    old: TokenFloat,
    values: Values,
    coefficient: float,
) -> tuple[Experience, Summary]:
    """Scores and log-probabilities -> what the learners learn from.

    Token rewards are -coefficient * k1 on every response token plus the score on the last one
    (arXiv:1909.08593); advantages by the configured estimator, whitened over the whole batch.
    """
    mask = rollouts.sequences.response_mask
    shaped = shape_scores(
        scores,
        rollouts.finished,
        clip=config.scores.clip,
        missing_eos_penalty=config.scores.missing_eos_penalty,
    )
    in_reward = config.kl_place == "reward"
    rewards = token_rewards(
        shaped,
        old,
        reference,
        mask,
        coefficient=coefficient if in_reward else 0.0,
        estimator=config.kl_estimator if in_reward else "k1",
    )
    settings = config.advantages
    if settings.estimator == "gae":
        unfinished = ~rollouts.finished & settings.bootstrap_truncated
        bootstrap = torch.where(unfinished, values.final, torch.zeros_like(values.final))
        advantages, returns = gae(rewards, values.values, mask, bootstrap, gamma=settings.gamma, lam=settings.lam)
    else:
        advantages = broadcast_to_tokens(group_advantages(config, rewards.sum(1)), mask)
        returns = torch.zeros_like(advantages)
    if config.whiten:
        advantages = masked_whiten(advantages, mask)

    if config.corrects_generator:
        correction, capped = truncated_importance_weights(
            old, rollouts.generator_logprobs, mask, cap=config.correction.cap
        )
    else:
        correction, capped = torch.ones_like(old), torch.zeros_like(mask)
    experience = Experience(
        sequences=rollouts.sequences,
        old_logprobs=old,
        reference_logprobs=reference,
        values=values.values,
        advantages=advantages,
        returns=returns,
        correction=correction,
    )
    tokens = mask.sum().clamp(min=1)
    metrics = {
        "correction/weight_mean": float((correction * mask).sum() / tokens),
        "correction/capped_share": float(capped.sum() / tokens),
        "reward/shaped_mean": float(shaped.mean()),
    }
    kl_per_sequence = None if config.kl_place == "off" else ((old - reference) * mask).sum(1)
    return experience, Summary(kl_per_sequence, metrics)


def group_advantages(config: schema.Ppo, sequence_rewards: SequenceFloat) -> SequenceFloat:
    """[B] advantages of the samples of one prompt against each other."""
    size = config.sampling.samples_per_prompt
    match config.advantages.estimator:
        case "group_relative":
            return group_relative(sequence_rewards, group_size=size, divide_by_std=config.advantages.divide_by_std)
        case "leave_one_out":
            return leave_one_out(sequence_rewards, group_size=size)
        case _:
            return reinforce_baseline(sequence_rewards, group_size=size)


def update(
    config: schema.Ppo, groups: PpoGroups, experience: Experience, coefficient: float, iteration: int
) -> dict[str, float]:
    """Lets policy and critic learn from the experience; the losses' metrics by name."""
    settings = config.policy_loss
    surrogate = ClippedPolicyLoss(
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
        entropy_coefficient=settings.entropy_coefficient,
        aggregation=settings.aggregation,
    )
    kl = KlLoss(config.kl_estimator, coefficient, settings.aggregation) if config.kl_place == "loss" else None
    policy = PolicyObjective(surrogate, kl)
    value = ValueObjective(ValueLoss(config.value_loss.clip, settings.aggregation))
    critic = config.critic_role

    def learn(group: WorkerGroup[Learner], objective: Objective[Experience]) -> Pending[list[dict[str, float]]]:
        return group.all(
            Learner.update,
            experience,
            objective,
            epochs=config.epochs,
            mini_batches=config.mini_batches,
            iteration=iteration,
        )

    if critic is None:
        return prefixed("policy", learn(groups.policy, policy).result()[0])
    if critic.kind == "value_head":
        joint = JointObjective(policy, value, config.value_loss.coefficient)
        return prefixed("policy", learn(groups.policy, joint).result()[0])
    assert groups.critic is not None, "a critic network has a group"
    if iteration <= critic.warmup_iterations:
        return prefixed("critic", learn(groups.critic, value).result()[0])
    of_policy, of_critic = gather(learn(groups.policy, policy), learn(groups.critic, value))
    skipped = of_policy[0]["guard/skipped_steps"] + of_critic[0]["guard/skipped_steps"]
    both = prefixed("policy", of_policy[0]) | prefixed("critic", of_critic[0])
    return both | {"guard/skipped_steps": skipped}
