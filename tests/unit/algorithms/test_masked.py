import math

import pytest
import torch

from rlhf_ray.algorithms.masked import (
    explained_variance,
    masked_mean,
    masked_row_sum,
    masked_sum,
    masked_var,
    masked_whiten,
    token_weights,
    unit_count,
    unit_of,
    zero_outside,
)

X = torch.tensor([[1.0, 2.0, 99.0], [3.0, math.nan, 6.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, True]])
NOTHING = torch.zeros(2, 3, dtype=torch.bool)


def test_sum_mean_and_population_variance() -> None:
    assert masked_sum(X, MASK).item() == 12.0
    assert masked_row_sum(X, MASK).tolist() == [3.0, 9.0]
    assert masked_mean(X, MASK).item() == 3.0
    assert masked_var(X, MASK).item() == 3.5  # (4 + 1 + 0 + 9) / 4


def test_whitening_by_hand() -> None:
    # (x - 3) / sqrt(3.5)
    expected = torch.tensor([[-1.0690450, -0.5345225, 0.0], [0.0, 0.0, 1.6035675]], dtype=torch.float64)
    torch.testing.assert_close(masked_whiten(X, MASK), expected, rtol=0, atol=1e-7)


def test_whitening_without_shift_keeps_the_mean() -> None:
    expected = torch.tensor([[1.9309550, 2.4654775, 0.0], [3.0, 0.0, 4.6035675]], dtype=torch.float64)
    torch.testing.assert_close(masked_whiten(X, MASK, shift_mean=False), expected, rtol=0, atol=1e-7)


def test_whitening_adds_its_epsilon_to_the_variance() -> None:
    x = torch.tensor([[1e-4, -1e-4]], dtype=torch.float64)  # variance 1e-8, so 1e-4 / sqrt(2e-8)
    whitened = masked_whiten(x, torch.ones(1, 2, dtype=torch.bool))
    assert whitened.tolist() == [[pytest.approx(0.70710678), pytest.approx(-0.70710678)]]


def test_whitening_equal_values_gives_zeros() -> None:
    assert masked_whiten(torch.full((2, 3), 7.0), MASK).tolist() == [[0.0] * 3] * 2


def test_an_empty_mask_gives_zeros() -> None:
    assert masked_mean(X, NOTHING).item() == 0.0
    assert masked_var(X, NOTHING).item() == 0.0
    assert zero_outside(X, NOTHING).tolist() == [[0.0] * 3] * 2
    assert unit_count(NOTHING, "token") == unit_count(NOTHING, "sequence") == 0


def test_weights_and_units_of_the_two_aggregations() -> None:
    mask = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])
    assert token_weights(mask, "token_mean", torch.float64).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert token_weights(mask, "sequence_mean", torch.float64).tolist() == [[0.5, 0.5, 0], [0, 1, 0], [0, 0, 0]]
    assert (unit_of("token_mean"), unit_of("sequence_mean")) == ("token", "sequence")
    assert (unit_count(mask, "token"), unit_count(mask, "sequence")) == (3, 2)


def test_a_pair_has_two_rows() -> None:
    assert (unit_count(torch.ones(6, 2, dtype=torch.bool), "pair"), unit_count(NOTHING, "pair")) == (3, 1)
    with pytest.raises(AssertionError, match="two rows each, got 3"):
        unit_count(torch.ones(3, 2, dtype=torch.bool), "pair")


def test_explained_variance_by_hand() -> None:
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 6.0, 50.0]])  # variance (4 + 1 + 9) / 3
    values = torch.tensor([[1.0, 1.0, 4.0, 0.0]])  # residuals 0, 1, 2: variance 2 / 3
    assert explained_variance(values, returns, mask).item() == pytest.approx(1 - 2 / 14)
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(torch.full_like(returns, 4.0), returns, mask).item() == pytest.approx(0.0, abs=1e-6)


def test_explained_variance_of_equal_returns_is_zero() -> None:
    assert explained_variance(X[:1], torch.ones_like(X[:1]), MASK[:1]).item() == 0.0
