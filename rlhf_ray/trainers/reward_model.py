"""A reward model by the Bradley-Terry loss: of two answers to a prompt the preferred one gets the higher score."""

from __future__ import annotations

import torch

from rlhf_ray.algorithms.preference_losses import BradleyTerryLoss, preferred
from rlhf_ray.config import schema
from rlhf_ray.data.batches import PreferencePairs, Sequences
from rlhf_ray.data.preferences import PreferenceSet
from rlhf_ray.distributed.groups import WorkerGroup
from rlhf_ray.shapes import SequenceFloat, SequenceMask
from rlhf_ray.trainers.metrics import prefixed
from rlhf_ray.trainers.run import StageRun
from rlhf_ray.workers.learner import Learner
from rlhf_ray.workers.objectives import BradleyTerryObjective

BINS = 10
"""Equal parts of the confidences from 1/2 to 1 that the calibration error compares."""
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
            before = {} if held_out is None else evaluate_pairs(policy, held_out.all())
        run.record(before)
    for step in run.remaining():
        batch = pairs.batch(step - 1, config.batch_size)
        stats = policy.all(Learner.update, batch, objective, epochs=1, mini_batches=1, iteration=step).result()[0]
        metrics = prefixed("policy", stats)
        metrics["policy/tokens"] = float(batch.chosen.attention_mask.sum() + batch.rejected.attention_mask.sum())
        if held_out is not None and run.evaluation_due(step, every=config.evaluation.every):
            with run.evaluating():
                metrics |= evaluate_pairs(policy, held_out.all())
        run.finish_iteration(metrics)


def evaluate_pairs(policy: WorkerGroup[Learner], pairs: PreferencePairs) -> dict[str, float]:
    """The metrics of `judge_pairs` under `evaluation/`."""
    chosen, rejected = _scores(policy, pairs)
    longer = pairs.chosen.response_mask.sum(1) - pairs.rejected.response_mask.sum(1)
    found = judge_pairs(chosen, rejected, pairs.margins, longer=longer > 0, shorter=longer < 0)
    return {f"evaluation/{name}": value for name, value in found.items()}


def judge_pairs(
    chosen: SequenceFloat,
    rejected: SequenceFloat,
    margins: SequenceFloat,
    *,
    longer: SequenceMask,
    shorter: SequenceMask,
) -> dict[str, float]:
    """How well scores agree with preferences.

    Args:
        chosen: scores of the preferred answers.
        rejected: scores of the other answers.
        margins: by how much the chosen answer is better; 0 where the data do not say.
        longer: the preferred answer is the longer one.
        shorter: the preferred answer is the shorter one.

    Returns:
        `loss`; `accuracy` (an equal score counts half), the same of the pairs whose chosen answer is the longer or the
        shorter one, where there are such pairs; `margin`, the mean of chosen less rejected score; `calibration_error`.
    """
    correct = preferred(chosen, rejected)
    loss = BradleyTerryLoss()(chosen, rejected, margins)[0] / len(chosen)
    metrics = {
        "accuracy": float(correct.mean()),
        "loss": float(loss),
        "margin": float((chosen - rejected).mean()),
        "calibration_error": calibration_error(chosen - rejected),
    }
    for name, mask in (("longer", longer), ("shorter", shorter)):
        if mask.any():
            metrics[f"accuracy_chosen_{name}"] = float(correct[mask].mean())
    return metrics


def calibration_error(differences: SequenceFloat) -> float:
    """Expected calibration error (arXiv:1706.04599, eq. 3) of the preferences that the scores predict.

    The confidence in a preference is sigmoid(|difference|); the error is the mean over the pairs of
    |mean confidence - accuracy| of the pair's bin.

    Args:
        differences: score of the chosen answer less that of the rejected one.
    """
    confidence = torch.sigmoid(differences.abs().double())
    correct = preferred(differences, torch.zeros_like(differences)).double()
    bins = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, confidence - correct)
    return float(gaps.abs().sum() / len(differences))


def score_statistics(policy: WorkerGroup[Learner], pairs: PreferenceSet) -> dict[str, float]:
    """Mean and standard deviation of the scores of training answers, chosen and rejected ones alike."""
    scores = torch.cat(_scores(policy, pairs.batch(0, min(STATISTICS_PAIRS, len(pairs)))))
    return {"score_mean": float(scores.mean()), "score_std": float(scores.std(correction=0))}


def _scores(policy: WorkerGroup[Learner], pairs: PreferencePairs) -> tuple[SequenceFloat, SequenceFloat]:
    both = Sequences.concat([pairs.chosen, pairs.rejected])
    chosen, rejected = policy.split(Learner.scores, both).result().chunk(2)
    return chosen, rejected
