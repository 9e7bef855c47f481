import math

import pytest
import torch

from rlhf_ray.algorithms.advantages import broadcast_to_tokens, gae, group_relative, leave_one_out, reinforce_baseline
from rlhf_ray.algorithms.masked import masked_whiten

NAN = math.nan
EXACT = {"rtol": 0, "atol": 1e-12}


def row(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def mask(*bits: int) -> torch.Tensor:
    return torch.tensor([bits], dtype=torch.bool)


END = torch.zeros(1, dtype=torch.float64)


def test_gae_by_hand() -> None:
    # gamma 0.9, gamma * lambda 0.45.
    # t = 3: delta = 3 - 2 = 1; t = 2: delta = 2 + 1.8 - 1 = 2.8; t = 1: delta = 1 + 0.9 - 0.5 = 1.4.
    advantages, returns = gae(row(7, 1, 2, 3), row(7, 0.5, 1, 2), mask(0, 1, 1, 1), END, gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, row(0, 2.8625, 3.25, 1), **EXACT)
    torch.testing.assert_close(returns, row(0, 3.3625, 4.25, 3), **EXACT)


def test_gae_skips_gaps() -> None:
    advantages, returns = gae(
        row(7, 1, 80, NAN, 2, 3, 90), row(7, 0.5, 60, NAN, 1, 2, 70), mask(0, 1, 0, 0, 1, 1, 0), END, gamma=0.9, lam=0.5
    )
    torch.testing.assert_close(advantages, row(0, 2.8625, 0, 0, 3.25, 1, 0), **EXACT)
    torch.testing.assert_close(returns, row(0, 3.3625, 0, 0, 4.25, 3, 0), **EXACT)


def test_gae_takes_the_bootstrap_after_the_last_token() -> None:
    # t = 3: delta = 3 + 3.6 - 2 = 4.6; t = 2: 2.8 + 0.45 * 4.6 = 4.87; t = 1: 1.4 + 0.45 * 4.87 = 3.5915.
    advantages, _ = gae(row(7, 1, 2, 3, 9), row(7, 0.5, 1, 2, 9), mask(0, 1, 1, 1, 0), END + 4, gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, row(0, 3.5915, 4.87, 4.6, 0), **EXACT)


def test_gae_with_gamma_and_lambda_1_gives_the_rewards_to_come() -> None:
    advantages, returns = gae(row(0, 1, 2, 3), row(0, 5, -4, 2), mask(0, 1, 1, 1), END, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, row(0, 6, 5, 3), **EXACT)
    torch.testing.assert_close(advantages, row(0, 1, 9, 1), **EXACT)


def test_gae_with_lambda_0_gives_the_one_step_errors() -> None:
    advantages, _ = gae(row(0, 1, 2, 3), row(0, 5, -4, 2), mask(0, 1, 1, 1), END, gamma=0.5, lam=0.0)
    torch.testing.assert_close(advantages, row(0, 1 - 2 - 5, 2 + 1 + 4, 3 - 2), **EXACT)


@pytest.mark.parametrize("seed", range(5))
def test_gae_of_rows_with_gaps_is_gae_of_the_rows_without_them(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 4, 9, generator=generator, dtype=torch.float64)
    bits = torch.rand(4, 9, generator=generator) < 0.6
    bootstrap = torch.randn(4, generator=generator, dtype=torch.float64)
    found = gae(rewards, values, bits, bootstrap, gamma=0.97, lam=0.9)
    for i in range(4):
        kept = bits[i]
        if kept.any():
            dense = gae(
                rewards[i, kept][None],
                values[i, kept][None],
                torch.ones_like(kept[kept])[None],
                bootstrap[i : i + 1],
                gamma=0.97,
                lam=0.9,
            )
            for sparse, wanted in zip(found, dense, strict=True):
                torch.testing.assert_close(sparse[i, kept][None], wanted, rtol=0, atol=1e-10)
                assert not sparse[i, ~kept].any()


def test_a_row_without_response_has_no_advantage() -> None:
    advantages, returns = gae(row(1, 2), row(3, 4), mask(0, 0), END + 5, gamma=1.0, lam=1.0)
    assert advantages.tolist() == returns.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("bad", [-0.1, 1.1, NAN])
def test_gae_refuses_a_discount_outside_0_to_1(bad: float) -> None:
    with pytest.raises(ValueError, match="gamma"):
        gae(row(1), row(1), mask(1), END, gamma=bad, lam=1.0)
    with pytest.raises(ValueError, match="lam"):
        gae(row(1), row(1), mask(1), END, gamma=1.0, lam=bad)


REWARDS = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0], dtype=torch.float64)  # two groups of three


def test_group_relative_by_hand() -> None:
    # Mean 3, variance (4 + 1 + 9) / 2 = 7, standard deviation 2.6457513.
    expected = torch.tensor([-0.7559286, -0.3779643, 1.1338930, 0, 0, 0], dtype=torch.float64)
    found = group_relative(REWARDS, group_size=3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found[2].item() == pytest.approx(3 / (7**0.5 + 1e-6), rel=1e-12)
    assert group_relative(REWARDS, group_size=3, divide_by_std=False).tolist() == [-2, -1, 3, 0, 0, 0]


def test_leave_one_out_by_hand() -> None:
    # Means of the others: 4, 3.5 and 1.5.
    assert leave_one_out(REWARDS, group_size=3).tolist() == [-3, -1.5, 4.5, 0, 0, 0]


def test_reinforce_baseline_by_hand() -> None:
    found = reinforce_baseline(REWARDS, group_size=3)
    assert found.tolist() == [-2, -1, 3, 0, 0, 0]
    # Whitened over the batch's tokens; row 2 has two of them: mean 3 / 7, variance 23 / 7 - 9 / 49 = 152 / 49.
    bits = torch.tensor([[0, 1], [0, 1], [1, 1], [0, 1], [0, 1], [0, 1]], dtype=torch.bool)
    whitened = masked_whiten(broadcast_to_tokens(found, bits), bits)
    assert whitened[2].tolist() == [pytest.approx(18 / 152**0.5)] * 2
    assert whitened[3].tolist() == [0.0, pytest.approx(-3 / 152**0.5)]


@pytest.mark.parametrize("advantages", [group_relative, leave_one_out, reinforce_baseline])
def test_groups_that_cannot_be_compared_are_refused(advantages) -> None:
    with pytest.raises(ValueError, match="group_size: got 1"):
        advantages(REWARDS, group_size=1)
    with pytest.raises(ValueError, match="group_size: got 4, wanted a divisor of the batch's 6 sequences"):
        advantages(REWARDS, group_size=4)


def test_broadcast_to_tokens() -> None:
    bits = torch.tensor([[0, 1, 1], [0, 0, 1]], dtype=torch.bool)
    assert broadcast_to_tokens(torch.tensor([2.0, -3.0]), bits).tolist() == [[0, 2, 2], [0, 0, -3]]
