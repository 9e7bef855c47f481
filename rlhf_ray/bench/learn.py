"""Policy and critic in training, a mini-batch of all samples at a time, against a bare dense training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.algorithms.policy_losses import ClippedPolicyLoss, ValueLoss
from rlhf_ray.bench import workload
from rlhf_ray.bench.bare_training import BareTraining, Dtype, Network
from rlhf_ray.bench.figures import Figure, Settings, compared, cost
from rlhf_ray.config import schema
from rlhf_ray.data.batches import Experience, Sequences, make_sequences
from rlhf_ray.distributed.place import Place
from rlhf_ray.models.heads import Head
from rlhf_ray.workers.learner import Learner
from rlhf_ray.workers.objectives import Objective, PolicyObjective, ValueObjective

SAMPLES = 64
AT_LEAST: dict[Dtype, float] = {"float32": 0.82, "bfloat16": 0.65}


@dataclass(frozen=True)
class Learning:
    """A network that learns, and its floor: the same network on dense rows.

    Args:
        head: of the learner.
        floor: of the bare training step.
        objective: what is minimised.
    """

    head: Head
    floor: Network
    objective: Objective[Experience]


LEARNING: dict[str, Learning] = {
    "policy": Learning(
        "none",
        "language_model",
        PolicyObjective(
            ClippedPolicyLoss(
                clip_low=0.2, clip_high=0.2, dual_clip=None, entropy_coefficient=0.0, aggregation="token_mean"
            ),
            kl=None,
        ),
    ),
    "critic": Learning("value", "trunk", ValueObjective(ValueLoss(clip=0.2, aggregation="token_mean"))),
}


def measure(settings: Settings) -> list[Figure]:
    """Real tokens per CPU-second of one optimizer step."""
    model = workload.save_model(settings.folder / "model")
    figures = []
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        for name in ("policy",) if settings.quick else LEARNING:
            learning = LEARNING[name]
            settings.say(f"{name}, {dtype}")
            bare = BareTraining(model, dtype, network=learning.floor)
            learner = learner_of(model, dtype, name)
            figures.append(
                compared(
                    f"learn/{name}/{dtype}",
                    steps(learner, learning.objective),
                    bare.tokens_per_cpu_second,
                    unit="tokens per CPU-second",
                    repeats=settings.repeats,
                    at_least=AT_LEAST[dtype],
                )
            )
            learner.close()
    return figures


def learner_of(model: Path, dtype: Dtype, name: str, **settings: Any) -> Learner:
    """A learner in this process.

    Args:
        settings: of the network's section, beside the type of its weights.
    """
    return Learner(
        Place(name, 0, 1),
        config=schema.Learner(dtype=dtype, zero=2 if dtype == "bfloat16" else 0, **settings),
        model=str(model),
        revision=None,
        head=LEARNING[name].head,
        seed=1,
        total_steps=1000,
    )


def steps(learner: Learner, objective: Objective[Experience]) -> Callable[[], float]:
    """A function that learns from samples of new lengths at every call, and gives tokens per CPU-second."""
    calls = 0

    def step() -> float:
        nonlocal calls
        calls += 1
        batch = experience(sequences(calls))
        tokens = float(batch.sequences.lengths().sum())

        def work() -> float:
            learner.update(batch, objective, epochs=1, mini_batches=1, iteration=calls)
            return tokens

        return cost(work).per_cpu_second

    return step


def sequences(seed: int, count: int = SAMPLES) -> Sequences:
    """Prompts and responses of the workload; each seed has lengths of its own."""
    return make_sequences(workload.prompts(count, seed=2 * seed), workload.responses(count, seed=2 * seed + 1))


def experience(samples: Sequences) -> Experience:
    """What PPO learns from: random advantages and returns, and old log-probabilities near those of random weights."""
    random = torch.Generator().manual_seed(0)
    shape = samples.tokens.shape
    old = torch.full(shape, -8.3)
    return Experience(
        sequences=samples,
        old_logprobs=old,
        reference_logprobs=old,
        values=torch.zeros(shape),
        advantages=torch.randn(shape, generator=random),
        returns=torch.randn(shape, generator=random),
        correction=torch.ones(shape),
    )
