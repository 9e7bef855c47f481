"""The batches that travel between workers: frozen, complete, right-padded.

Every batch can be cut by rows, joined, and sent through Ray's object store without copying its
tensors (they travel as numpy arrays).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_ray.shapes import SequenceFloat, SequenceInt, SequenceMask, TokenFloat, TokenIds, TokenMask


@dataclass(frozen=True)
class Batch:
    """Rows whose fields are tensors [B, ...], lists of length B, other batches, or one value for all rows."""

    def __len__(self) -> int:
        return next(len(value) for value in self._values() if isinstance(value, Tensor | list | Batch))

    def _values(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]

    def token_count(self) -> int:
        """Real tokens of its rows, padding not counted; 0 where it holds no sequences."""
        return sum(value.token_count() for value in self._values() if isinstance(value, Batch))

    def select(self, rows: Sequence[int]) -> Self:
        """The given rows, in the given order; all T positions are kept. A range of rows shares the memory."""
        index: slice | Tensor
        if isinstance(rows, range) and rows.step == 1:
            index = slice(rows.start, rows.stop)
        else:
            index = torch.as_tensor(rows, dtype=torch.long)

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[index]
            if isinstance(value, Batch):
                return value.select(rows)
            return [value[i] for i in rows] if isinstance(value, list) else value

        return type(self)(*(cut(value) for value in self._values()))

    def to(self, device: torch.device) -> Self:
        """The same rows with their tensors on `device`."""
        moved = (value.to(device) if isinstance(value, Tensor | Batch) else value for value in self._values())
        return type(self)(*moved)

    @classmethod
    def concat(cls, batches: Sequence[Self]) -> Self:
        """The rows of all batches in order, padded on the right to the longest T; single values must agree."""
        assert batches, "no batch to concatenate"
        return cls(*(_join([getattr(batch, field.name) for batch in batches]) for field in fields(cls)))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        packed = tuple(("tensor", v.numpy()) if isinstance(v, Tensor) else ("value", v) for v in self._values())
        return _rebuild, (type(self), packed)


def _rebuild(cls: type[Batch], packed: Sequence[tuple[str, Any]]) -> Batch:
    def tensor(array: Any) -> Tensor:
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    return cls(*(tensor(value) if kind == "tensor" else value for kind, value in packed))


def _join(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        if first.dim() > 1:
            longest = max(value.shape[1] for value in values)
            values = [pad(value, (0, longest - value.shape[1])) for value in values]
        return torch.cat(values)
    if isinstance(first, Batch):
        return type(first).concat(values)
    if isinstance(first, list):
        return [item for value in values for item in value]
    assert all(value == first for value in values), f"batches disagree: {values}"
    return first


@dataclass(frozen=True)
class Prompts(Batch):
    """Prompts to sample from.

    Args:
        token_ids: B lists of token ids, special tokens included.
        texts: B strings, as the reward functions see them.
        answers: B expected answers (None where the data has none).
        ids: B row numbers in the data set; the same prompt has the same id in every pass.
        repeats: B counts of how often the same prompt stands earlier in the batch.
    """

    token_ids: list[list[int]]
    texts: list[str]
    answers: list[Any]
    ids: list[int]
    repeats: list[int]

    def token_count(self) -> int:
        return sum(map(len, self.token_ids))


@dataclass(frozen=True)
class Sequences(Batch):
    """Prompt and response in one row; the coin that PPO and DPO share.

    Args:
        tokens: [B, T] token ids, right-padded (with any id).
        attention_mask: [B, T] real tokens; always a prefix of the row.
        response_mask: [B, T] the trained tokens; never position 0.
    """

    tokens: TokenIds
    attention_mask: TokenMask
    response_mask: TokenMask

    def lengths(self) -> SequenceInt:
        """[B] real tokens of each row."""
        return self.attention_mask.sum(1)

    def token_count(self) -> int:
        return int(self.attention_mask.sum())


@dataclass(frozen=True)
class Rollouts(Batch):
    """Sampled responses, siblings of one prompt adjacent.

    Args:
        sequences: prompts and responses.
        generator_logprobs: [B, T] log-probability under the distribution the engine sampled from; 0 outside
            response_mask.
        finished: [B] ended by an end-of-sequence token or a stop string, not by the length limit.
        prompts: B prompt texts.
        responses: B response texts, special tokens and stop strings removed.
        answers: B expected answers.
        prompt_ids: [B] row numbers of the prompts.
        policy_versions: [B, T] number of completed iterations behind the weights that sampled each token; 0 outside
            response_mask.
    """

    sequences: Sequences
    generator_logprobs: TokenFloat
    finished: SequenceMask
    prompts: list[str]
    responses: list[str]
    answers: list[Any]
    prompt_ids: SequenceInt
    policy_versions: TokenIds

    def oldest_versions(self) -> SequenceInt:
        """[B] the policy version of each response's first token: weights only ever get newer; 0 without a response."""
        first = self.sequences.response_mask.int().argmax(1, keepdim=True)
        return self.policy_versions.gather(1, first)[:, 0]


@dataclass(frozen=True)
class Experience(Batch):
    """What PPO learns from.

    Args:
        sequences: prompts and responses.
        old_logprobs: [B, T] log-probabilities before the update.
        reference_logprobs: [B, T] of the reference; equal to old_logprobs where the KL term is off.
        values: [B, T] critic's values before the update; 0 where there is no critic.
        advantages: [B, T] advantages, 0 outside response_mask.
        returns: [B, T] targets of the critic.
        correction: [B, T] truncated importance weights between generator and learner; 1 where off.
    """

    sequences: Sequences
    old_logprobs: TokenFloat
    reference_logprobs: TokenFloat
    values: TokenFloat
    advantages: TokenFloat
    returns: TokenFloat
    correction: TokenFloat


@dataclass(frozen=True)
class PreferencePairs(Batch):
    """Pairs of answers to the same prompt, one preferred to the other.

    Args:
        chosen: [B, T] prompts and preferred answers; response_mask marks the answers' tokens.
        rejected: [B, T'] the same prompts and the other answers.
        ids: B numbers of the pairs in the data set; the same pair has the same id in every epoch.
        margins: [B] by how much the chosen answer is better; 0 where the data do not say.
    """

    chosen: Sequences
    rejected: Sequences
    ids: list[int]
    margins: SequenceFloat


@dataclass(frozen=True)
class ReferencedPairs(Batch):
    """Pairs and what the reference says about their answers.

    Args:
        pairs: the pairs.
        reference_chosen: [B] the reference's log-probability of each preferred answer, summed over its tokens; 0 where
            the loss has no reference.
        reference_rejected: [B] the same of the other answers.
    """

    pairs: PreferencePairs
    reference_chosen: SequenceFloat
    reference_rejected: SequenceFloat


def one_version(sequences: Sequences, version: int) -> TokenIds:
    """[B, T] `policy_versions` of responses that one version of the policy sampled."""
    return sequences.response_mask.long() * version


def pad_rows(rows: Sequence[Sequence[int]], value: int = 0) -> TokenIds:
    """B lists of integers -> [B, T] int64, right-padded with `value`."""
    longest = max((len(row) for row in rows), default=0)
    padded = [[*row, *[value] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long).reshape(len(rows), longest)


def make_sequences(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Sequences:
    """Prompts and responses as lists of token ids -> right-padded rows whose response tokens are the trained ones.

    A prompt has at least one token (its first token is never trained).
    """
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    position = torch.arange(max(lengths, default=0))[None]
    attention = position < torch.tensor(lengths)[:, None]
    starts = torch.tensor([max(len(p), 1) for p in prompts])[:, None]
    tokens = pad_rows([[*p, *r] for p, r in zip(prompts, responses, strict=True)])
    return Sequences(tokens=tokens, attention_mask=attention, response_mask=attention & (position >= starts))
