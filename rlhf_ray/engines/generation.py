"""What a generation engine does: sample responses, give log-probabilities, take new weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rlhf_ray.config import schema
from rlhf_ray.distributed.transports import ReceivedWeights, TransportSpec

EnginePart = Literal["weights", "cache"]
"""What an engine holds on a GPU: its weights, and the keys and values of the tokens it has seen."""


@dataclass(frozen=True)
class Sample:
    """One response.

    Args:
        token_ids: the response's tokens, with the end-of-sequence token where it was generated.
        logprobs: of each token, under the distribution that it was sampled from.
        finished: ended by an end-of-sequence token or a stop string, not by the length limit.
        text: the response without special tokens and stop string.
        versions: of the weights that sampled each token.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool
    text: str
    versions: list[int]


class GenerationEngine(Protocol):
    """An engine with one model's weights."""

    @property
    def receivers(self) -> int:
        """Number of receivers that a transfer of weights meets in this engine."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its response together."""

    @property
    def cache_block(self) -> int:
        """Tokens of a block of the prefix cache; 0 where there is none."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model knows."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: schema.Sampling, *, seeds: Sequence[int]
    ) -> list[Sample]:
        """One response for each prompt, in order; a response depends on its prompt, its seed and the weights alone.

        `sampling.samples_per_prompt` is not read: a prompt stands in the list as often as it is wanted. Responses that
        were started before may go on meanwhile; none of them is lost.
        """

    def start(self, prompts: Sequence[Sequence[int]], sampling: schema.Sampling, *, seeds: Sequence[int]) -> list[int]:
        """Queues the same responses, and gives their numbers, which were never given before; `step` generates them."""

    def step(self) -> list[tuple[int, Sample]]:
        """One step of all that was started; numbers and responses that have ended since the last call.

        In the order in which they ended, by number where they did so in one step. Nothing where nothing is left.
        """

    def restart(self) -> None:
        """Every response that was started and has not ended begins anew: from its prompt, with its seed."""

    def prompt_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """For each prompt the log-probability of each token at temperature 1, computed afresh; 0 for the first."""

    def next_tokens(self, sequences: Sequence[Sequence[int]], count: int) -> list[list[tuple[int, float]]]:
        """For each sequence the `count` most likely next tokens and their log-probabilities, best first.

        At temperature 1 and without filters; fewer where the vocabulary is smaller.
        """

    def receive(
        self, spec: TransportSpec, version: int, *, first_rank: int, load: bool = True
    ) -> list[ReceivedWeights]:
        """Takes a transfer of weights and loads them; one result per receiver.

        An engine that was told of an adapter takes the adapter's tensors alone. The prefix cache is not touched:
        `reset_prefix_cache` comes next. Responses that have not ended go on under the new weights.

        Args:
            first_rank: rank of this engine's first receiver in the transfer.
            load: off: the weights are received and thrown away (for tests of the attestation).

        Raises:
            WeightSyncError: another version arrives, the sender fails, or a deadline passes.
        """

    def reset_prefix_cache(self) -> None:
        """Forgets keys and values of the weights before; those of unfinished responses are computed anew."""

    def sleep(self, *, keep_weights: bool) -> None:
        """Gives the GPU's memory back; nothing was started that has not ended. On a CPU nothing is moved.

        Args:
            keep_weights: they wait in host memory; else the next transfer brings all of them. What no transfer brings,
                the frozen weights under an adapter, is kept in either case.
        """

    def wake(self, part: EnginePart) -> None:
        """Takes memory for this part again: the weights come first, and a transfer may come in between."""

    def memory_gib(self) -> float:
        """Peak memory so far: the GPU's where there is one, else the process's."""

    def close(self) -> None:
        """Ends the engine; may be called again."""
