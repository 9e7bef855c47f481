"""Advantages: how much better an action was than expected. Whitening is a separate call (`masked_whiten`)."""

import torch

from rlhf_ray.algorithms.checks import require
from rlhf_ray.algorithms.masked import zero_outside
from rlhf_ray.shapes import SequenceFloat, TokenFloat, TokenMask


def gae(
    rewards: TokenFloat,
    values: TokenFloat,
    mask: TokenMask,
    bootstrap: SequenceFloat,
    *,
    gamma: float,
    lam: float,
) -> tuple[TokenFloat, TokenFloat]:
    """([B, T] advantages, [B, T] returns) by generalised advantage estimation; 0 outside the mask.

    Tokens outside the mask are skipped: the token before a gap is followed by the token after it.

    Args:
        rewards: reward for token t.
        values: value before token t.
        mask: response tokens, gaps allowed.
        bootstrap: value after a row's last token; 0 where the response has ended.
        gamma: discount per token, 0 to 1.
        lam: weight of the longer returns, 0 to 1.
    """
    require(0 <= gamma <= 1, "gamma", gamma, "a number from 0 to 1")
    require(0 <= lam <= 1, "lam", lam, "a number from 0 to 1")
    advantage, next_value = torch.zeros_like(bootstrap), bootstrap
    # By time, so that each step reads what lies together.
    r, v, counts = (x.t().contiguous() for x in (rewards, values, mask))
    backwards = []
    for t in reversed(range(len(counts))):
        delta = r[t] + gamma * next_value - v[t]  # arXiv:1506.02438, section 3: delta^V
        here = delta + gamma * lam * advantage  # arXiv:1506.02438, eq. 16, as a recursion
        advantage = torch.where(counts[t], here, advantage)
        next_value = torch.where(counts[t], v[t], next_value)
        backwards.append(advantage)
    advantages = torch.stack(backwards[::-1], dim=1)
    return zero_outside(advantages, mask), zero_outside(advantages + values, mask)


def group_relative(sequence_rewards: SequenceFloat, *, group_size: int, divide_by_std: bool = True) -> SequenceFloat:
    """[B] each reward less its group's mean, over its group's standard deviation.

    Args:
        sequence_rewards: sums of the token rewards, siblings of one prompt adjacent.
        group_size: samples of one prompt, at least 2.
        divide_by_std: off is Dr. GRPO (arXiv:2503.20783).
    """
    groups = _groups(sequence_rewards, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if divide_by_std:
        centred = centred / (groups.std(1, keepdim=True) + 1e-6)  # arXiv:2402.03300, section 4.1.2
    return centred.flatten()


def leave_one_out(sequence_rewards: SequenceFloat, *, group_size: int) -> SequenceFloat:
    """[B] each reward less the mean of its siblings' (RLOO).

    Args:
        sequence_rewards: sums of the token rewards, siblings of one prompt adjacent.
        group_size: samples of one prompt, at least 2.
    """
    groups = _groups(sequence_rewards, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()  # arXiv:2402.14740, the RLOO estimator


def reinforce_baseline(sequence_rewards: SequenceFloat, *, group_size: int) -> SequenceFloat:
    """[B] each reward less its group's mean, to be whitened over the batch's tokens (REINFORCE++).

    Args:
        sequence_rewards: sums of the token rewards, siblings of one prompt adjacent.
        group_size: samples of one prompt, at least 2.
    """
    groups = _groups(sequence_rewards, group_size)
    return (groups - groups.mean(1, keepdim=True)).flatten()  # arXiv:2501.03262, the baseline variant


def broadcast_to_tokens(advantages: SequenceFloat, mask: TokenMask) -> TokenFloat:
    """[B, T] a sequence's advantage on each token of its mask, 0 outside."""
    return zero_outside(advantages[:, None].expand(mask.shape), mask)


def _groups(sequence_rewards: SequenceFloat, group_size: int) -> torch.Tensor:
    require(group_size >= 2, "group_size", group_size, "at least 2 samples of a prompt to compare")
    rows = len(sequence_rewards)
    require(rows % group_size == 0, "group_size", group_size, f"a divisor of the batch's {rows} sequences")
    return sequence_rewards.reshape(-1, group_size)
