"""Which of a prompt's responses are kept, by their scores."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.algorithms.checks import require
from rlhf_ray.shapes import SequenceFloat


def pairs_by_margin(scores: SequenceFloat, *, min_margin: float) -> list[tuple[int, int]]:
    """(better, worse) rows of every pair whose scores differ, and by min_margin at least; the widest pair comes first.

    Equal differences stand in the order of their rows, so the first pair is the first of the best rows and the first
    of the worst.

    Args:
        scores: [B] of the responses to one prompt.
        min_margin: smallest difference, at least 0.
    """
    require(min_margin >= 0, "min_margin", min_margin, "a number, 0 or above")
    values = scores.double().tolist()
    found = [
        (better - worse, i, j)
        for i, better in enumerate(values)
        for j, worse in enumerate(values)
        if better > worse and better - worse >= min_margin
    ]
    return [(i, j) for _, i, j in sorted(found, key=lambda pair: (-pair[0], pair[1], pair[2]))]


def tilted_weights(scores: SequenceFloat, *, beta: float) -> Tensor:
    """[B] float64 self-normalised importance weights exp(score / beta) / sum, for samples of the policy.

    pi(y|x) exp(r(x, y) / beta) / Z(x) is the policy with the greatest expected r - beta KL(. || pi) (arXiv:2305.18290,
    eq. 4); rows drawn with these weights are distributed by it as B grows.

    Args:
        scores: [B] of the samples of one prompt.
        beta: coefficient of the KL term, above 0.
    """
    require(beta > 0, "beta", beta, "a number above 0")
    return (scores.double() / beta).softmax(0)


def effective_sample_size(weights: Tensor) -> float:
    """(sum w)^2 / sum w^2 of [B] weights: B where all are equal, 1 where one row has all the weight."""
    return float(weights.sum() ** 2 / weights.square().sum())


def draw_rows(weights: Tensor, count: int, *, seed: int) -> list[int]:
    """`count` rows drawn with replacement in proportion to [B] weights; the same seed draws the same rows."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[int] = torch.multinomial(weights, count, replacement=True, generator=generator).tolist()
    return rows
