"""The losses of PPO. Each returns a sum over a batch and the sums of its metrics.

The learner divides both once, by the number of units (`unit`) in the whole mini-batch over all
workers and micro-batches, so that cutting a mini-batch differently changes nothing.
"""

import math
from dataclasses import dataclass

import torch

from rlhf_ray.algorithms import kl
from rlhf_ray.algorithms.checks import require
from rlhf_ray.algorithms.masked import Aggregation, Unit, token_weights, unit_of, zero_outside
from rlhf_ray.shapes import Scalar, TokenFloat, TokenMask


@dataclass(frozen=True, kw_only=True)
class ClippedPolicyLoss:
    """PPO's clipped surrogate, negated, less the entropy bonus.

    Args:
        clip_low: the ratio is clipped below at 1 - clip_low, from 0 to 1.
        clip_high: the ratio is clipped above at 1 + clip_high, at least 0.
        dual_clip: bound c > 1 on the surrogate of negative advantages, c * A; None is off.
        entropy_coefficient: weight of the entropy bonus, at least 0.
        aggregation: mean over tokens, or over sequences of each one's mean.
    """

    clip_low: float
    clip_high: float
    dual_clip: float | None
    entropy_coefficient: float
    aggregation: Aggregation

    def __post_init__(self) -> None:
        require(0 <= self.clip_low <= 1, "clip_low", self.clip_low, "a number from 0 to 1")
        _require_finite("clip_high", self.clip_high)
        if self.dual_clip is not None:
            holds = self.dual_clip > 1 and math.isfinite(self.dual_clip)
            require(holds, "dual_clip", self.dual_clip, "a finite number above 1, or None")
        _require_finite("entropy_coefficient", self.entropy_coefficient)
        _require_aggregation(self.aggregation)

    @property
    def unit(self) -> Unit:
        """What the sums are to be divided by the number of."""
        return unit_of(self.aggregation)

    def __call__(
        self,
        logprobs: TokenFloat,
        old_logprobs: TokenFloat,
        advantages: TokenFloat,
        mask: TokenMask,
        *,
        entropy: TokenFloat,
        correction: TokenFloat,
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """(sum of the loss, sums of the metrics) over the mask.

        Metrics: `surrogate` (the loss without the entropy bonus), `entropy`, `ratio`, `approx_kl` (k3 between
        old and new policy), `clip_fraction` and `dual_clip_fraction` (tokens whose gradient the clip removed),
        `correction_weight`.

        Args:
            logprobs: log-probabilities under the policy that is trained.
            old_logprobs: log-probabilities before the update.
            advantages: advantages.
            mask: response tokens.
            entropy: entropies of the policy's distributions.
            correction: weights from `truncated_importance_weights`; 1 where off.
        """
        log_ratio = zero_outside(logprobs - old_logprobs, mask)
        ratio = log_ratio.clamp(-kl.LOG_RATIO_LIMIT, kl.LOG_RATIO_LIMIT).exp()
        advantages, correction = zero_outside(advantages, mask), zero_outside(correction, mask)
        unclipped = ratio * advantages
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages
        objective = torch.minimum(unclipped, clipped)  # arXiv:1707.06347, eq. 7
        bounded = torch.zeros_like(mask)
        if self.dual_clip is not None:
            floor = self.dual_clip * advantages  # max(objective, c * A) where A < 0: arXiv:1912.09729, eq. 5
            bounded = (advantages < 0) & (floor > objective)
            objective = torch.where(bounded, floor, objective)
        surrogate = -correction.detach() * objective
        entropy = zero_outside(entropy, mask)

        weights = token_weights(mask, self.aggregation, logprobs.dtype)
        loss = (weights * (surrogate - self.entropy_coefficient * entropy)).sum()
        return loss, _weighted_sums(
            weights,
            surrogate=surrogate,
            entropy=entropy,
            ratio=ratio,
            approx_kl=kl.k3(torch.zeros_like(log_ratio), log_ratio),
            clip_fraction=clipped < unclipped,
            dual_clip_fraction=bounded,
            correction_weight=correction,
        )


@dataclass(frozen=True)
class KlLoss:
    """The KL to the reference as a term of the policy's loss.

    Args:
        estimator: k2 or k3; k1 has no gradient in expectation on-policy.
        coefficient: weight of the term, at least 0.
        aggregation: that of the policy loss it is added to.
    """

    estimator: kl.EstimatorName
    coefficient: float
    aggregation: Aggregation

    def __post_init__(self) -> None:
        require(self.estimator in ("k2", "k3"), "estimator", self.estimator, "k2 or k3 (k1 as a loss has no gradient)")
        _require_finite("coefficient", self.coefficient)
        _require_aggregation(self.aggregation)

    @property
    def unit(self) -> Unit:
        """What the sum is to be divided by the number of."""
        return unit_of(self.aggregation)

    def __call__(self, logprobs: TokenFloat, reference_logprobs: TokenFloat, mask: TokenMask) -> Scalar:
        """coefficient times the sum of the estimator over the mask."""
        logprobs, reference_logprobs = zero_outside(logprobs, mask), zero_outside(reference_logprobs, mask)
        per_token = kl.estimator(self.estimator)(logprobs, reference_logprobs)
        return self.coefficient * (token_weights(mask, self.aggregation, logprobs.dtype) * per_token).sum()


@dataclass(frozen=True)
class ValueLoss:
    """Half the squared error of the critic, the larger of clipped and unclipped.

    Args:
        clip: new values are clipped to this distance from the old ones; 0 is off.
        aggregation: mean over tokens, or over sequences of each one's mean.
    """

    clip: float
    aggregation: Aggregation

    def __post_init__(self) -> None:
        _require_finite("clip", self.clip)
        _require_aggregation(self.aggregation)

    @property
    def unit(self) -> Unit:
        """What the sums are to be divided by the number of."""
        return unit_of(self.aggregation)

    def __call__(
        self, values: TokenFloat, old_values: TokenFloat, returns: TokenFloat, mask: TokenMask
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """(sum of the loss, sums of the metrics) over the mask.

        Metrics: `value`, `squared_error` (unclipped), `clip_fraction` (tokens whose clipped error is the larger).

        Args:
            values: the critic's values.
            old_values: the critic's values before the update.
            returns: targets.
            mask: response tokens.
        """
        values, old_values, returns = (zero_outside(x, mask) for x in (values, old_values, returns))
        error = (values - returns).square()
        limited = values.clamp(old_values - self.clip, old_values + self.clip) if self.clip > 0 else values
        clipped_error = (limited - returns).square()
        weights = token_weights(mask, self.aggregation, values.dtype)
        loss = (weights * 0.5 * torch.maximum(error, clipped_error)).sum()  # arXiv:2005.12729, section 3
        return loss, _weighted_sums(weights, value=values, squared_error=error, clip_fraction=clipped_error > error)


def truncated_importance_weights(
    learner_logprobs: TokenFloat, generator_logprobs: TokenFloat, mask: TokenMask, *, cap: float
) -> tuple[TokenFloat, TokenMask]:
    """([B, T] min(pi_learner / pi_generator, cap), [B, T] which ones were capped); 1 and False outside the mask.

    Args:
        learner_logprobs: log-probabilities under the learner before the update.
        generator_logprobs: log-probabilities under the distribution that the generator sampled from.
        mask: response tokens.
        cap: largest weight, above 0.
    """
    require(cap > 0 and math.isfinite(cap), "cap", cap, "a finite number above 0")
    log_ratio = zero_outside(learner_logprobs - generator_logprobs, mask).detach()
    ratio = log_ratio.clamp(-kl.LOG_RATIO_LIMIT, kl.LOG_RATIO_LIMIT).exp()
    weights = ratio.clamp(max=cap)  # arXiv:1802.01561, eq. 1: rho = min(rho-bar, pi / mu)
    return torch.where(mask, weights, 1.0), mask & (ratio > cap)


def _weighted_sums(weights: TokenFloat, **per_token: torch.Tensor) -> dict[str, Scalar]:
    return {name: (weights * x).sum().detach() for name, x in per_token.items()}


def _require_finite(name: str, got: float) -> None:
    require(got >= 0 and math.isfinite(got), name, got, "a finite number, 0 or above")


def _require_aggregation(got: str) -> None:
    require(got in ("token_mean", "sequence_mean"), "aggregation", got, "token_mean or sequence_mean")
