"""Reference, old log-probabilities, values and reward model against bare dense forward passes of the same network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from rlhf_ray.bench import workload
from rlhf_ray.bench.bare_training import BareTraining, Dtype, Network
from rlhf_ray.bench.figures import Figure, Settings, compared, cost
from rlhf_ray.bench.learn import learner_of, sequences
from rlhf_ray.config import schema
from rlhf_ray.data.batches import Rollouts, Sequences
from rlhf_ray.distributed.place import Place
from rlhf_ray.shapes import SequenceFloat
from rlhf_ray.workers.scorers import ModelScorer, ReferenceScorer

AT_LEAST = 0.80


def measure(settings: Settings) -> list[Figure]:
    """Real tokens per CPU-second."""
    model = workload.save_model(settings.folder / "model")
    reward_model = save_reward_model(model, settings.folder / "reward_model")
    figures = []
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        reference = ReferenceScorer(
            Place("reference", 0, 1), config=schema.Reference(dtype=dtype), model=str(model), revision=None
        )
        reward = ModelScorer(
            Place("reward", 0, 1),
            config=schema.ModelReward(kind="model", model=str(reward_model), dtype=dtype),
            model=str(reward_model),
            policy_tokenizer=str(model),
        )
        policy, critic = learner_of(model, dtype, "policy"), learner_of(model, dtype, "critic")
        judges: dict[str, tuple[Network, Callable[[Sequences], object]]] = {
            "reference": ("language_model", partial(reference.logprobs, temperature=1.0)),
            "policy": ("language_model", policy.logprobs),
            "critic": ("trunk", critic.values),
            "reward": ("trunk", partial(_score, reward)),
        }
        floors = {network: BareTraining(model, dtype, network=network) for network, _ in judges.values()}
        for name, (network, judge) in judges.items():
            settings.say(f"{name}, {dtype}")
            figures.append(
                compared(
                    f"score/{name}/{dtype}",
                    judging(judge),
                    floors[network].forward_tokens_per_cpu_second,
                    unit="tokens per CPU-second",
                    repeats=settings.repeats,
                    at_least=AT_LEAST,
                )
            )
        policy.close()
        critic.close()
    return figures


def _score(scorer: ModelScorer, rows: Sequences) -> SequenceFloat:
    return scorer.score(rollouts(rows))


def judging(judge: Callable[[Sequences], object]) -> Callable[[], float]:
    """A function that judges samples of new lengths at every call, and gives tokens per CPU-second."""
    calls = 0

    def work() -> float:
        nonlocal calls
        calls += 1
        rows = sequences(calls)

        def once() -> float:
            judge(rows)
            return float(rows.attention_mask.sum())

        return cost(once).per_cpu_second

    return work


def save_reward_model(model: Path, directory: Path) -> Path:
    """Writes a reward model with a language model's trunk and tokenizer; gives the directory."""
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(directory)
    workload.tokenizer().save_pretrained(directory)
    return directory


def rollouts(rows: Sequences) -> Rollouts:
    """Rows as a generator would hand them over, with empty texts."""
    count = len(rows)
    return Rollouts(
        sequences=rows,
        generator_logprobs=torch.zeros(rows.tokens.shape),
        finished=torch.ones(count, dtype=torch.bool),
        prompts=[""] * count,
        responses=[""] * count,
        answers=[None] * count,
        prompt_ids=torch.arange(count),
        policy_versions=torch.zeros_like(rows.tokens),
    )
