"""Which rows share a forward pass, which worker gets which rows, and rows laid end to end."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from rlhf_ray.config.schema import Learner
from rlhf_ray.data.batches import Sequences


def token_budget(configured: int | None, device: torch.device) -> int:
    """Most tokens in one forward pass: the setting, else what suits the device."""
    return configured or (16384 if device.type == "cuda" else 2048)


def plan_micro_batches(
    lengths: Sequence[int], *, max_tokens: int, max_sequences: int | None = None, padded: bool = False
) -> list[list[int]]:
    """Rows grouped so that no group has more than max_tokens tokens or max_sequences rows; longest rows first.

    Every row is in exactly one group; a row longer than max_tokens has a group to itself. Rows of one group are of
    similar length. With `padded` a row counts as long as the longest of its group.
    """
    groups: list[list[int]] = []
    filled = 0
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        cost = lengths[groups[-1][0] if padded and groups else row]
        full = not groups or filled + cost > max_tokens or len(groups[-1]) == max_sequences
        if full:
            groups.append([])
            filled = 0
        groups[-1].append(row)
        filled += lengths[groups[-1][0] if padded else row]
    return groups


def learner_micro_batches(
    settings: Learner, costs: Sequence[int], *, device: torch.device, padded: bool, together: int = 1
) -> list[list[int]]:
    """A learner's share of a mini-batch cut into forward passes, by its settings.

    Args:
        settings: the network's section of the pipeline file.
        costs: tokens of each row.
        device: where it trains.
        padded: as for `plan_micro_batches`.
        together: sequences in each row, 2 for pairs.
    """
    most = settings.micro_batch_sequences
    return plan_micro_batches(
        costs,
        max_tokens=token_budget(settings.micro_batch_tokens, device),
        max_sequences=None if most is None else max(1, most // together),
        padded=padded,
    )


def cut_mini_batches(order: Tensor, number: int) -> tuple[Tensor, ...]:
    """The rows in `order` cut into `number` mini-batches, whose sizes differ by one at most; fewer for fewer rows."""
    return order.tensor_split(min(number, len(order)))


def balance(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Rows dealt to `parts` workers with close sums of costs: costliest first, each to the least loaded.

    Deterministic; the rows of a part are in ascending order; with fewer rows than parts some parts are empty.
    Longest-processing-time rule: the largest sum is at most 4/3 of the best possible (Graham 1969).
    """
    loads = [(0.0, part) for part in range(parts)]
    shares: list[list[int]] = [[] for _ in range(parts)]
    for row in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, part = heapq.heappop(loads)
        shares[part].append(row)
        heapq.heappush(loads, (load + costs[row], part))
    return [sorted(share) for share in shares]


@dataclass(frozen=True)
class Packed:
    """Rows laid end to end without padding; N: their real tokens together.

    Args:
        tokens: [1, N] token ids.
        position_ids: [1, N] position in its own row.
    """

    tokens: Int[Tensor, "1 N"]
    position_ids: Int[Tensor, "1 N"]


def pack(sequences: Sequences, rows: Sequence[int]) -> Packed:
    """The real tokens of the given rows, end to end, in the given order. Every row has at least one token."""
    index = torch.as_tensor(rows, dtype=torch.long, device=sequences.tokens.device)
    attention = sequences.attention_mask[index]
    assert bool(attention[:, :1].all()), "a row without a token cannot be packed"
    positions = torch.arange(attention.shape[1], device=attention.device).expand_as(attention)[attention]
    return Packed(sequences.tokens[index][attention][None], positions[None])
