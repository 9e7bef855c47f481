"""A reward model by the Bradley-Terry loss: of two answers to a prompt the preferred one gets the higher score."""

from __future__ import annotations

import torch

from rlhf_ray.config import schema
from rlhf_ray.data.batches import PreferencePairs, Sequences
from rlhf_ray.data.preferences import PreferenceSet
from rlhf_ray.distributed.groups import WorkerGroup
from rlhf_ray.shapes import SequenceFloat
from rlhf_ray.trainers.evaluation import worker_metrics
from rlhf_ray.trainers.metrics import prefixed
from rlhf_ray.trainers.preference_report import report_pairs
from rlhf_ray.trainers.run import StageRun
from rlhf_ray.workers.learner import Learner
from rlhf_ray.workers.objectives import BradleyTerryObjective

STATISTICS_PAIRS = 512
"""Most pairs of the training data that the mean and the spread of the scores are taken from."""


def train_reward_model(
    config: schema.RewardModel,
    policy: WorkerGroup[Learner],
    pairs: PreferenceSet,
    held_out: PreferenceSet | None,
    run: StageRun,
) -> None:
    """Runs the optimizer steps that are left; an iteration is one step."""
    objective = BradleyTerryObjective()
    if run.iteration == 0:
        with run.evaluating():
            before = {} if held_out is None else evaluate_pairs(policy, held_out.all(), run, iteration=0)
        run.record(before)
    for step in run.remaining():
        batch = pairs.batch(step - 1, config.batch_size)
        stats = policy.all(Learner.update, batch, objective, epochs=1, mini_batches=1, iteration=step).result()[0]
        metrics = prefixed("policy", stats)
        metrics["policy/tokens"] = float(batch.chosen.attention_mask.sum() + batch.rejected.attention_mask.sum())
        due = run.evaluation_due(step, every=config.evaluation.every)
        if due:
            metrics |= worker_metrics({"policy": policy.all(Learner.memory)}, {})
        if held_out is not None and due:
            with run.evaluating():
                metrics |= evaluate_pairs(policy, held_out.all(), run, iteration=step)
        run.finish_iteration(metrics)


def evaluate_pairs(
    policy: WorkerGroup[Learner], pairs: PreferencePairs, run: StageRun, *, iteration: int
) -> dict[str, float]:
    """The metrics of held-out pairs under `evaluation/`; the run keeps the report that they are part of."""
    chosen, rejected = _scores(policy, pairs)
    report = report_pairs(chosen, rejected, pairs)
    run.write_report(report, iteration=iteration, margins=chosen - rejected)
    return {f"evaluation/{name}": value for name, value in report.metrics.items()}


def score_statistics(policy: WorkerGroup[Learner], pairs: PreferenceSet) -> dict[str, float]:
    """Mean and standard deviation of the scores of training answers, chosen and rejected ones alike."""
    scores = torch.cat(_scores(policy, pairs.batch(0, min(STATISTICS_PAIRS, len(pairs)))))
    return {"score_mean": float(scores.mean()), "score_std": float(scores.std(correction=0))}


def _scores(policy: WorkerGroup[Learner], pairs: PreferencePairs) -> tuple[SequenceFloat, SequenceFloat]:
    both = Sequences.concat([pairs.chosen, pairs.rejected])
    chosen, rejected = policy.split(Learner.scores, both).result().chunk(2)
    return chosen, rejected
