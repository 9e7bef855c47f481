"""What a learner minimises: a loss of algorithms/, told which outputs and which columns of the batch it reads.

An objective gives sums over the rows it sees, and names the unit to divide them by; the learner divides
once, by the count of that unit in the mini-batch over all workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from rlhf_ray.algorithms.language_losses import negative_log_likelihood
from rlhf_ray.algorithms.logprobs import Entropy
from rlhf_ray.algorithms.masked import Unit
from rlhf_ray.algorithms.policy_losses import ClippedPolicyLoss, KlLoss, ValueLoss
from rlhf_ray.algorithms.preference_losses import (
    AnswerLogprobs,
    BradleyTerryLoss,
    ChosenLoss,
    DpoLoss,
    IpoLoss,
    OrpoLoss,
    SimpoLoss,
    answer_logprobs,
)
from rlhf_ray.data.batches import Batch, Experience, PreferencePairs, ReferencedPairs, Sequences
from rlhf_ray.models.forward import Outputs
from rlhf_ray.shapes import Scalar, SequenceFloat, TokenFloat

B = TypeVar("B", bound=Batch, contravariant=True)
Sums = tuple[Scalar, dict[str, Scalar]]


class Objective(Protocol[B]):
    """A loss over the outputs of a network for rows of a batch."""

    @property
    def unit(self) -> Unit:
        """What the sums are divided by the number of."""

    @property
    def entropy(self) -> Entropy:
        """Whether entropies are wanted, and with a gradient."""

    def sequences(self, batch: B) -> Sequences:
        """The sequences that go through the network: one for each row, or first one of every row, then the next."""

    def __call__(self, outputs: Outputs, rows: B) -> Sums:
        """(sum of the loss, sums of the metrics) over the rows; `loss` is added by the learner."""


@dataclass(frozen=True)
class PolicyObjective:
    """PPO's policy loss, with the KL to the reference as a term of it where `kl` is given."""

    loss: ClippedPolicyLoss
    kl: KlLoss | None

    def __post_init__(self) -> None:
        assert self.kl is None or self.kl.unit == self.unit, "the KL term and the policy loss have one aggregation"

    @property
    def unit(self) -> Unit:
        """That of the policy loss."""
        return self.loss.unit

    @property
    def entropy(self) -> Entropy:
        """Always reported."""
        return "trained" if self.loss.entropy_coefficient > 0 else "reported"

    def sequences(self, batch: Experience) -> Sequences:
        """The rollouts."""
        return batch.sequences

    def __call__(self, outputs: Outputs, rows: Experience) -> Sums:
        """Sum over the response tokens."""
        mask = rows.sequences.response_mask
        loss, metrics = self.loss(
            outputs.logprobs,
            rows.old_logprobs,
            rows.advantages,
            mask,
            entropy=outputs.entropy,
            correction=rows.correction,
        )
        if self.kl is None:
            return loss, metrics
        term = self.kl(outputs.logprobs, rows.reference_logprobs, mask)
        return loss + term, metrics | {"kl_loss": term.detach()}


@dataclass(frozen=True)
class ValueObjective:
    """The critic's loss."""

    loss: ValueLoss

    @property
    def unit(self) -> Unit:
        """That of the value loss."""
        return self.loss.unit

    @property
    def entropy(self) -> Entropy:
        """Not read."""
        return "off"

    def sequences(self, batch: Experience) -> Sequences:
        """The rollouts."""
        return batch.sequences

    def __call__(self, outputs: Outputs, rows: Experience) -> Sums:
        """Sum over the response tokens."""
        return self.loss(outputs.values, rows.values, rows.returns, rows.sequences.response_mask)


@dataclass(frozen=True)
class JointObjective:
    """Policy loss plus `coefficient` times the value loss, for a value head on the policy's trunk."""

    policy: PolicyObjective
    value: ValueObjective
    coefficient: float

    def __post_init__(self) -> None:
        assert self.policy.unit == self.value.unit, "policy and value loss have one aggregation"

    @property
    def unit(self) -> Unit:
        """That of both losses."""
        return self.policy.unit

    @property
    def entropy(self) -> Entropy:
        """That of the policy's objective."""
        return self.policy.entropy

    def sequences(self, batch: Experience) -> Sequences:
        """The rollouts."""
        return batch.sequences

    def __call__(self, outputs: Outputs, rows: Experience) -> Sums:
        """Sum over the response tokens; the critic's metrics have `critic/` in front."""
        policy, metrics = self.policy(outputs, rows)
        value, of_value = self.value(outputs, rows)
        named = {f"critic/{name}": found for name, found in of_value.items()}
        parts = {"loss": policy.detach(), "critic/loss": value.detach()}
        return policy + self.coefficient * value, metrics | named | parts


@dataclass(frozen=True)
class LanguageObjective:
    """Negative log-likelihood of the trained tokens."""

    @property
    def unit(self) -> Unit:
        """Tokens."""
        return "token"

    @property
    def entropy(self) -> Entropy:
        """Not read."""
        return "off"

    def sequences(self, batch: Sequences) -> Sequences:
        """The batch itself."""
        return batch

    def __call__(self, outputs: Outputs, rows: Sequences) -> Sums:
        """Sum over the trained tokens."""
        return negative_log_likelihood(outputs.logprobs, rows.response_mask)


@dataclass(frozen=True)
class BradleyTerryObjective:
    """The loss of a reward model."""

    @property
    def unit(self) -> Unit:
        """Pairs."""
        return BradleyTerryLoss.unit

    @property
    def entropy(self) -> Entropy:
        """Not read."""
        return "off"

    def sequences(self, batch: PreferencePairs) -> Sequences:
        """All chosen answers, then all rejected ones."""
        return Sequences.concat([batch.chosen, batch.rejected])

    def __call__(self, outputs: Outputs, rows: PreferencePairs) -> Sums:
        """Sum over the pairs; an answer's score is read at its last token."""
        chosen, rejected = outputs.final_values.chunk(2)
        return BradleyTerryLoss()(chosen, rejected, rows.margins)


@dataclass(frozen=True)
class PreferenceObjective:
    """DPO's loss or one of its relatives, with the likelihood of the chosen answers as a term where `nll` is given."""

    loss: DpoLoss | IpoLoss | SimpoLoss | OrpoLoss
    nll: ChosenLoss | None

    @property
    def unit(self) -> Unit:
        """Pairs."""
        return self.loss.unit

    @property
    def entropy(self) -> Entropy:
        """Not read."""
        return "off"

    def sequences(self, batch: ReferencedPairs) -> Sequences:
        """All chosen answers, then all rejected ones."""
        return Sequences.concat([batch.pairs.chosen, batch.pairs.rejected])

    def __call__(self, outputs: Outputs, rows: ReferencedPairs) -> Sums:
        """Sum over the pairs."""
        return self.judge(outputs.logprobs, rows)

    def judge(self, logprobs: TokenFloat, rows: ReferencedPairs) -> Sums:
        """(sum of the loss, sums of the metrics) over the pairs.

        Args:
            logprobs: [2B, T] the policy's log-probabilities of the rows of `sequences`.
            rows: the pairs.
        """
        chosen, rejected = self._sides(logprobs, rows)
        if isinstance(self.loss, DpoLoss | IpoLoss):
            loss, metrics = self.loss(chosen, rejected, **_reference(rows))
        else:
            loss, metrics = self.loss(chosen, rejected)
        if self.nll is None:
            return loss, metrics
        term = self.nll(chosen)
        return loss + term, metrics | {"nll_loss": term.detach()}

    def rewards(self, logprobs: TokenFloat, rows: ReferencedPairs) -> tuple[SequenceFloat, SequenceFloat]:
        """Implicit rewards [B] of the chosen and of the rejected answers; arguments as of `judge`."""
        chosen, rejected = self._sides(logprobs, rows)
        if isinstance(self.loss, DpoLoss | IpoLoss):
            return self.loss.rewards(chosen, rejected, **_reference(rows))
        return self.loss.rewards(chosen, rejected)

    def _sides(self, logprobs: TokenFloat, rows: ReferencedPairs) -> tuple[AnswerLogprobs, AnswerLogprobs]:
        both = answer_logprobs(logprobs, self.sequences(rows).response_mask)
        totals, lengths = both.total.chunk(2), both.length.chunk(2)
        return AnswerLogprobs(totals[0], lengths[0]), AnswerLogprobs(totals[1], lengths[1])


def _reference(rows: ReferencedPairs) -> dict[str, SequenceFloat]:
    return {"reference_chosen": rows.reference_chosen, "reference_rejected": rows.reference_rejected}
