"""How a stage's data becomes batches, mini-batches, forward passes and optimizer steps.

Every number comes from the functions that cut the batches in a run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from rlhf_ray.config import schema
from rlhf_ray.data.packing import balance, cut_mini_batches, learner_micro_batches
from rlhf_ray.data.streams import Stream
from rlhf_ray.distributed.groups import shares
from rlhf_ray.trainers.collect import batches, places_of
from rlhf_ray.trainers.ppo import optimizer_steps
from rlhf_ray.trainers.sampling import chunk_sizes
from rlhf_ray.trainers.sft import total_steps

Supervised = schema.Sft | schema.RewardModel | schema.Dpo


@dataclass(frozen=True)
class LearnerArithmetic:
    """What one learner does with a batch.

    Args:
        micro_batches: forward passes of each worker in the largest mini-batch, were every row as long as the settings
            allow; with one worker no mini-batch takes more.
        row_tokens: tokens of such a row; of both answers of a pair.
        steps: optimizer steps of the whole stage; None where the data is not there yet.
    """

    micro_batches: int
    row_tokens: int
    steps: int | None


@dataclass(frozen=True)
class StageArithmetic:
    """A stage in numbers; None where they depend on data that an earlier stage writes.

    Args:
        stage: its name.
        method: its method.
        unit: what a batch is made of: sequences, pairs or prompts.
        rows: rows of the training data, before any is dropped.
        iterations: outer steps.
        batch: units of a full batch.
        last_batches: sizes of batches that are smaller than that, and how many there are of each in the whole stage.
        samples: responses of a full batch; 0 where nothing is sampled.
        chunks: samples that each generator hands over at a time, and how many times so many.
        epochs: passes over one batch.
        mini_batches: sizes of a full batch's mini-batches in rows, and how many there are of each.
        steps: optimizer steps in an iteration.
        passes: how often each row of the data comes up.
        staleness: iterations that sampling runs ahead.
        learners: by role.
    """

    stage: str
    method: str
    unit: str
    rows: int | None
    iterations: int | None
    batch: int
    last_batches: dict[int, int]
    samples: int
    chunks: dict[int, int]
    epochs: int
    mini_batches: dict[int, int]
    steps: int
    passes: float | None
    staleness: int
    learners: dict[str, LearnerArithmetic]


def arithmetic(stage: schema.Stage, rows: int | None, *, gpus: float) -> StageArithmetic:
    """A stage in numbers.

    Args:
        stage: its settings.
        rows: rows of its training data, as `check_data` counts them; None where an earlier stage writes them.
        gpus: those of the cluster; they decide how many tokens a forward pass takes where no setting does.
    """
    match stage:
        case schema.Ppo():
            return _ppo(stage, rows, gpus=gpus)
        case schema.Collect():
            return _collect(stage, rows)
        case _:
            return _supervised(stage, rows, gpus=gpus)


def known_rows(stage: schema.Stage, rows: dict[str, int]) -> int | None:
    """Rows of the training data; None where an earlier stage writes some of them, or scores choose among them."""
    chosen = isinstance(stage, schema.Dpo) and stage.pairs.min_margin is not None
    return None if chosen or any(source.stage for source in stage.data.train) else rows["train"]


def longest_row(stage: schema.Stage) -> int:
    """Tokens of the longest row that the settings allow: of a text, an answer with its prompt, or a sample."""
    if isinstance(stage, schema.Ppo | schema.Collect):
        return longest_prompt(stage.data) + stage.sampling.max_new_tokens
    return stage.data.max_length


def longest_prompt(data: schema.PromptData) -> int:
    """Tokens of the longest prompt that the settings allow."""
    return data.max_prompt_tokens if data.prompt_length is None else data.prompt_length.max


def _supervised(stage: Supervised, rows: int | None, *, gpus: float) -> StageArithmetic:
    steps, batch, smaller, passes = stage.steps, stage.batch_size, {}, None
    stream = _stream(rows)
    if stream is not None:
        steps = total_steps(stage, stream)
        each_epoch = stream.steps_per_epoch(stage.batch_size)
        batch, last = (len(stream.batch(step, stage.batch_size)) for step in (0, each_epoch - 1))
        # Only an epoch's last batch can be smaller.
        epochs, left = divmod(steps, each_epoch)
        smaller = {last: epochs} if last < batch and epochs else {}
        passes = epochs + left * batch / len(stream)
    pairs = not isinstance(stage, schema.Sft)
    policy = _learner(
        stage.policy, batch, longest=longest_row(stage), together=2 if pairs else 1, steps=steps, gpus=gpus
    )
    return StageArithmetic(
        stage=stage.name,
        method=stage.method,
        unit="pairs" if pairs else "sequences",
        rows=rows,
        iterations=steps,
        batch=batch,
        last_batches=smaller,
        samples=0,
        chunks={},
        epochs=1,
        mini_batches={batch: 1},
        steps=1,
        passes=passes,
        staleness=0,
        learners={"policy": policy},
    )


def _ppo(stage: schema.Ppo, rows: int | None, *, gpus: float) -> StageArithmetic:
    prompts, each = stage.prompts_per_iteration, stage.sampling.samples_per_prompt
    samples = prompts * each
    cut = _sizes(samples, stage.mini_batches)
    networks: dict[str, schema.Learner] = {"policy": stage.policy}
    if stage.critic_role is not None and stage.critic_role.kind == "network":
        networks["critic"] = stage.critic_role
    steps = optimizer_steps(stage)
    chunks = Counter(
        size for share in shares(prompts, stage.generator.workers) for size in chunk_sizes(stage, len(share) * each)
    )
    return StageArithmetic(
        stage=stage.name,
        method=stage.method,
        unit="prompts",
        rows=rows,
        iterations=stage.iterations,
        batch=prompts,
        last_batches={},
        samples=samples,
        chunks=dict(chunks),
        epochs=stage.epochs,
        mini_batches=dict(Counter(cut)),
        steps=stage.epochs * len(cut),
        passes=None if rows is None else stage.iterations * prompts / rows,
        staleness=stage.staleness,
        learners={
            role: _learner(settings, max(cut), longest=longest_row(stage), together=1, steps=steps[role], gpus=gpus)
            for role, settings in networks.items()
        },
    )


def _collect(stage: schema.Collect, rows: int | None) -> StageArithmetic:
    stream = _stream(rows)
    known = range(rows or 0)
    iterations = batches(stage, known) if stage.prompts is not None or stream is not None else None
    full, last = stage.prompts_per_batch, {}
    if iterations is not None:
        full = len(places_of(stage, known, 1))
        left = len(places_of(stage, known, iterations))
        last = {left: 1} if left < full else {}
    prompts = stage.prompts or rows
    return StageArithmetic(
        stage=stage.name,
        method=stage.method,
        unit="prompts",
        rows=rows,
        iterations=iterations,
        batch=full,
        last_batches=last,
        samples=full * stage.sampling.samples_per_prompt,
        chunks={},
        epochs=0,
        mini_batches={},
        steps=0,
        passes=None if rows is None or prompts is None else prompts / rows,
        staleness=0,
        learners={},
    )


def _learner(
    settings: schema.Learner, rows: int, *, longest: int, together: int, steps: int | None, gpus: float
) -> LearnerArithmetic:
    device = torch.device("cuda" if (gpus if settings.gpus is None else settings.gpus) else "cpu")
    cost = together * longest
    most = max(
        len(learner_micro_batches(settings, [cost] * len(share), device=device, padded=False, together=together))
        for share in balance([cost] * rows, settings.workers)
    )
    return LearnerArithmetic(micro_batches=most, row_tokens=cost, steps=steps)


def _sizes(rows: int, number: int) -> list[int]:
    return [len(part) for part in cut_mini_batches(torch.arange(rows), number)]


def _stream(rows: int | None) -> Stream | None:
    return Stream(sizes=[rows], weights=[1.0], seed=0, shuffle=False) if rows else None
