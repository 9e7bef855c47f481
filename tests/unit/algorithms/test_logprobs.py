import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from rlhf_ray.algorithms.logprobs import (
    Entropy,
    projected_logprobs,
    token_logprobs,
    token_logprobs_and_entropy,
)

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


# The first two states of HIDDEN give the logits (0, log 2, log 5) and (log 6, log 3, 0) - log 9.
WEIGHT = torch.tensor([[0.0, math.log(6 / 9)], [math.log(2), math.log(3 / 9)], [math.log(5), -math.log(9)]])
HIDDEN = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
WANTED = torch.tensor([[False, True, True]])


def test_projected_by_hand() -> None:
    found, entropy = projected_logprobs(HIDDEN, WEIGHT, None, torch.tensor([[0, 2, 0]]), WANTED, entropy="reported")
    assert found.tolist() == pytest.approx([math.log(5 / 8), math.log(6 / 10)])
    assert entropy is not None
    first = math.log(8) - 2 / 8 * math.log(2) - 5 / 8 * math.log(5)
    second = math.log(10) - 6 / 10 * math.log(6) - 3 / 10 * math.log(3)
    assert entropy.tolist() == pytest.approx([first, second])


def test_projected_gradient_by_hand() -> None:
    """The gradient of a logit is its token's indicator less its probability."""
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    bias = torch.zeros(3, requires_grad=True)
    found, _ = projected_logprobs(hidden, weight, bias, torch.tensor([[0, 2, 0]]), WANTED)
    found[0].backward()
    slopes = [-1 / 8, -2 / 8, 3 / 8]
    assert bias.grad is not None
    assert bias.grad.tolist() == pytest.approx(slopes)
    assert weight.grad is not None
    assert weight.grad.tolist() == [pytest.approx([slope, 0.0]) for slope in slopes]
    assert hidden.grad is not None
    assert hidden.grad[0, 0, 0].item() == pytest.approx(3 / 8 * math.log(5) - 2 / 8 * math.log(2))
    assert not hidden.grad[0, 1:].any()


def projection(
    *, seed: int = 5, words: int = 13, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [3, 6, 4], weight, bias, tokens, and which are wanted."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for scale, shape in ((1, (3, 6, 4)), (2, (words, 4)), (1, (words,)))
    )
    wanted = torch.rand(3, 6, generator=generator) < 0.6
    wanted[:, 0] = False
    return hidden, weight, bias, torch.randint(words, (3, 6), generator=generator), wanted


# One token, two (so that the last chunk has fewer), and all at a time.
CHUNKS = [1, 2 * 13 * 8, 1 << 20]


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("entropy", ["off", "reported", "trained"])
def test_projected_equals_all_logits_at_once(entropy: Entropy, with_bias: bool, chunk_bytes: int) -> None:
    hidden, weight, bias, tokens, wanted = projection()
    learnt = (hidden, weight, bias) if with_bias else (hidden, weight)
    factors = torch.randn(2, int(wanted.sum()), generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    def gradients(logprobs: torch.Tensor, entropies: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        loss = (factors[0] * logprobs).sum()
        if entropies is not None and entropies.requires_grad:
            loss = loss + (factors[1] * entropies).sum()
        return torch.autograd.grad(loss, learnt)

    logits = torch.nn.functional.linear(hidden, weight, bias if with_bias else None)
    all_logprobs, all_entropies = token_logprobs_and_entropy(
        logits, tokens, temperature=0.7, entropy_gradient=entropy == "trained"
    )
    found, entropies = projected_logprobs(
        hidden,
        weight,
        bias if with_bias else None,
        tokens,
        wanted,
        temperature=0.7,
        entropy=entropy,
        chunk_bytes=chunk_bytes,
    )
    exact = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(found, all_logprobs[wanted], **exact)
    if entropies is None:
        assert entropy == "off"
    else:
        torch.testing.assert_close(entropies, all_entropies[wanted], **exact)
        assert entropies.requires_grad == (entropy == "trained")
    known = all_entropies[wanted] if entropy == "trained" else None
    for ours, theirs in zip(gradients(found, entropies), gradients(all_logprobs[wanted], known), strict=True):
        torch.testing.assert_close(ours, theirs, **exact)
        assert theirs.abs().max() > 0.1


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_projected_gradient_is_the_slope(chunk_bytes: int) -> None:
    hidden, weight, bias, tokens, wanted = projection(words=5)

    def both(*learnt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return projected_logprobs(*learnt, tokens, wanted, temperature=1.3, entropy="trained", chunk_bytes=chunk_bytes)

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


def test_projected_can_go_backward_twice() -> None:
    hidden, weight, bias, tokens, wanted = projection()
    found, _ = projected_logprobs(hidden, weight, bias, tokens, wanted)
    first, second = (torch.autograd.grad(found.sum(), (hidden, weight), retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_frozen_output_layer_gets_no_gradient() -> None:
    hidden, weight, _, tokens, wanted = projection()
    whole = torch.autograd.grad(projected_logprobs(hidden, weight, None, tokens, wanted)[0].sum(), hidden)[0]
    found, _ = projected_logprobs(hidden, weight.detach(), None, tokens, wanted)
    assert torch.equal(torch.autograd.grad(found.sum(), hidden)[0], whole)


def test_nothing_wanted_has_a_gradient_of_zero() -> None:
    hidden, weight, bias, tokens, wanted = projection()
    found, entropies = projected_logprobs(hidden, weight, bias, tokens, torch.zeros_like(wanted), entropy="trained")
    assert entropies is not None
    assert (len(found), len(entropies)) == (0, 0)
    for gradient, learnt in zip(
        torch.autograd.grad(found.sum() + entropies.sum(), (hidden, weight, bias)), (hidden, weight, bias), strict=True
    ):
        assert torch.equal(gradient, torch.zeros_like(learnt))


def test_projected_in_half_precision() -> None:
    """The logits are in half precision as those of the model, all that follows is in float32."""
    hidden, weight, _, tokens, wanted = projection(dtype=torch.bfloat16)
    logits = torch.nn.functional.linear(hidden, weight)
    whole = token_logprobs(logits, tokens, temperature=0.7)[wanted]
    wanted_gradients = torch.autograd.grad(whole.sum(), (hidden, weight))
    for chunk_bytes in CHUNKS:
        found, _ = projected_logprobs(hidden, weight, None, tokens, wanted, temperature=0.7, chunk_bytes=chunk_bytes)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)
        for ours, theirs in zip(torch.autograd.grad(found.sum(), (hidden, weight)), wanted_gradients, strict=True):
            assert ours.dtype == torch.bfloat16
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("temperature", [0.0, math.nan])
def test_projected_refuses_a_temperature_that_is_not_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        projected_logprobs(HIDDEN, WEIGHT, None, torch.tensor([[0, 2, 0]]), WANTED, temperature=temperature)
