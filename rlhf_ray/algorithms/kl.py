"""Estimators of KL(policy || reference) from the policy's own samples, and the coefficient that weighs it.

With d = log policy - log reference of a sampled token; joschu.net/blog/kl-approx.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from rlhf_ray.algorithms.checks import require
from rlhf_ray.shapes import TokenFloat

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to plus and minus this before exp."""

Estimator: TypeAlias = Callable[[TokenFloat, TokenFloat], TokenFloat]
EstimatorName: TypeAlias = Literal["k1", "k2", "k3"]


def k1(logprobs: TokenFloat, reference_logprobs: TokenFloat) -> TokenFloat:
    """[B, T] d: unbiased, high variance, may be negative."""
    return logprobs - reference_logprobs  # joschu.net/blog/kl-approx, k1


def k2(logprobs: TokenFloat, reference_logprobs: TokenFloat) -> TokenFloat:
    """[B, T] d^2 / 2: biased, low variance; as a loss its gradient on-policy is that of the KL."""
    return 0.5 * (logprobs - reference_logprobs).square()  # joschu.net/blog/kl-approx, k2


def k3(logprobs: TokenFloat, reference_logprobs: TokenFloat) -> TokenFloat:
    """[B, T] exp(-d) - 1 + d with d clamped to +-20: unbiased, low variance, never negative."""
    d = (logprobs - reference_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (-d).expm1() + d  # joschu.net/blog/kl-approx, k3


def estimator(name: EstimatorName) -> Estimator:
    """The estimator of that name; raises ValueError for an unknown one."""
    estimators: dict[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3}
    require(name in estimators, "estimator", name, "k1, k2 or k3")
    return estimators[name]


class FixedKlController:
    """A KL coefficient that stays what it is. It has no state: a resumed run takes the setting.

    Args:
        coefficient: weight of the KL term, at least 0.
    """

    def __init__(self, coefficient: float) -> None:
        _require_coefficient(coefficient)
        self.coefficient = coefficient

    def update(self, kl_per_sequence: float, num_sequences: int) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps: nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Nothing is taken from a checkpoint."""


class AdaptiveKlController:
    """A KL coefficient that follows the measured KL to a target (arXiv:1909.08593, section 2.2).

    Args:
        coefficient: initial weight of the KL term, above 0 (it is changed by factors).
        target: KL per sequence to hold, in nats.
        horizon: number of sequences over which the coefficient reacts.
    """

    def __init__(self, coefficient: float, *, target: float, horizon: float) -> None:
        _require_coefficient(coefficient)
        require(coefficient > 0, "coefficient", coefficient, "a number above 0 for an adaptive coefficient")
        require(target > 0 and math.isfinite(target), "target", target, "a finite number above 0")
        require(horizon > 0 and math.isfinite(horizon), "horizon", horizon, "a finite number above 0")
        self.coefficient = coefficient
        self._target = target
        self._horizon = horizon

    def update(self, kl_per_sequence: float, num_sequences: int) -> None:
        """Moves the coefficient by at most a fifth of num_sequences / horizon.

        Args:
            kl_per_sequence: the batch's mean of KL summed over a sequence, in nats.
            num_sequences: sequences in the batch, fewer than 5 horizons.
        """
        require(math.isfinite(kl_per_sequence), "kl_per_sequence", kl_per_sequence, "a finite number")
        require(
            num_sequences < 5 * self._horizon,
            "horizon",
            self._horizon,
            f"more than a fifth of the {num_sequences} sequences of a batch, or the coefficient turns negative",
        )
        error = min(max(kl_per_sequence / self._target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * num_sequences / self._horizon  # arXiv:1909.08593, section 2.2

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continues from a checkpoint's coefficient."""
        _require_coefficient(state["coefficient"])
        self.coefficient = state["coefficient"]


def _require_coefficient(coefficient: float) -> None:
    require(coefficient >= 0 and math.isfinite(coefficient), "coefficient", coefficient, "a finite number, 0 or above")
