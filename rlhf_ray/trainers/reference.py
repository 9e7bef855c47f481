"""The reference's log-probabilities, whoever computes them."""

from __future__ import annotations

from rlhf_ray.data.batches import Sequences
from rlhf_ray.distributed.groups import Pending, WorkerGroup
from rlhf_ray.shapes import SequenceFloat, TokenFloat
from rlhf_ray.workers.learner import Learner
from rlhf_ray.workers.scorers import ReferenceScorer


def reference_logprobs(
    reference: WorkerGroup[ReferenceScorer] | None,
    policy: WorkerGroup[Learner],
    sequences: Sequences,
    temperature: float,
) -> Pending[TokenFloat]:
    """[B, T] log pi_ref of the response tokens, 0 elsewhere: asked of the reference's own workers where there are any,
    else of the policy's, which switch their adapter off for it.
    """
    if reference is not None:
        return reference.split(ReferenceScorer.logprobs, sequences, temperature)
    return policy.split(Learner.reference_logprobs, sequences, temperature)


def reference_answer_logprobs(
    reference: WorkerGroup[ReferenceScorer] | None, policy: WorkerGroup[Learner], sequences: Sequences
) -> Pending[SequenceFloat]:
    """[B] log pi_ref of each row's response at temperature 1, asked of the same workers.

    Args:
        sequences: the answers of one pair are adjacent, and stay together.
    """
    if reference is not None:
        return reference.split_groups(2, ReferenceScorer.answer_logprobs, sequences)
    return policy.split_groups(2, Learner.reference_answer_logprobs, sequences)
