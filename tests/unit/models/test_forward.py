"""Rows through a network: the arrangement, packing and micro-batches change nothing."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.data.batches import Sequences, make_sequences
from rlhf_ray.models.attention import attend_by_rows
from rlhf_ray.models.forward import Layout, forward
from rlhf_ray.models.heads import Network, build_network, switch_off_dropout
from rlhf_ray.models.loading import load_causal_lm

CPU = torch.device("cpu")
GROUPINGS = [[[0, 1, 2, 3]], [[3, 1], [0, 2]], [[0], [1], [2], [3]]]


@pytest.fixture(scope="module")
def model(model_directory: Path) -> PreTrainedModel:
    loaded = load_causal_lm(str(model_directory))
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(3.0)
    assert attend_by_rows(loaded)
    return loaded


@pytest.fixture
def sequences() -> Sequences:
    generator = torch.Generator().manual_seed(1)

    def draw(length: int) -> list[int]:
        return torch.randint(3, 290, (length,), generator=generator).tolist()

    return make_sequences([draw(2), draw(5), draw(1), draw(3)], [draw(9), draw(1), draw(12), draw(4)])


def one_row_at_a_time(model: PreTrainedModel, sequences: Sequences, temperature: float) -> Tensor:
    """[B, T] log-probabilities, written out without any of the package's code."""
    expected = torch.zeros(sequences.tokens.shape, dtype=model.dtype)
    for row, length in enumerate(sequences.lengths().tolist()):
        tokens = sequences.tokens[row, :length]
        logprobs = (model(tokens[None]).logits[0] / temperature).log_softmax(-1)
        for t in range(1, length):
            if sequences.response_mask[row, t]:
                expected[row, t] = logprobs[t - 1, tokens[t]]
    return expected


@torch.no_grad()
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_those_of_single_rows(
    model: PreTrainedModel, sequences: Sequences, layout: Layout, temperature: float
) -> None:
    expected = one_row_at_a_time(model, sequences, temperature)
    found = forward(build_network(model, "none"), sequences, layout=layout, device=CPU, temperature=temperature)
    assert expected.abs().max() > 5
    torch.testing.assert_close(found.logprobs, expected, atol=1e-5, rtol=1e-6)
    assert not found.entropy.any()
    assert not found.values.any()


@torch.no_grad()
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_entropy_is_that_of_the_predicting_distribution(
    model: PreTrainedModel, sequences: Sequences, layout: Layout
) -> None:
    network = build_network(model, "none")
    found = forward(network, sequences, layout=layout, device=CPU, temperature=0.5, entropy="reported")
    length = int(sequences.lengths()[0])
    distribution = torch.distributions.Categorical(logits=model(sequences.tokens[:1, :length]).logits[0] / 0.5)
    trained = sequences.response_mask[0].nonzero().squeeze(1)
    torch.testing.assert_close(found.entropy[0, trained], distribution.entropy()[trained - 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", ["none", "value", "both"])
def test_gradients_do_not_depend_on_layout_or_grouping(model_directory: Path, sequences: Sequences, head: str) -> None:
    model = load_causal_lm(str(model_directory))
    network = build_network(model, head).double()  # type: ignore[arg-type]
    switch_off_dropout(network)
    network.train()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    weights = torch.rand(3, *sequences.tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def gradients(groups: list[list[int]], layout: Layout) -> Tensor:
        network.zero_grad()
        for rows in groups:
            part = sequences.select(rows)
            found = forward(network, part, layout=layout, device=CPU, entropy="trained")
            terms = (found.logprobs, found.entropy, found.values)
            loss = sum((w[rows] * term * part.response_mask).sum() for w, term in zip(weights, terms, strict=True))
            (loss + found.final_values.sum()).backward()  # type: ignore[union-attr]
        found_gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        return torch.cat(found_gradients)

    wanted = gradients(GROUPINGS[2], "padded")
    assert wanted.norm() > 1
    assert attend_by_rows(model)
    for groups in GROUPINGS:
        for layout in ("packed", "padded"):
            torch.testing.assert_close(gradients(groups, layout), wanted, atol=1e-10, rtol=1e-10)  # type: ignore[arg-type]


class _Countdown(nn.Module):
    """Says that the value after token x is 10 x."""

    def forward(self, tokens: Tensor, *_: object) -> tuple[None, None, Tensor]:
        return None, None, tokens * 10.0


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_value_before_a_token_is_read_after_the_one_before_it(layout: Layout) -> None:
    sequences = make_sequences([[1, 2], [5]], [[3, 4], [6]])
    found = forward(_Countdown(), sequences, layout=layout, device=CPU)
    assert found.values.tolist() == [[0, 10, 20, 30], [0, 50, 0, 0]]
    assert found.final_values.tolist() == [40, 60]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_rows_without_trained_tokens(model: PreTrainedModel, layout: Layout) -> None:
    sequences = make_sequences([[4, 5], [6]], [[], []])
    network: Network = build_network(model, "both")
    found = forward(network, sequences, layout=layout, device=CPU, entropy="reported")
    assert not found.logprobs.any()
    assert not found.entropy.any()


@torch.no_grad()
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_value_head_reads_the_last_hidden_state(model: PreTrainedModel, sequences: Sequences, layout: Layout) -> None:
    alone, shared = build_network(model, "value"), build_network(model, "both")
    weight = torch.randn(1, 128, generator=torch.Generator().manual_seed(4))
    for network in (alone, shared):
        network.value_head.linear.weight.copy_(weight)  # type: ignore[union-attr]
    expected = (model.base_model(sequences.tokens[:1, :11]).last_hidden_state[0] @ weight.T).squeeze(1)
    for network in (alone, shared):
        found = forward(network, sequences, layout=layout, device=CPU)
        torch.testing.assert_close(found.values[0, 1:11], expected[:10], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.final_values[0], expected[10], atol=1e-4, rtol=1e-4)


def test_new_critic_values_everything_at_zero(model: PreTrainedModel, sequences: Sequences) -> None:
    found = forward(build_network(model, "value"), sequences, layout="padded", device=CPU)
    assert not found.values.any()


def test_dropout_is_off_and_the_configuration_keeps_it(model_directory: Path, sequences: Sequences) -> None:
    model = load_causal_lm(str(model_directory))
    network = build_network(model, "none").train()
    if model.config.model_type == "gpt2":
        torch.manual_seed(0)
        first, second = (forward(network, sequences, layout="padded", device=CPU).logprobs for _ in range(2))
        assert not torch.equal(first, second)
        assert model.config.resid_pdrop == 0.1
    switch_off_dropout(network)
    first, second = (forward(network, sequences, layout="padded", device=CPU).logprobs for _ in range(2))
    assert torch.equal(first, second)
    if model.config.model_type == "gpt2":
        assert model.config.resid_pdrop == 0.1
