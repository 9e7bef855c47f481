"""Which responses are kept: worked by hand, and the resample against the distribution that it approximates."""

import math

import pytest
import torch

from rlhf_ray.algorithms.selection import draw_rows, effective_sample_size, pairs_by_margin, tilted_weights


def test_pairs_stand_in_the_order_of_their_margins() -> None:
    # Differences: 3-0 (row 2 over row 1) 3, 3-1 (row 2 over row 0) 2, 1-0 (row 0 over row 1) 1.
    assert pairs_by_margin(torch.tensor([1.0, 0.0, 3.0]), min_margin=0.0) == [(2, 1), (2, 0), (0, 1)]


def test_a_margin_that_is_just_reached_counts() -> None:
    assert pairs_by_margin(torch.tensor([1.0, 0.0, 3.0]), min_margin=2.0) == [(2, 1), (2, 0)]
    assert pairs_by_margin(torch.tensor([1.0, 0.0, 3.0]), min_margin=3.5) == []


def test_equal_scores_make_no_pair() -> None:
    assert pairs_by_margin(torch.tensor([0.5, 0.5, 0.5]), min_margin=0.0) == []
    assert pairs_by_margin(torch.tensor([0.5]), min_margin=0.0) == []
    # Two best and two worst: all four pairs differ by 1, in the order of the rows.
    assert pairs_by_margin(torch.tensor([0.0, 1.0, 1.0, 0.0]), min_margin=0.0) == [(1, 0), (1, 3), (2, 0), (2, 3)]


def test_weights_of_scores_that_differ_by_logarithms() -> None:
    # exp(0), exp(ln 2), exp(ln 5): 1, 2 and 5 of 8.
    weights = tilted_weights(torch.tensor([0.0, math.log(2), math.log(5)]), beta=1.0)
    torch.testing.assert_close(weights, torch.tensor([1 / 8, 2 / 8, 5 / 8]).double())
    # (1 + 2 + 5)^2 / (1 + 4 + 25)
    assert effective_sample_size(weights) == pytest.approx(64 / 30)


def test_beta_divides_the_scores() -> None:
    weights = tilted_weights(torch.tensor([0.0, 2 * math.log(3)]), beta=2.0)
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.75]).double())


def test_large_scores_do_not_overflow() -> None:
    weights = tilted_weights(torch.tensor([5000.0, 5000.0, 0.0]), beta=0.1)
    assert weights.tolist() == [0.5, 0.5, 0.0]
    assert effective_sample_size(weights) == 2.0


def test_effective_samples_lie_between_one_and_all() -> None:
    assert effective_sample_size(tilted_weights(torch.full((7,), 0.3), beta=1.0)) == pytest.approx(7.0)
    assert effective_sample_size(torch.tensor([0.0, 4.0, 0.0])) == 1.0


def test_a_seed_repeats_its_draws() -> None:
    weights = torch.tensor([0.2, 0.3, 0.5]).double()
    assert draw_rows(weights, 20, seed=4) == draw_rows(weights, 20, seed=4)
    assert draw_rows(weights, 20, seed=4) != draw_rows(weights, 20, seed=5)
    assert draw_rows(torch.tensor([0.0, 1.0]).double(), 3, seed=1) == [1, 1, 1]


def test_the_resample_approximates_the_optimum_of_the_regularised_objective() -> None:
    """Draws among samples of a policy with four answers follow pi(y) exp(r(y) / beta) / Z."""
    policy = torch.tensor([0.5, 0.3, 0.15, 0.05]).double()
    rewards, beta = torch.tensor([0.0, 0.5, 1.0, 2.0]), 0.8
    optimum = policy * (rewards.double() / beta).exp()
    optimum /= optimum.sum()
    generator = torch.Generator().manual_seed(11)
    prompts, samples = 4000, 64
    answers = torch.multinomial(policy, prompts * samples, replacement=True, generator=generator).view(prompts, samples)
    counts = torch.zeros(4).double()
    for prompt, group in enumerate(answers):
        (row,) = draw_rows(tilted_weights(rewards[group], beta=beta), 1, seed=prompt)
        counts[group[row]] += 1
    # Four standard errors of a share of 4000 draws, and 0.01 for the bias of 64 samples.
    tolerance = 4 * (optimum * (1 - optimum) / prompts).sqrt() + 0.01
    assert ((counts / prompts - optimum).abs() < tolerance).all(), (counts / prompts, optimum)
    assert ((counts / prompts - policy).abs() > tolerance).any()


@pytest.mark.parametrize(
    ("function", "setting"), [(pairs_by_margin, {"min_margin": -1.0}), (tilted_weights, {"beta": 0.0})]
)
def test_settings_without_a_sense_are_refused(function, setting) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        function(torch.tensor([1.0, 2.0]), **setting)
