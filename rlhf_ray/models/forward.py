"""From rows to log-probabilities, entropies and values, without padding reaching a result.

Rows go through the network packed, as one long row without any padding, where its attention can tell them
apart (attention.py); else side by side, filled up on the right, where a causal network cannot see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_ray.algorithms.logprobs import Entropy
from rlhf_ray.data.batches import Sequences
from rlhf_ray.data.packing import pack, plan_micro_batches
from rlhf_ray.models.heads import NetworkOutput
from rlhf_ray.shapes import SequenceFloat, TokenFloat, TokenMask

Layout: TypeAlias = Literal["packed", "padded"]
RunNetwork: TypeAlias = Callable[[Tensor, Tensor, Tensor, float, Entropy], NetworkOutput]


@dataclass(frozen=True)
class Outputs:
    """What a network says about rows [B, T]; 0 where it was not asked or has no such head.

    Args:
        logprobs: log-probability of each token of response_mask.
        entropy: entropy of the distribution that each token of response_mask was drawn from.
        values: value before each token but the first.
        final_values: [B] value after the last token.
    """

    logprobs: TokenFloat
    entropy: TokenFloat
    values: TokenFloat
    final_values: SequenceFloat


def forward(
    run: RunNetwork,
    sequences: Sequences,
    *,
    layout: Layout,
    device: torch.device,
    temperature: float = 1.0,
    entropy: Entropy = "off",
) -> Outputs:
    """One forward pass over all rows of `sequences`.

    Args:
        run: a network of heads.py, or an engine around one.
        temperature: of the distribution that log-probabilities and entropies speak of.
        entropy: `reported` computes it without a gradient.
    """
    arranged = _packed(sequences, device) if layout == "packed" else _padded(sequences, device)
    chosen, spread, values = run(arranged.tokens, arranged.position_ids, arranged.trained, temperature, entropy)

    zeros = torch.zeros(sequences.tokens.shape, device=device)
    mask = sequences.response_mask.to(device)
    logprobs = zeros if chosen is None else _place(chosen, mask)
    entropies = zeros if spread is None else _place(spread, mask)
    if values is None:
        return Outputs(logprobs, entropies, zeros, zeros[:, 0])
    after = _place(values[arranged.real], sequences.attention_mask.to(device))
    before = pad(after, (1, 0))[:, :-1] * sequences.attention_mask.to(device)
    final = after.gather(1, (sequences.lengths().to(device) - 1).clamp(min=0)[:, None]).squeeze(1)
    return Outputs(logprobs, entropies, before, final)


def plan_answers(
    lengths: Sequence[int], *, max_tokens: int, layout: Layout, device: torch.device, joined: bool
) -> list[list[int]]:
    """Rows by forward pass for `answer_totals`; rows 2i and 2i + 1 are a pair.

    On a CPU every pair goes through the network alone, `joined` in one row where that can be, so that its numbers are
    the same bits beside any other pairs.
    """
    if device.type == "cpu":
        return [[row, row + 1] for row in range(0, len(lengths), 2)] if joined else [[i] for i in range(len(lengths))]
    return plan_micro_batches(lengths, max_tokens=max_tokens, padded=layout == "padded")


def answer_totals(judged: Iterable[tuple[list[int], Outputs]], response_mask: TokenMask) -> SequenceFloat:
    """[B] float32 log-probability of each row's response, added up in float64.

    Args:
        judged: rows, and what the network says about them.
        response_mask: of all rows.
    """
    totals = torch.zeros(len(response_mask))
    for rows, outputs in judged:
        for row, logprobs in zip(rows, outputs.logprobs.double().cpu(), strict=True):
            totals[row] = logprobs[response_mask[row]].sum()
    return totals


@dataclass(frozen=True)
class _Arranged:
    """Rows as the network sees them, [R, N] each: what is real, and what is trained."""

    tokens: Tensor
    position_ids: Tensor
    real: Tensor
    trained: Tensor


def _packed(sequences: Sequences, device: torch.device) -> _Arranged:
    packed = pack(sequences, range(len(sequences)))
    return _Arranged(
        tokens=packed.tokens.to(device),
        position_ids=packed.position_ids.to(device),
        real=torch.ones_like(packed.tokens, dtype=torch.bool, device=device),
        trained=sequences.response_mask[sequences.attention_mask][None].to(device),
    )


def _padded(sequences: Sequences, device: torch.device) -> _Arranged:
    longest = int(sequences.lengths().max())
    mask = sequences.attention_mask[:, :longest]
    return _Arranged(
        tokens=sequences.tokens[:, :longest].masked_fill(~mask, 0).to(device),
        position_ids=torch.arange(longest, device=device).expand(len(mask), longest),
        real=mask.to(device),
        trained=sequences.response_mask[:, :longest].to(device),
    )


def _place(flat: Tensor, mask: Tensor) -> Tensor:
    """The values of the mask's tokens, in row order, at their places in [B, T]; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)
