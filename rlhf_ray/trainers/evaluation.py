"""Evaluation of a policy by its responses to held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Prompts, Rollouts
from rlhf_ray.distributed.groups import Pending, WorkerGroup, gather
from rlhf_ray.shapes import SequenceFloat
from rlhf_ray.trainers.metrics import distinct_bigram_share
from rlhf_ray.workers.generator import Generator
from rlhf_ray.workers.scorers import RewardScorer


@dataclass(frozen=True)
class Evaluation:
    """The policy's responses to held-out prompts, their scores [B], each scorer's part, and the metrics.

    Without a scorer the scores are NaN.
    """

    rollouts: Rollouts
    scores: SequenceFloat
    parts: dict[str, SequenceFloat]
    metrics: dict[str, float]


def evaluate_prompts(
    generator: WorkerGroup[Generator],
    held_out: Prompts,
    sampling: schema.Sampling,
    *,
    scorers: Mapping[str, WorkerGroup[RewardScorer]],
    rewards: tuple[schema.Reward, ...],
) -> Evaluation:
    """Samples with the same seeds in every evaluation, so that two of them compare the weights alone.

    Args:
        generator: the engines, which hold the policy's weights.
        held_out: the prompts.
        sampling: how responses are sampled.
        scorers: one group for each scorer, by its name in the metrics; there may be none.
        rewards: their settings, in the same order.
    """
    rollouts = generator.split(Generator.generate, held_out, sampling, iteration=0).result()
    metrics = {
        "evaluation/length_mean": float(rollouts.sequences.response_mask.sum(1).float().mean()),
        "evaluation/finished_share": float(rollouts.finished.float().mean()),
        "evaluation/distinct_bigram_share": distinct_bigram_share(rollouts.responses),
    }
    if not scorers:
        return Evaluation(rollouts, torch.full((len(rollouts),), torch.nan), {}, metrics)
    scores, parts = score_rollouts(rewards, scorers, rollouts)
    metrics |= {
        "evaluation/reward_mean": float(scores.mean()),
        "evaluation/reward_std": float(scores.std(correction=0)),
    }
    metrics |= {f"evaluation/{name}_mean": float(part.mean()) for name, part in parts.items() if len(parts) > 1}
    return Evaluation(rollouts, scores, parts, metrics)


def score_rollouts(
    rewards: tuple[schema.Reward, ...], scorers: Mapping[str, WorkerGroup[RewardScorer]], rollouts: Rollouts
) -> tuple[SequenceFloat, dict[str, SequenceFloat]]:
    """[B] weighted sums of the scorers' scores, and each scorer's own by name."""
    scored = gather(*(group.split(RewardScorer.score, rollouts) for group in scorers.values()))
    parts = dict(zip(scorers, scored, strict=True))
    return weighted_sum(rewards, parts), parts


def worker_metrics(
    memory: dict[str, Pending[list[float]]], rewards: dict[str, WorkerGroup[RewardScorer]]
) -> dict[str, float]:
    """Peak memory of each role's largest worker, and how many texts each scorer has cut so far.

    Args:
        memory: by role, what its workers were asked; the scorers are asked here.
        rewards: one group for each scorer.
    """
    asked = memory | {f"reward/{name}": group.all(RewardScorer.memory) for name, group in rewards.items()}
    counted = {name: group.all(RewardScorer.counts) for name, group in rewards.items()}
    metrics = {
        f"{role}/peak_memory_gib": max(peaks) for role, peaks in zip(asked, gather(*asked.values()), strict=True)
    }
    for name, workers in zip(counted, gather(*counted.values()), strict=True):
        for what in {what for counts in workers for what in counts}:
            metrics[f"reward/{name}_{what}"] = float(sum(counts.get(what, 0) for counts in workers))
    return metrics


def weighted_sum(rewards: tuple[schema.Reward, ...], parts: Mapping[str, SequenceFloat]) -> SequenceFloat:
    """[B] the scorers' scores, each times its weight, summed."""
    weighted = [settings.weight * scores for settings, scores in zip(rewards, parts.values(), strict=True)]
    total = weighted[0]
    for scores in weighted[1:]:
        total = total + scores
    return total
