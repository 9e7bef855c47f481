"""How much a call had to do: tokens and bytes, read off its arguments and its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.data.batches import Batch, Rollouts
from rlhf_ray.distributed.transports import ReceivedWeights, SentWeights


@dataclass(frozen=True)
class Work:
    """What a call had to do; 0 where it was not about that.

    Args:
        tokens: sampled tokens where the result is sampled, else the real tokens of the first batch it was given.
        nbytes: bytes of weights sent or received.
    """

    tokens: int = 0
    nbytes: int = 0


def work_of(arguments: Sequence[Any], result: Any) -> Work:
    """The work of one call; costs some microseconds, and never reads padding."""
    results = result if isinstance(result, list) else [result]
    nbytes = sum(item.nbytes for item in results if isinstance(item, SentWeights | ReceivedWeights))
    sampled = [
        int(rollouts.sequences.response_mask.sum())
        for rollouts in (getattr(item, "rollouts", item) for item in results)
        if isinstance(rollouts, Rollouts)
    ]
    if sampled:
        return Work(sum(sampled), nbytes)
    given = next((argument for argument in arguments if isinstance(argument, Batch)), None)
    return Work(0 if given is None else given.token_count(), nbytes)
