"""Sums, means and whitening over the tokens of a mask.

What lies outside the mask is never read: it may be padding, infinite or NaN.
"""

from typing import Literal, TypeAlias

import torch

from rlhf_ray.shapes import Scalar, SequenceFloat, TokenFloat, TokenMask

Unit: TypeAlias = Literal["token", "sequence", "pair"]
Aggregation: TypeAlias = Literal["token_mean", "sequence_mean"]


def zero_outside(x: TokenFloat, mask: TokenMask) -> TokenFloat:
    """[B, T] x inside the mask, 0 outside."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_sum(x: TokenFloat, mask: TokenMask) -> Scalar:
    """Sum of x over the mask."""
    return zero_outside(x, mask).sum()


def masked_row_sum(x: TokenFloat, mask: TokenMask) -> SequenceFloat:
    """[B] sum of x over each row's mask: a sequence's log-probability, KL or reward."""
    return zero_outside(x, mask).sum(1)


def masked_mean(x: TokenFloat, mask: TokenMask) -> Scalar:
    """Mean of x over the mask; 0 where the mask is empty."""
    return masked_sum(x, mask) / mask.count_nonzero().clamp(min=1)


def masked_var(x: TokenFloat, mask: TokenMask) -> Scalar:
    """Population variance of x over the mask; 0 where the mask is empty."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def masked_whiten(x: TokenFloat, mask: TokenMask, *, shift_mean: bool = True) -> TokenFloat:
    """[B, T] x scaled to variance 1 over the mask, 0 outside it.

    Args:
        x: values; all tokens of the batch, since mean and variance are the batch's.
        mask: the tokens that count.
        shift_mean: shift to mean 0; off keeps the mean.
    """
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask) + 1e-8)
    return zero_outside(whitened if shift_mean else whitened + mean, mask)


def token_weights(mask: TokenMask, aggregation: Aggregation, dtype: torch.dtype) -> TokenFloat:
    """[B, T] weight of each token in a loss's sum, 0 outside the mask.

    1 for `token_mean`; 1 / (tokens in the row's mask) for `sequence_mean`.
    """
    weights = mask.to(dtype)
    return weights if aggregation == "token_mean" else weights / mask.sum(1, keepdim=True).clamp(min=1)


def unit_of(aggregation: Aggregation) -> Unit:
    """What a sum under this aggregation is divided by the number of."""
    return "token" if aggregation == "token_mean" else "sequence"


def unit_count(mask: TokenMask, unit: Unit) -> int:
    """The number of units in a batch: tokens of the mask, rows that have one, or pairs, of two rows each."""
    if unit == "pair":
        assert len(mask) % 2 == 0, f"pairs have two rows each, got {len(mask)} rows"
        return len(mask) // 2
    return int((mask if unit == "token" else mask.any(1)).sum())


def explained_variance(values: TokenFloat, returns: TokenFloat, mask: TokenMask) -> Scalar:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 is a perfect critic, 0 a constant one.

    0 where the returns do not vary.
    """
    variance = masked_var(returns, mask)
    residual = masked_var(returns - values, mask)
    return torch.where(variance > 0, 1 - residual / variance, torch.zeros_like(variance))
