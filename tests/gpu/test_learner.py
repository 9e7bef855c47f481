"""A learner on a GPU learns what plain PyTorch learns on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Sequences, make_sequences
from rlhf_ray.distributed.place import Place
from rlhf_ray.workers.learner import Learner
from rlhf_ray.workers.objectives import LanguageObjective

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def sequences() -> Sequences:
    generator = torch.Generator().manual_seed(1)

    def draw(length: int) -> list[int]:
        return torch.randint(3, 290, (length,), generator=generator).tolist()

    return make_sequences([draw(n) for n in (2, 5, 1, 3, 7)], [draw(n) for n in (9, 1, 12, 4, 6)])


def step_on_cpu(
    directory: Path, sequences: Sequences, learning_rate: float
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and weights after one AdamW step, written out."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    total = torch.zeros(())
    for row, length in enumerate(sequences.lengths().tolist()):
        labels = sequences.tokens[row].masked_fill(~sequences.response_mask[row], -100)[:length]
        logits = model(sequences.tokens[row, :length][None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
    loss = total / sequences.response_mask.sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0).step()
    return loss.item(), norm.item(), model.state_dict()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("packing", [False, True])
def test_one_step(model_directory: Path, sequences: Sequences, zero: Any, packing: bool, tmp_path: Path) -> None:
    optimizer = schema.Optimizer(learning_rate=0.1, betas=(0.0, 0.0), eps=1.0)
    learner = Learner(
        Place("policy", 0, 1),
        config=schema.Learner(zero=zero, optimizer=optimizer),
        model=str(model_directory),
        revision=None,
        head="none",
        seed=1,
        total_steps=10,
        packing=packing,
    )
    metrics = learner.update(sequences, LanguageObjective(), epochs=1, mini_batches=1, iteration=1)
    loss, norm, weights = step_on_cpu(model_directory, sequences, 0.1)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    for name, tensor in (pair for bucket in learner.weights(bucket_bytes=1 << 20) for pair in bucket):
        assert tensor.is_cuda
        torch.testing.assert_close(tensor.cpu(), weights[name], atol=1e-4, rtol=1e-3)
    learner.save(tmp_path)
    wanted = learner.update(sequences, LanguageObjective(), epochs=1, mini_batches=1, iteration=2)["loss"]
    learner.load(tmp_path)
    found = learner.update(sequences, LanguageObjective(), epochs=1, mini_batches=1, iteration=2)["loss"]
    assert found == pytest.approx(wanted, rel=1e-4)
    assert 0 < learner.memory() < 10
    learner.close()


def test_bfloat16_stays_near_float32(llama_directory: Path, sequences: Sequences) -> None:
    learner = Learner(
        Place("policy", 0, 1),
        config=schema.Learner(zero=2, dtype="bfloat16"),
        model=str(llama_directory),
        revision=None,
        head="none",
        seed=1,
        total_steps=10,
    )
    loss, _, _ = step_on_cpu(llama_directory, sequences, 0.1)
    assert learner.evaluate_loss(sequences) == pytest.approx(loss, abs=0.05)
    learner.close()
