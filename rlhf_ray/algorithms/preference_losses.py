"""The losses of reward models and of DPO and its relatives, over pairs of a chosen and a rejected answer.

Each returns a sum over the pairs and the sums of its metrics; the learner divides both once, by the number
of pairs in the whole mini-batch. All of them report `accuracy`, `margin`, and what those compare.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from rlhf_ray.algorithms.checks import require
from rlhf_ray.algorithms.masked import Unit, masked_row_sum
from rlhf_ray.shapes import Scalar, SequenceFloat, SequenceInt, TokenFloat, TokenMask

# A mean log-probability of 0 has infinite odds; this one has odds of a million.
_LARGEST_MEAN = -1e-6


@dataclass(frozen=True)
class AnswerLogprobs:
    """The log-probabilities of one side of the pairs: all chosen answers, or all rejected ones.

    Args:
        total: [B] sum over each answer's tokens.
        length: [B] tokens of each answer, at least 1.
    """

    total: SequenceFloat
    length: SequenceInt

    @property
    def mean(self) -> SequenceFloat:
        """[B] log-probability per token."""
        return self.total / self.length


def answer_logprobs(logprobs: TokenFloat, mask: TokenMask) -> AnswerLogprobs:
    """The log-probability and length of each row's answer.

    Args:
        logprobs: log-probabilities of the tokens.
        mask: tokens of the answers; every row has one.
    """
    return AnswerLogprobs(masked_row_sum(logprobs, mask), mask.sum(1))


def preferred(chosen: SequenceFloat, rejected: SequenceFloat) -> SequenceFloat:
    """[B] 1 where the chosen answer is the higher, 0 where it is the lower, 1/2 where they are equal.

    Its mean is the accuracy: 1/2 for a model that gives every answer the same.
    """
    return (1 + torch.sign(chosen - rejected)) / 2


@dataclass(frozen=True)
class BradleyTerryLoss:
    """The loss of a reward model: how unlikely its scores make the preferences that were observed."""

    unit: ClassVar[Unit] = "pair"

    def __call__(
        self, chosen_scores: SequenceFloat, rejected_scores: SequenceFloat, margins: SequenceFloat
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """(sum of the loss, sums of the metrics) over the pairs.

        Metrics: `accuracy` (`preferred`), `margin` (chosen less rejected score), `chosen_score`, `rejected_score`.

        Args:
            chosen_scores: scores of the chosen answers.
            rejected_scores: scores of the rejected answers.
            margins: by how much the chosen score is to be above the rejected one; 0 where unknown.
        """
        difference = chosen_scores - rejected_scores
        loss = -logsigmoid(difference - margins).sum()  # arXiv:2307.09288, eq. 2
        return loss, _sums(
            accuracy=preferred(chosen_scores, rejected_scores),
            margin=difference,
            chosen_score=chosen_scores,
            rejected_score=rejected_scores,
        )


@dataclass(frozen=True)
class _ReferencedLoss:
    """A loss of the policy's log-ratio to a reference."""

    beta: float
    unit: ClassVar[Unit] = "pair"

    def __post_init__(self) -> None:
        _require_positive("beta", self.beta)

    def rewards(
        self,
        chosen: AnswerLogprobs,
        rejected: AnswerLogprobs,
        *,
        reference_chosen: SequenceFloat,
        reference_rejected: SequenceFloat,
    ) -> tuple[SequenceFloat, SequenceFloat]:
        """Implicit rewards [B] of the chosen and of the rejected answers: beta times the log-ratio to the reference."""
        return self.beta * (chosen.total - reference_chosen), self.beta * (rejected.total - reference_rejected)


@dataclass(frozen=True)
class DpoLoss(_ReferencedLoss):
    """The Bradley-Terry loss of the implicit rewards, beta * log(pi / pi_reference).

    Args:
        beta: how strongly the policy is held to the reference, above 0.
        label_smoothing: share of the preferences taken to be the wrong way round, from 0 to below 1/2.
    """

    label_smoothing: float

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = 0 <= self.label_smoothing < 0.5
        require(holds, "label_smoothing", self.label_smoothing, "a number from 0 to below 0.5")

    def __call__(
        self,
        chosen: AnswerLogprobs,
        rejected: AnswerLogprobs,
        *,
        reference_chosen: SequenceFloat,
        reference_rejected: SequenceFloat,
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """(sum of the loss, sums of the metrics) over the pairs.

        Metrics: `chosen_reward` and `rejected_reward` (implicit), their `accuracy` and `margin`,
        `chosen_logprob` and `rejected_logprob`.

        Args:
            chosen: the policy's, of the chosen answers.
            rejected: the policy's, of the rejected answers.
            reference_chosen: the reference's totals, of the chosen answers.
            reference_rejected: the reference's totals, of the rejected answers.
        """
        chosen_reward, rejected_reward = self.rewards(
            chosen, rejected, reference_chosen=reference_chosen, reference_rejected=reference_rejected
        )
        h = chosen_reward - rejected_reward
        right, flipped = -logsigmoid(h), -logsigmoid(-h)  # arXiv:2305.18290, eq. 7
        loss = ((1 - self.label_smoothing) * right + self.label_smoothing * flipped).sum()
        return loss, _sums_of_pairs(chosen, rejected, chosen_reward, rejected_reward)


@dataclass(frozen=True)
class IpoLoss(_ReferencedLoss):
    """A squared distance: chosen and rejected are to differ by 1 / (2 beta), and no further.

    Args:
        beta: how strongly the policy is held to the reference, above 0; the paper's tau.
    """

    def __call__(
        self,
        chosen: AnswerLogprobs,
        rejected: AnswerLogprobs,
        *,
        reference_chosen: SequenceFloat,
        reference_rejected: SequenceFloat,
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """(sum of the loss, sums of the metrics) over the pairs.

        The loss reads log-probabilities per token, which the paper leaves open; the metrics are those of
        `DpoLoss`, with rewards of whole answers, so that the two can be compared.

        Args:
            chosen: the policy's, of the chosen answers.
            rejected: the policy's, of the rejected answers.
            reference_chosen: the reference's totals, of the chosen answers.
            reference_rejected: the reference's totals, of the rejected answers.
        """
        chosen_log_ratio, rejected_log_ratio = chosen.total - reference_chosen, rejected.total - reference_rejected
        difference = chosen_log_ratio / chosen.length - rejected_log_ratio / rejected.length
        loss = (difference - 1 / (2 * self.beta)).square().sum()  # arXiv:2310.12036, eq. 17
        rewards = self.rewards(
            chosen, rejected, reference_chosen=reference_chosen, reference_rejected=reference_rejected
        )
        return loss, _sums_of_pairs(chosen, rejected, *rewards)


@dataclass(frozen=True)
class SimpoLoss:
    """The Bradley-Terry loss of beta times the log-probability per token; no reference.

    Args:
        beta: scale of the rewards, above 0.
        gamma: by how much the chosen reward is to be above the rejected one, at least 0.
    """

    beta: float
    gamma: float
    unit: ClassVar[Unit] = "pair"

    def __post_init__(self) -> None:
        _require_positive("beta", self.beta)
        _require_at_least_zero("gamma", self.gamma)

    def rewards(self, chosen: AnswerLogprobs, rejected: AnswerLogprobs) -> tuple[SequenceFloat, SequenceFloat]:
        """Rewards [B] of the chosen and of the rejected answers: beta times the log-probability per token."""
        return self.beta * chosen.mean, self.beta * rejected.mean

    def __call__(self, chosen: AnswerLogprobs, rejected: AnswerLogprobs) -> tuple[Scalar, dict[str, Scalar]]:
        """(sum of the loss, sums of the metrics) over the pairs.

        Metrics: those of `DpoLoss`; a reward is beta times the log-probability per token.

        Args:
            chosen: the policy's, of the chosen answers.
            rejected: the policy's, of the rejected answers.
        """
        chosen_reward, rejected_reward = self.rewards(chosen, rejected)
        loss = -logsigmoid(chosen_reward - rejected_reward - self.gamma).sum()  # arXiv:2405.14734
        return loss, _sums_of_pairs(chosen, rejected, chosen_reward, rejected_reward)


@dataclass(frozen=True)
class OrpoLoss:
    """Fine-tuning on the chosen answers, plus the Bradley-Terry loss of the answers' log-odds; no reference.

    Args:
        coefficient: weight of the odds ratio's term, above 0; the paper's lambda.
    """

    coefficient: float
    unit: ClassVar[Unit] = "pair"

    def __post_init__(self) -> None:
        _require_positive("coefficient", self.coefficient)

    def rewards(self, chosen: AnswerLogprobs, rejected: AnswerLogprobs) -> tuple[SequenceFloat, SequenceFloat]:
        """Rewards [B] of the chosen and of the rejected answers: the log-odds of their probability per token."""
        return _log_odds(chosen.mean), _log_odds(rejected.mean)

    def __call__(self, chosen: AnswerLogprobs, rejected: AnswerLogprobs) -> tuple[Scalar, dict[str, Scalar]]:
        """(sum of the loss, sums of the metrics) over the pairs.

        An answer's probability is the exponential of its log-probability per token. Metrics: those of `DpoLoss`,
        a reward being the log-odds, and `nll` (negative log-likelihood per token of the chosen answers).

        Args:
            chosen: the policy's, of the chosen answers.
            rejected: the policy's, of the rejected answers.
        """
        chosen_odds, rejected_odds = self.rewards(chosen, rejected)
        odds_ratio = -logsigmoid(chosen_odds - rejected_odds)  # arXiv:2403.07691, eq. 7
        nll = -chosen.mean
        loss = (nll + self.coefficient * odds_ratio).sum()  # eq. 6
        return loss, _sums_of_pairs(chosen, rejected, chosen_odds, rejected_odds) | _sums(nll=nll)


@dataclass(frozen=True)
class ChosenLoss:
    """The negative log-likelihood of the chosen answers as a term added to a preference loss.

    Args:
        coefficient: weight of the term, at least 0.
    """

    coefficient: float
    unit: ClassVar[Unit] = "pair"

    def __post_init__(self) -> None:
        _require_at_least_zero("coefficient", self.coefficient)

    def __call__(self, chosen: AnswerLogprobs) -> Scalar:
        """coefficient times the sum over the pairs of the chosen answer's loss per token.

        Args:
            chosen: the policy's, of the chosen answers.
        """
        return -self.coefficient * chosen.mean.sum()  # arXiv:2404.19733


def _log_odds(mean_logprob: SequenceFloat) -> SequenceFloat:
    mean_logprob = mean_logprob.clamp(max=_LARGEST_MEAN)
    return mean_logprob - torch.log(-torch.expm1(mean_logprob))


def _sums_of_pairs(
    chosen: AnswerLogprobs, rejected: AnswerLogprobs, chosen_reward: SequenceFloat, rejected_reward: SequenceFloat
) -> dict[str, Scalar]:
    return _sums(
        accuracy=preferred(chosen_reward, rejected_reward),
        margin=chosen_reward - rejected_reward,
        chosen_reward=chosen_reward,
        rejected_reward=rejected_reward,
        chosen_logprob=chosen.total,
        rejected_logprob=rejected.total,
    )


def _sums(**per_pair: SequenceFloat) -> dict[str, Scalar]:
    return {name: x.sum().detach() for name, x in per_pair.items()}


def _require_positive(name: str, got: float) -> None:
    require(got > 0 and math.isfinite(got), name, got, "a finite number above 0")


def _require_at_least_zero(name: str, got: float) -> None:
    require(got >= 0 and math.isfinite(got), name, got, "a finite number, 0 or above")
