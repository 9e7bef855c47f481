"""Pairs of answers to one prompt, which is read once: in a pack, the second answer borrows its beginning.

    prompt without its last token | its last token, first answer | its last token, second answer

The last token of the prompt stands before both answers, so that in both the neighbour on the left predicts a token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_ray.data.batches import Sequences
from rlhf_ray.models.forward import Outputs
from rlhf_ray.models.heads import NetworkOutput
from rlhf_ray.shapes import SequenceInt


def forward_pairs(
    run: Callable[..., NetworkOutput], sequences: Sequences, *, device: torch.device, temperature: float = 1.0
) -> Outputs:
    """As `forward` on the same rows [2B, T], of which row b and row B + b begin alike; without entropies.

    Args:
        run: a network of heads.py that `attend_by_rows` has prepared, or an engine around one.
        sequences: all first answers behind their prompts, then all second ones.
        temperature: of the distribution that log-probabilities speak of.
    """
    columns = _columns(sequences).to(device)
    sequences = sequences.to(device)
    real, answers = sequences.attention_mask, sequences.response_mask
    tokens = torch.zeros(1, int(columns[real].max()) + 1, dtype=torch.long, device=device)
    positions, wanted = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    tokens[0, columns[real]] = sequences.tokens[real]
    positions[0, columns[real]] = torch.arange(real.shape[1], device=device).expand_as(columns)[real]
    wanted[0, columns[answers]] = True
    chosen, _, values = run(tokens, positions, wanted, temperature, "off")

    zeros = torch.zeros(real.shape, device=device)
    logprobs = zeros if chosen is None else _place(chosen, answers)
    if values is None:
        return Outputs(logprobs, zeros, zeros, zeros[:, 0])
    after = values[0, columns] * real
    before = pad(after, (1, 0))[:, :-1] * real
    final = after.gather(1, sequences.lengths()[:, None] - 1).squeeze(1)
    return Outputs(logprobs, zeros, before, final)


def pair_lengths(sequences: Sequences) -> SequenceInt:
    """[B] tokens that the network reads of each pair of the rows [2B, T]."""
    first, second = sequences.lengths().chunk(2)
    return first + second - _borrowed(sequences)


def _borrowed(sequences: Sequences) -> SequenceInt:
    """[B] tokens that are read once: all that both rows begin with and that are not trained, but the last of them."""
    read = sequences.attention_mask & ~sequences.response_mask
    (first, second), (one, other) = sequences.tokens.chunk(2), read.chunk(2)
    alike = ((first == second) & one & other).long().cumprod(1).sum(1)
    return (alike - 1).clamp(min=0)


def _columns(sequences: Sequences) -> Tensor:
    """[2B, T] the pack's column of each token; 0 at padding. The two rows of a pair stand one after the other."""
    steps = torch.arange(sequences.tokens.shape[1])[None]
    borrowed, first = _borrowed(sequences)[:, None], sequences.lengths().chunk(2)[0][:, None]
    starts = pad(pair_lengths(sequences).cumsum(0), (1, 0))[:-1, None]
    second = torch.where(steps < borrowed, steps, steps - borrowed + first)
    return torch.cat([starts + steps, starts + second]) * sequences.attention_mask


def _place(flat: Tensor, mask: Tensor) -> Tensor:
    """[2B, T] the values of the mask's tokens, which come pair by pair; 0 elsewhere."""
    by_pair = mask.view(2, len(mask) // 2, -1).transpose(0, 1)
    placed = torch.zeros(by_pair.shape, dtype=flat.dtype, device=flat.device).masked_scatter(by_pair, flat)
    return placed.transpose(0, 1).flatten(0, 1)
