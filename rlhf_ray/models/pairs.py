"""Two answers to one prompt in one row: the prompt is read once, and neither answer sees the other.

    prompt without its last token | its last token, first answer | its last token, second answer

The last token of the prompt stands before both answers, so that in both the neighbour on the left predicts a token. It
saves the second reading of the prompt, and the padding between a long and a short answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from rlhf_ray.data.batches import Sequences
from rlhf_ray.models.forward import Outputs
from rlhf_ray.models.heads import NetworkOutput
from rlhf_ray.shapes import SequenceInt


def forward_pairs(
    run: Callable[..., NetworkOutput], sequences: Sequences, *, device: torch.device, temperature: float = 1.0
) -> Outputs:
    """As `forward` on the same rows [2B, T], of which row b and row B + b begin alike; without entropies.

    Args:
        run: a network of heads.py for which `supports_pairs` holds, or an engine around one.
        sequences: all first answers behind their prompts, then all second ones.
        temperature: of the distribution that log-probabilities speak of.
    """
    sequences = sequences.to(device)
    arranged = _arrange(sequences)
    chosen, _, values = run(
        arranged.tokens, arranged.position_ids, arranged.wanted, temperature, "off", arranged.attention
    )
    zeros = torch.zeros(sequences.tokens.shape, device=device)
    logprobs = zeros if chosen is None else _place(chosen, sequences.response_mask)
    if values is None:
        return Outputs(logprobs, zeros, zeros, zeros[:, 0])
    both = torch.arange(len(values), device=device).repeat(2)[:, None]
    after = values[both, arranged.columns] * sequences.attention_mask
    before = pad(after, (1, 0))[:, :-1] * sequences.attention_mask
    final = after.gather(1, sequences.lengths()[:, None] - 1).squeeze(1)
    return Outputs(logprobs, zeros, before, final)


def pair_lengths(sequences: Sequences) -> SequenceInt:
    """[B] tokens of each row that `forward_pairs` makes of rows [2B, T]."""
    first, second = sequences.lengths().chunk(2)
    return first + second - _shared_lengths(sequences)


@dataclass(frozen=True)
class _Arranged:
    """Pairs as the network sees them, [B, N] each, and the column [2B, T] of each token of the sequences.

    Args:
        attention: [B, 1, N, N] whether a position, the third dimension, sees another one.
    """

    tokens: Tensor
    position_ids: Tensor
    wanted: Tensor
    attention: Tensor
    columns: Tensor


def _shared_lengths(sequences: Sequences) -> SequenceInt:
    """[B] tokens that are read once: all that both rows begin with and that are not trained, but the last of them."""
    read = sequences.attention_mask & ~sequences.response_mask
    (first, second), (one, other) = sequences.tokens.chunk(2), read.chunk(2)
    alike = ((first == second) & one & other).long().cumprod(1).sum(1)
    return (alike - 1).clamp(min=0)


def _arrange(sequences: Sequences) -> _Arranged:
    real = sequences.attention_mask
    device, count = real.device, len(real) // 2
    shared = _shared_lengths(sequences)[:, None]
    first = sequences.lengths()[:count, None]
    width = int(pair_lengths(sequences).max())

    steps = torch.arange(real.shape[1], device=device).expand(count, -1)
    columns = torch.cat([steps, torch.where(steps < shared, steps, steps - shared + first)]).clamp(max=width - 1)
    rows = torch.arange(count, device=device).repeat(2)[:, None].expand_as(columns)
    tokens = torch.zeros(count, width, dtype=sequences.tokens.dtype, device=device)
    tokens[rows[real], columns[real]] = sequences.tokens[real]
    wanted = torch.zeros(count, width, dtype=torch.bool, device=device)
    wanted[rows[sequences.response_mask], columns[sequences.response_mask]] = True

    places = torch.arange(width, device=device)[None]
    # Padding may not ask for positions that a model has no embedding of.
    position_ids = torch.where(places < first, places, places - first + shared).clamp(max=real.shape[1] - 1)
    second_reads, first_only = (places >= first)[:, :, None], ((places >= shared) & (places < first))[:, None, :]
    attention = (places[:, None, :] <= places[:, :, None]) & ~(second_reads & first_only)
    return _Arranged(tokens, position_ids, wanted, attention[:, None], columns)


def _place(flat: Tensor, mask: Tensor) -> Tensor:
    """[2B, T] the values of the mask's tokens, which come pair by pair; 0 elsewhere."""
    by_pair = mask.view(2, len(mask) // 2, -1).transpose(0, 1)
    placed = torch.zeros(by_pair.shape, dtype=flat.dtype, device=flat.device).masked_scatter(by_pair, flat)
    return placed.transpose(0, 1).flatten(0, 1)


@torch.no_grad()
def supports_pairs(model: PreTrainedModel) -> bool:
    """Whether an answer in the second place is read as it is alone, tried out on a few tokens.

    Models whose layers look at a window only are left out: their windows are counted in columns.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        return False

    def states(tokens: Sequence[int], positions: Sequence[int], attention: Tensor | None) -> Tensor:
        found: Tensor = model.base_model(
            input_ids=torch.tensor([tokens], device=model.device) % config.vocab_size,
            position_ids=torch.tensor([positions], device=model.device),
            attention_mask=attention,
            use_cache=False,
        ).last_hidden_state[0]
        return found.float()

    attention = torch.ones(5, 5, dtype=torch.bool, device=model.device).tril()
    attention[3:, 1:3] = False
    try:
        together = states([1, 2, 3, 2, 4], [0, 1, 2, 1, 2], attention[None, None])
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    alone = states([1, 2, 4], [0, 1, 2], None)
    tolerance = 1e-3 if model.dtype == torch.float32 else 3e-2
    return bool((together[[0, 3, 4]] - alone).abs().max() <= tolerance * alone.abs().max())
