"""Beam search over an engine's most likely next tokens: the same search for every engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

NextTokens: TypeAlias = Callable[[list[list[int]], int], list[list[tuple[int, float]]]]
"""Of each sequence the given number of most likely next tokens with their log-probabilities, best first."""


@dataclass(frozen=True)
class Beam:
    """A response under way, or ended.

    Args:
        token_ids: its tokens, with the end-of-sequence token where it has one.
        logprobs: of each token, at temperature 1.
    """

    token_ids: list[int]
    logprobs: list[float]

    def score(self, length_penalty: float) -> float:
        """Log-probability divided by length ** length_penalty."""
        return sum(self.logprobs) / float(max(1, len(self.token_ids)) ** length_penalty)


@dataclass
class _Search:
    """The beams of one prompt: those still written, and the best of those that have ended."""

    prompt: list[int]
    open: list[Beam] = field(default_factory=lambda: [Beam([], [])])
    ended: list[Beam] = field(default_factory=list)


def beam_search(
    next_tokens: NextTokens,
    prompts: Sequence[Sequence[int]],
    *,
    beams: int,
    max_new_tokens: int,
    length_penalty: float,
    ends: Collection[int],
) -> list[list[Beam]]:
    """The best responses that were found for each prompt, at most `beams` of them, best first.

    A search goes on until `beams` responses have ended and the best open one scores below all of them. What it finds is
    what transformers' `generate(num_beams=beams, early_stopping=False)` finds.

    Args:
        next_tokens: the model.
        prompts: token ids.
        beams: how many open responses are followed.
        max_new_tokens: longest response; one of this length has ended.
        length_penalty: 0 compares log-probabilities, 1 compares them per token.
        ends: every id that ends a sequence.
    """
    searches = [_Search(list(prompt)) for prompt in prompts]
    # Enough of them that `beams` stay open when every other one ends.
    candidates = max(2, 1 + len(ends)) * beams
    for length in range(1, max_new_tokens + 1):
        active = [search for search in searches if search.open]
        if not active:
            break
        rows = [[*search.prompt, *beam.token_ids] for search in active for beam in search.open]
        found = iter(next_tokens(rows, candidates))
        for search in active:
            longer = [
                Beam([*beam.token_ids, token], [*beam.logprobs, logprob])
                for beam in search.open
                for token, logprob in next(found)
            ]
            longer.sort(key=lambda beam: sum(beam.logprobs), reverse=True)
            has_ended = [beam.token_ids[-1] in ends or length == max_new_tokens for beam in longer[:candidates]]
            pairs = list(zip(longer, has_ended, strict=False))
            # An end counts only where it is among the best, as if it took the place of an open response.
            search.ended += [beam for beam, ended in pairs[:beams] if ended]
            search.ended.sort(key=lambda beam: beam.score(length_penalty), reverse=True)
            del search.ended[beams:]
            search.open = [beam for beam, ended in pairs if not ended][:beams]
            full = len(search.ended) == beams and bool(search.open)
            if full and search.open[0].score(length_penalty) <= search.ended[-1].score(length_penalty):
                search.open = []
    return [search.ended for search in searches]
