import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from rlhf_ray.algorithms.logprobs import token_logprobs, token_logprobs_and_entropy

# The logits at 0 give 1/4, 3/4; those at 1 give 4/5, 1/5; those at 2 predict nothing.
LOGITS = torch.tensor([[[0.0, math.log(3)], [math.log(4), 0.0], [70.0, 0.0]]], dtype=torch.float64)
TOKENS = torch.tensor([[0, 1, 0]])


def random_rows(seed: int, rows: int = 3, positions: int = 6, words: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, positions, words, generator=generator, dtype=torch.float64)
    return logits, torch.randint(words, (rows, positions), generator=generator)


def test_index_t_is_the_log_probability_of_token_t() -> None:
    expected = [[0.0, pytest.approx(math.log(3 / 4)), pytest.approx(math.log(4 / 5))]]
    assert token_logprobs(LOGITS, TOKENS).tolist() == expected


def test_logits_are_divided_by_the_temperature() -> None:
    assert token_logprobs(2 * LOGITS, TOKENS, temperature=2.0).tolist() == token_logprobs(LOGITS, TOKENS).tolist()
    # At temperature 1/2 the odds are squared: 9 to 1, and 16 to 1.
    expected = [[0.0, pytest.approx(math.log(9 / 10)), pytest.approx(math.log(16 / 17))]]
    assert token_logprobs(LOGITS, TOKENS, temperature=0.5).tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(LOGITS, TOKENS, temperature=temperature)


def test_entropy_by_hand() -> None:
    logprobs, entropy = token_logprobs_and_entropy(LOGITS, TOKENS)
    assert logprobs.tolist() == token_logprobs(LOGITS, TOKENS).tolist()
    first = math.log(4) / 4 + 3 / 4 * math.log(4 / 3)  # 0.5623
    second = 4 / 5 * math.log(5 / 4) + math.log(5) / 5  # 0.5004
    assert entropy.tolist() == [[0.0, pytest.approx(first), pytest.approx(second)]]


def test_entropy_is_that_of_the_distribution_at_the_temperature() -> None:
    _, hot = token_logprobs_and_entropy(3 * LOGITS, TOKENS, temperature=3.0)
    _, plain = token_logprobs_and_entropy(LOGITS, TOKENS)
    torch.testing.assert_close(hot, plain)


def test_entropy_gradient_can_be_left_out() -> None:
    logits = LOGITS.clone().requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(logits, TOKENS, entropy_gradient=False)
    assert (logprobs.requires_grad, entropy.requires_grad) == (True, False)
    _, entropy = token_logprobs_and_entropy(logits, TOKENS)
    entropy.sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].abs().sum() > 0
    with torch.no_grad():
        assert not token_logprobs_and_entropy(logits, TOKENS)[1].requires_grad


def test_the_first_token_of_every_packed_sequence_is_zero() -> None:
    starts = torch.tensor([[True, False, True]])
    logprobs, entropy = token_logprobs_and_entropy(LOGITS, TOKENS, starts=starts)
    assert logprobs.tolist() == [[0.0, pytest.approx(math.log(3 / 4)), 0.0]]
    assert entropy[0, 2].item() == 0.0


def test_packing_changes_nothing() -> None:
    logits, tokens = random_rows(1)
    rows = token_logprobs_and_entropy(logits, tokens, temperature=0.7)
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = True
    packed = token_logprobs_and_entropy(
        logits.flatten(0, 1)[None], tokens.flatten()[None], temperature=0.7, starts=starts.flatten()[None]
    )
    for row, flat in zip(rows, packed, strict=True):
        assert torch.equal(row.flatten()[None], flat)


def test_padding_changes_nothing() -> None:
    logits, tokens = random_rows(2)
    longer = torch.cat([logits, torch.full_like(logits[:, :2], 1e4)], 1), torch.cat([tokens, tokens[:, :2]], 1)
    assert torch.equal(token_logprobs(*longer)[:, :6], token_logprobs(logits, tokens))


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits, tokens = random_rows(3)
    half = logits.to(torch.bfloat16)
    found = token_logprobs(half, tokens, temperature=0.7)
    assert found.dtype == torch.float32
    assert torch.equal(found, token_logprobs(half.float(), tokens, temperature=0.7))


@pytest.mark.parametrize("seed", range(3))
def test_against_torch(seed: int) -> None:
    logits, tokens = random_rows(seed)
    logprobs, entropy = token_logprobs_and_entropy(logits, tokens, temperature=1.3)
    predicting = torch.distributions.Categorical(logits=logits[:, :-1] / 1.3)
    exact = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(logprobs[:, 1:], predicting.log_prob(tokens[:, 1:]), **exact)
    torch.testing.assert_close(entropy[:, 1:], predicting.entropy(), **exact)
    loss = cross_entropy((logits[:, :-1] / 1.3).flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(-logprobs.sum(), loss, **exact)
