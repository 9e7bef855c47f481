"""From a sequence's score to the rewards of its tokens."""

import math

import torch

from rlhf_ray.algorithms import kl
from rlhf_ray.algorithms.checks import require
from rlhf_ray.algorithms.masked import zero_outside
from rlhf_ray.shapes import SequenceFloat, SequenceInt, SequenceMask, TokenFloat, TokenMask


def shape_scores(
    scores: SequenceFloat, finished: SequenceMask, *, clip: float, missing_eos_penalty: float
) -> SequenceFloat:
    """[B] scores clipped to +-clip, and then less the penalty where the response was cut by the length limit.

    Args:
        scores: a scalar for each sequence.
        finished: ended by an end-of-sequence token or a stop string.
        clip: bound on the score's size; 0 turns it off.
        missing_eos_penalty: subtracted from unfinished sequences, at least 0.
    """
    require(clip >= 0, "clip", clip, "a number, 0 or above")
    require(
        missing_eos_penalty >= 0 and math.isfinite(missing_eos_penalty),
        "missing_eos_penalty",
        missing_eos_penalty,
        "a finite number, 0 or above",
    )
    clipped = scores.clamp(-clip, clip) if clip > 0 else scores
    return torch.where(finished, clipped, clipped - missing_eos_penalty)


def last_response_index(response_mask: TokenMask) -> SequenceInt:
    """[B] index of each row's last response token; 0, which never is one, where a row has none."""
    position = torch.arange(response_mask.shape[1], device=response_mask.device)
    return torch.where(response_mask, position, 0).amax(1)


def token_rewards(
    scores: SequenceFloat,
    logprobs: TokenFloat,
    reference_logprobs: TokenFloat,
    response_mask: TokenMask,
    *,
    coefficient: float,
    estimator: kl.EstimatorName = "k1",
) -> TokenFloat:
    """[B, T] -coefficient * KL on every response token, plus the score on the last one; 0 elsewhere.

    A row without response tokens has no reward.

    Args:
        scores: [B] shaped scores.
        logprobs: log-probabilities under the policy that sampled.
        reference_logprobs: log-probabilities under the reference.
        response_mask: response tokens, never position 0.
        coefficient: weight of the KL term.
        estimator: per-token estimator of the KL.
    """
    penalty = zero_outside(kl.estimator(estimator)(logprobs, reference_logprobs), response_mask)
    position = torch.arange(response_mask.shape[1], device=response_mask.device)
    last = response_mask & (position == last_response_index(response_mask)[:, None])
    return torch.where(last, scores[:, None], 0.0) - coefficient * penalty  # arXiv:1909.08593, eq. 2
