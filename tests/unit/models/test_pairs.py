"""Two answers behind one prompt give what they give in rows of their own."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from rlhf_ray.data.batches import Sequences, make_sequences
from rlhf_ray.models.attention import attend_by_rows
from rlhf_ray.models.forward import Outputs, forward
from rlhf_ray.models.heads import Network, build_network, switch_off_dropout
from rlhf_ray.models.loading import load_causal_lm
from rlhf_ray.models.pairs import forward_pairs, pair_lengths
from tests.tiny_models import make_gpt2

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs() -> Sequences:
    """Prompts of one, two and seven tokens and none in common; answers that begin alike; a long and a short one."""
    generator = torch.Generator().manual_seed(3)

    def draw(length: int) -> list[int]:
        return torch.randint(3, 290, (length,), generator=generator).tolist()

    prompts = [draw(1), draw(2), draw(7), draw(4)]
    others = [*prompts[:3], draw(6)]
    chosen = [draw(5), draw(1), [9, 9, 4], draw(3)]
    rejected = [draw(2), draw(14), [9, 9, 5, 6], draw(3)]
    return Sequences.concat([make_sequences(prompts, chosen), make_sequences(others, rejected)])


def random_network(directory: str, head: str) -> Network:
    if head == "score":
        loaded = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1)
    else:
        loaded = load_causal_lm(directory)
    assert attend_by_rows(loaded)
    network = build_network(loaded, head).double()  # type: ignore[arg-type]
    switch_off_dropout(network)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return network


@pytest.mark.parametrize(("family", "head"), [("llama", "none"), ("llama", "score"), ("gpt2", "none")])
def test_outputs_and_gradients_are_those_of_separate_rows(
    model_directory: Path, tmp_path: Path, pairs: Sequences, family: str, head: str
) -> None:
    network = random_network(str(model_directory) if family == "llama" else make_gpt2(tmp_path), head)

    def judged(outputs: Outputs) -> tuple[Tensor, Tensor]:
        network.zero_grad()
        weights = torch.linspace(-1, 1, outputs.logprobs.numel(), dtype=torch.float64).view_as(outputs.logprobs)
        found = (outputs.logprobs, outputs.values, outputs.final_values[:, None])
        sum((weights[:, : part.shape[1]] * part).sum() for part in found).backward()  # type: ignore[union-attr]
        gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        return torch.cat([part.detach() for part in found], 1), gradient

    wanted = judged(forward(network, pairs, layout="padded", device=CPU, temperature=0.7))
    found = judged(forward_pairs(network, pairs, device=CPU, temperature=0.7))
    assert wanted[0].abs().max() > 1
    assert wanted[1].norm() > 1
    # Llama's norms are float32 inside, where a last bit may fall to the other side.
    torch.testing.assert_close(found, wanted, atol=1e-6 if family == "llama" else 1e-9, rtol=1e-10)


def test_the_prompt_is_counted_once_but_for_its_last_token(pairs: Sequences) -> None:
    # 1+5 and 1+2 have nothing to share; 2+1 and 2+14 share 1; 7+3 and 7+4 share 6; 4+3 and 6+3 begin otherwise.
    assert pair_lengths(pairs).tolist() == [9, 18, 15, 16]
