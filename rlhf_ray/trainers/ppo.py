"""Proximal policy optimization (arXiv:1707.06347) and its relatives without a critic.

One iteration: the generators sample responses, the scorers and networks judge those that are finished, the learners
update policy and critic, and the new weights go to the generators. With staleness the next responses are sampled
meanwhile, with the weights that the generators have.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
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
from rlhf_ray.data.batches import Batch, Experience, Rollouts
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.distributed.background import in_background
from rlhf_ray.distributed.groups import Pending, WorkerGroup, gather, merge
from rlhf_ray.shapes import SequenceFloat, TokenFloat
from rlhf_ray.trainers.evaluation import evaluate_prompts, weighted_sum, worker_metrics
from rlhf_ray.trainers.metrics import experience_metrics, prefixed, rollout_metrics
from rlhf_ray.trainers.reference import reference_logprobs
from rlhf_ray.trainers.run import StageRun
from rlhf_ray.trainers.sampling import Piece, SampleStream
from rlhf_ray.trainers.scaling import Scaling
from rlhf_ray.trainers.turns import GpuTurns
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
    samples: SampleStream,
    held_out: PromptSet | None,
    weights: WeightSync,
    turns: GpuTurns,
    kl: KlController,
    scaling: Scaling,
    run: StageRun,
) -> None:
    """Runs the iterations that are left, each ending with synced, attested weights."""
    weights.sync(version=run.iteration)
    if run.iteration == 0:
        run.record(evaluate(config, groups, held_out, run, iteration=0))
    for iteration in run.remaining():
        scaling.begin(iteration)
        rollouts, parts, reference, old, values = gather_judgements(
            groups,
            [judge(config, groups, piece) for piece in turns.sampled(samples.pieces(iteration))],  # y ~ pi(.|x)
        )
        scores = weighted_sum(config.reward, parts)
        experience, summary = make_experience(config, rollouts, scores, reference, old, values, kl.coefficient)
        run.write_rollouts(rollouts, scores=scores, parts=parts, kl=summary.kl_per_sequence)
        own = iteration - 1  # the version of the learner's weights
        attested = weights.check_rollouts(rollouts, old, version=own) if config.attests_rollouts else {}
        described = in_background(partial(describe, rollouts, scores, parts, experience, version=own))
        losses = update(config, groups, experience, kl.coefficient, iteration)
        metrics = described.result() | summary.metrics | attested | {"kl/coefficient": kl.coefficient}
        if summary.kl_per_sequence is not None:
            kl.update(float(summary.kl_per_sequence.mean()), len(rollouts))
        metrics["generator/workers"] = float(groups.generator.size)
        samples.wait()
        scaling.settle(samples, weights)
        metrics |= losses | weights.sync(version=iteration, interrupted=samples.interrupted)
        metrics |= worker_metrics(memory_asked(groups), groups.rewards)
        metrics = {name: value for name, value in metrics.items() if not name.startswith(unmeasured(config))}
        if run.evaluation_due(iteration, every=config.evaluation.every):
            metrics |= evaluate(config, groups, held_out, run, iteration=iteration)
        run.finish_iteration(metrics)


def describe(
    rollouts: Rollouts,
    scores: SequenceFloat,
    parts: dict[str, SequenceFloat],
    experience: Experience,
    *,
    version: int,
) -> dict[str, float]:
    """Metrics of the samples and of what is learnt from them; `version` is that of the learner's weights."""
    lag = {"generator/policy_version_lag": float((version - rollouts.oldest_versions()).max())}
    return rollout_metrics(rollouts, scores, parts) | experience_metrics(experience, rollouts, version=version) | lag


def optimizer_steps(config: schema.Ppo) -> dict[str, int]:
    """Optimizer steps of the whole stage by role; of the critic where it is a network of its own."""
    each = config.epochs * config.mini_batches
    critic = config.critic_role
    if critic is None or critic.kind == "value_head":
        return {"policy": (config.iterations - (critic.warmup_iterations if critic else 0)) * each}
    return {"policy": (config.iterations - critic.warmup_iterations) * each, "critic": config.iterations * each}


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


@dataclass(frozen=True)
class Judging:
    """What the scorers and networks were asked about some samples; None where nobody is asked."""

    piece: Piece
    scores: list[Pending[SequenceFloat]]
    reference: Pending[TokenFloat] | None
    old: Pending[TokenFloat] | None
    values: Pending[Values] | None

    @property
    def asked(self) -> list[Pending[Any]]:
        """All that is on its way."""
        return [*self.scores, *(pending for pending in (self.reference, self.old, self.values) if pending)]


def judge(config: schema.Ppo, groups: PpoGroups, piece: Piece) -> Judging:
    """Asks for each scorer's scores [C], log pi_ref and log pi_old [C, T] and the values, all at once."""
    temperature = config.sampling.temperature
    sequences = piece.rollouts.sequences
    return Judging(
        piece=piece,
        scores=[group.split(RewardScorer.score, piece.rollouts) for group in groups.rewards.values()],
        reference=None
        if config.kl_place == "off"
        else reference_logprobs(groups.reference, groups.policy, sequences, temperature),
        old=groups.policy.split(Learner.logprobs, sequences) if config.old_logprobs == "learner" else None,
        values=None if groups.critic is None else groups.critic.split(Learner.values, sequences),
    )


def gather_judgements(
    groups: PpoGroups, judged: list[Judging]
) -> tuple[Rollouts, dict[str, SequenceFloat], TokenFloat, TokenFloat, Values]:
    """All samples, each scorer's scores [B] by name, log pi_ref and log pi_old [B, T], and the values, in row order."""
    gather(*(pending for judging in judged for pending in judging.asked))  # whichever fails first is raised at once
    order = torch.cat([judging.piece.rows for judging in judged]).argsort()

    def whole(parts: list[Any]) -> Any:
        joined = merge(parts)
        return joined.select(order.tolist()) if isinstance(joined, Batch) else joined[order]

    def results(pending: list[Pending[Any] | None]) -> Any:
        return whole([item.result() for item in pending if item]) if all(pending) else None

    rollouts = whole([judging.piece.rollouts for judging in judged])
    scores = zip(*(judging.scores for judging in judged), strict=True)
    old = results([judging.old for judging in judged])
    old = rollouts.generator_logprobs if old is None else old
    reference = results([judging.reference for judging in judged])
    values = results([judging.values for judging in judged])
    zeros = torch.zeros_like(rollouts.generator_logprobs)
    return (
        rollouts,
        {name: results(list(found)) for name, found in zip(groups.rewards, scores, strict=True)},
        old if reference is None else reference,
        old,
        Values(zeros, zeros[:, 0]) if values is None else values,
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
    tokens = mask.count_nonzero().clamp(min=1)
    metrics = {
        "correction/weight_mean": float((correction * mask).sum() / tokens),
        "correction/capped_share": float(capped.count_nonzero() / tokens),
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
