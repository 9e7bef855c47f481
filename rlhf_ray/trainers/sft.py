"""Supervised fine-tuning: the negative log-likelihood of responses, or of whole texts."""

from __future__ import annotations

import math

from rlhf_ray.config import schema
from rlhf_ray.data.preferences import PreferenceSet
from rlhf_ray.data.streams import Stream
from rlhf_ray.data.texts import TextSet
from rlhf_ray.distributed.groups import WorkerGroup
from rlhf_ray.trainers.evaluation import worker_metrics
from rlhf_ray.trainers.metrics import prefixed
from rlhf_ray.trainers.run import StageRun
from rlhf_ray.workers.learner import Learner
from rlhf_ray.workers.objectives import LanguageObjective


def total_steps(config: schema.Sft | schema.RewardModel | schema.Dpo, data: TextSet | PreferenceSet | Stream) -> int:
    """Optimizer steps of the whole stage."""
    if config.steps is not None:
        return config.steps
    # 1.1 times 100 is a little more than 110 in floating point, and 110 steps are meant.
    return max(1, math.ceil((config.epochs or 1) * data.steps_per_epoch(config.batch_size) - 1e-6))


def train_sft(
    config: schema.Sft, policy: WorkerGroup[Learner], texts: TextSet, held_out: TextSet | None, run: StageRun
) -> None:
    """Runs the optimizer steps that are left; an iteration is one step."""
    objective = LanguageObjective()
    for step in run.remaining():
        batch = texts.batch(step - 1, config.batch_size)
        stats = policy.all(Learner.update, batch, objective, epochs=1, mini_batches=1, iteration=step).result()[0]
        metrics = prefixed("policy", stats)
        metrics["policy/tokens"] = float(batch.attention_mask.sum())
        due = run.evaluation_due(step, every=config.evaluation.every)
        if due:
            metrics |= worker_metrics({"policy": policy.all(Learner.memory)}, {})
        if held_out is not None and due:
            with run.evaluating():
                metrics |= evaluate_texts(policy, held_out)
        run.finish_iteration(metrics)


def evaluate_texts(policy: WorkerGroup[Learner], held_out: TextSet) -> dict[str, float]:
    """Validation loss in nats per trained token, and its perplexity."""
    loss = policy.all(Learner.evaluate_loss, held_out.all()).result()[0]
    return {"evaluation/loss": loss, "evaluation/perplexity": math.exp(min(loss, 50.0))}
