"""One rank of a group of learners; tests start it with RANK and WORLD_SIZE, and read the tensors and numbers it leaves.

python learner_ranks.py MODEL_DIRECTORY OUTPUT_DIRECTORY
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlhf_ray.algorithms.policy_losses import ClippedPolicyLoss, ValueLoss
from rlhf_ray.config import schema
from rlhf_ray.data.batches import Experience, PreferencePairs, Sequences, make_sequences
from rlhf_ray.distributed.place import Place
from rlhf_ray.models.heads import Head
from rlhf_ray.workers.learner import Learner
from rlhf_ray.workers.objectives import (
    BradleyTerryObjective,
    JointObjective,
    LanguageObjective,
    PolicyObjective,
    ValueObjective,
)

RUNS: dict[str, dict[str, Any]] = {
    "zero0": {"zero": 0},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2, "cpu_offload": True, "micro_batch_tokens": 20},
    "zero3": {"zero": 3, "activation_checkpointing": True, "micro_batch_sequences": 1},
    "zero3_bfloat16": {"zero": 3, "dtype": "bfloat16"},
}
LORA_RUNS: dict[str, dict[str, Any]] = {f"lora_{name}": settings for name, settings in RUNS.items()}


def draw_sequences(rows: int) -> Sequences:
    """Rows of random tokens, of lengths from 4 to 30."""
    generator = torch.Generator().manual_seed(1)

    def draw(length: int) -> list[int]:
        return torch.randint(3, 290, (length,), generator=generator).tolist()

    lengths = torch.randint(2, 16, (rows, 2), generator=generator).tolist()
    return make_sequences([draw(prompt) for prompt, _ in lengths], [draw(response) for _, response in lengths])


def draw_experience(sequences: Sequences) -> Experience:
    """Experience with random numbers."""
    generator = torch.Generator().manual_seed(2)
    columns = [torch.randn(sequences.tokens.shape, generator=generator) for _ in range(5)]
    old = columns[0] * 0.1 - 5.7
    return Experience(
        sequences=sequences,
        old_logprobs=old,
        reference_logprobs=old,
        values=columns[1] * 0.1,
        advantages=columns[2],
        returns=columns[3],
        correction=torch.ones_like(old),
    )


def run(name: str, model: Path, output: Path) -> dict[str, Any]:
    """Trains, saves, trains on, and repeats the last part from what was saved."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sequences = draw_sequences(7)
    experience = draw_experience(sequences)
    joint = _joint()

    def start(head: Head = "both") -> Learner:
        return _start(model, RUNS[name], head)

    learner = start()
    metrics = [learner.update(experience, joint, epochs=1, mini_batches=2, iteration=1)]
    learner.save(output / name / "saved")
    metrics.append(learner.update(sequences, LanguageObjective(), epochs=1, mini_batches=1, iteration=2))
    trained = _weights(learner)
    # Unlike numbers of rows on the ranks, and none on the last.
    mine = sequences.select([0, 1, 2, 3, 4, 5, 6] if rank == 0 else [])
    logprobs = learner.logprobs(mine)
    evaluated = learner.evaluate_loss(sequences)
    learner.save_model(output / name / "model")
    learner.close()

    resumed = start()
    resumed.load(output / name / "saved")
    _away_and_back(resumed)
    again = resumed.update(sequences, LanguageObjective(), epochs=1, mini_batches=1, iteration=2)
    same = again == metrics[1] and all(torch.equal(tensor, trained[key]) for key, tensor in _weights(resumed).items())
    one_row = resumed.update(sequences.select([3]), LanguageObjective(), epochs=1, mini_batches=1, iteration=3)
    os.environ["RLHF_RAY_FAULT"] = f"update:policy:{size - 1}:4:nan"
    skipped = resumed.update(sequences, LanguageObjective(), epochs=1, mini_batches=1, iteration=4)
    resumed.close()
    judge = start("score")
    chosen, rejected = sequences.select([0, 1, 2, 3]), sequences.select([4, 5, 6, 0])
    pairs = PreferencePairs(chosen, rejected, ids=[0, 1, 2, 3], margins=torch.tensor([0.0, 0.5, 0.0, 0.0]))
    judged = [judge.update(pairs, BradleyTerryObjective(), epochs=1, mini_batches=2, iteration=i) for i in (1, 2)]
    judge.close()
    if rank == 0:
        save_file(trained | {"logprobs": logprobs}, output / f"{name}.safetensors")
    return {
        "metrics": metrics,
        "resumed_equal": same,
        "evaluated": evaluated,
        "one_row": one_row,
        "skipped": skipped["guard/skipped_steps"],
        "judged": judged,
    }


def run_lora(name: str, model: Path, output: Path) -> dict[str, Any]:
    """Trains an adapter, saves, trains on, and repeats the last part from what was saved."""
    rank = int(os.environ["RANK"])
    lora = schema.Lora(rank=4, alpha=16.0, dropout=0.0)
    sequences = draw_sequences(7)
    learner = _start(model, LORA_RUNS[name] | {"lora": lora}, "both")
    before = learner.logprobs(sequences)
    metrics = [learner.update(draw_experience(sequences), _joint(), epochs=1, mini_batches=2, iteration=1)]
    learner.save(output / name / "saved")
    # Unlike numbers of rows on the ranks, and none on the last.
    mine = sequences.select([0, 1, 2, 3, 4, 5, 6] if rank == 0 else [])
    reference = learner.reference_logprobs(mine)
    answers = learner.reference_answer_logprobs(mine.select(range(len(mine) // 2 * 2)))
    metrics.append(learner.update(sequences, LanguageObjective(), epochs=1, mini_batches=1, iteration=2))
    trained = _weights(learner)
    logprobs = learner.logprobs(mine)
    learner.save_model(output / name / "model")
    learner.close()

    resumed = _start(model, LORA_RUNS[name] | {"lora": lora}, "both")
    resumed.load(output / name / "saved")
    _away_and_back(resumed)
    again = resumed.update(sequences, LanguageObjective(), epochs=1, mini_batches=1, iteration=2)
    same = again == metrics[1] and all(torch.equal(tensor, trained[key]) for key, tensor in _weights(resumed).items())
    resumed.close()
    if rank == 0:
        save_file(trained | {"logprobs": logprobs}, output / f"{name}.safetensors")
    return {
        "metrics": metrics,
        "resumed_equal": same,
        "reference_equal": torch.equal(reference, before[: len(reference)]),
        "answers": answers.tolist(),
        "saved_bytes": sum(file.stat().st_size for file in (output / name / "saved").rglob("*.pt")),
    }


def _away_and_back(learner: Learner) -> None:
    """What a GPU's learner does while generators sample: from here on it must learn as if it had stayed."""
    learner.engine.moves_states = True
    learner.offload(keep_weights=True)
    learner.offload()
    learner.reload()


def _joint() -> JointObjective:
    clipped = ClippedPolicyLoss(
        clip_low=0.2, clip_high=0.2, dual_clip=None, entropy_coefficient=0.0, aggregation="token_mean"
    )
    return JointObjective(PolicyObjective(clipped, None), ValueObjective(ValueLoss(0.2, "token_mean")), 0.5)


def _start(model: Path, settings: dict[str, Any], head: Head) -> Learner:
    optimizer = schema.Optimizer(learning_rate=1e-2, betas=(0.0, 0.0), eps=1.0, gradient_clip=1.0, schedule="cosine")
    return Learner(
        Place("policy", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])),
        config=schema.Learner(**settings, optimizer=optimizer),
        model=str(model),
        revision=None,
        head=head,
        seed=1,
        total_steps=20,
        timeout_s=60,
    )


def _weights(learner: Learner) -> dict[str, torch.Tensor]:
    return dict(pair for bucket in learner.weights(bucket_bytes=100_000) for pair in map(_copied, bucket))


def _copied(pair: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    return pair[0], pair[1].clone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[2])
    names = sys.argv[3].split(",")
    found = {name: (run if name in RUNS else run_lora)(name, Path(sys.argv[1]), target) for name in names}
    (target / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
