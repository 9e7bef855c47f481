"""Attention for rows that lie end to end: each row by itself, so that no time is spent on what lies between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "rlhf_ray_rows"
# What some architectures add to their attention, and is not done here.
_FOREIGN = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class Rows:
    """Where the rows of one pack [1, N] lie.

    Where one answer follows another one to the same prompt, the prompt is a part of both rows.

    Args:
        lengths: tokens of each row.
        ends: [rows + 1] int32, 0 and the running sums of lengths, on the pack's device.
        columns: the pack's column of each token of the rows, end to end; None: all columns in order.
        own: which of these tokens give the pack's outputs, in its order; None: all.
    """

    lengths: tuple[int, ...]
    ends: Tensor
    columns: Tensor | None = None
    own: Tensor | None = None


def rows_of(model: PreTrainedModel, position_ids: Tensor) -> dict[str, Rows]:
    """The keyword that tells a model of `attend_by_rows` where the rows lie; none where every [n, :] is a row.

    Args:
        position_ids: [R, N] positions in their rows; several rows lie end to end only where R is 1. A row starts at 0;
            one that starts later begins with the tokens of the row before up to there.
    """
    if len(position_ids) > 1 or model.config._attn_implementation != _NAME:
        return {}
    positions = position_ids[0]
    starts = pad(positions.diff() != 1, (1, 0), value=True).nonzero().flatten()
    borrowed = positions[starts]
    ends = pad(starts, (0, 1), value=len(positions)).to(torch.int32)
    if not bool(borrowed.any()):
        return {"rows": Rows(tuple(ends.diff().tolist()), ends)}
    columns: list[int] = []
    own: list[int] = []
    for row, (start, end, shared) in enumerate(
        zip(ends[:-1].tolist(), ends[1:].tolist(), borrowed.tolist(), strict=True)
    ):
        before = int(ends[row - 1]) if shared else 0
        columns += range(before, before + shared)
        own += range(len(columns), len(columns) + end - start)
        columns += range(start, end)
    lengths = ends.diff() + borrowed.to(torch.int32)
    return {
        "rows": Rows(
            tuple(lengths.tolist()),
            pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            torch.tensor(columns, device=positions.device),
            torch.tensor(own, device=positions.device),
        )
    }


def set_attention_by_rows(model: PreTrainedModel, instead: Callable[..., Any] | None = None) -> None:
    """Lets the model attend to each row by itself, whether or not it can.

    Args:
        model: a model.
        instead: does it in place of this module's attention, where the model is only to be counted.
    """
    from transformers import AttentionInterface

    name = _NAME if instead is None else f"{_NAME}_counted"
    AttentionInterface.register(name, instead or _attention)
    model.set_attn_implementation(name)


@torch.no_grad()
def attend_by_rows(model: PreTrainedModel) -> bool:
    """Whether the model can read packs; if so, it now attends to each row by itself, else it is as it was.

    Tried out on a few tokens.
    """
    if getattr(model.config.get_text_config(), "attention_chunk_size", None) is not None:
        return False
    rows = [[1, 2, 3], [2, 3, 1, 1]]
    vocabulary = model.config.get_text_config().vocab_size

    def read(row: list[int], positions: list[int]) -> Tensor:
        ids = torch.tensor([row], device=model.device) % vocabulary
        where = torch.tensor([positions], device=model.device)
        lie = rows_of(model, where)
        found: Tensor = model.base_model(input_ids=ids, position_ids=where, use_cache=False, **lie).last_hidden_state
        return found[0].float()

    before = model.config._attn_implementation
    try:
        alone = torch.cat([read(row, list(range(len(row)))) for row in rows])
        set_attention_by_rows(model)
        packed = read(rows[0] + rows[1], [0, 1, 2, 0, 1, 2, 3])
    except (TypeError, ValueError, NotImplementedError):
        works = False
    else:
        tolerance = 1e-3 if model.dtype == torch.float32 else 3e-2
        works = bool((packed - alone).abs().max() <= tolerance * alone.abs().max())
    if not works:
        model.set_attn_implementation(before)
    return works


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    rows: Rows | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """[R, N, heads, size] causal attention, in the way in which transformers calls it.

    Args:
        query, key, value: [R, heads, N, size]; fewer heads of key and value serve several of the query each.
    """
    foreign = [name for name in _FOREIGN if other.get(name) is not None]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if foreign or not causal or attention_mask is not None:
        raise NotImplementedError(f"attention with {foreign or 'a mask of its own'}")
    kept = query.dtype
    if rows is not None and rows.columns is not None:
        query, key, value = (states.index_select(2, rows.columns) for states in (query, key, value))
    if rows is not None and len(rows.lengths) > 1 and dropout == 0.0 and _has_kernel(query, key):
        return _own(_attend_at_once(query, key, value, rows, scaling, sliding_window), rows), None
    if query.device.type == "cpu":
        # The backward pass of a CPU's bfloat16 kernel takes twice the time of the float32 one.
        wide = torch.promote_types(kept, torch.float32)
        query, key, value = query.to(wide), key.to(wide), value.to(wide)
    lengths = [query.shape[2]] if rows is None else list(rows.lengths)
    parts = zip(*(torch.split(states, lengths, 2) for states in (query, key, value)), strict=True)
    found = [attend(*part, dropout=dropout, scaling=scaling, window=sliding_window).transpose(1, 2) for part in parts]
    return _own(torch.cat(found, 1), rows).to(kept), None


def _own(found: Tensor, rows: Rows | None) -> Tensor:
    return found if rows is None or rows.own is None else found.index_select(1, rows.own)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """[R, heads, N, size] causal attention; with a window each token sees so many, itself included."""
    length = query.shape[2]
    mask = None
    if window is not None and window < length:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(rows.lengths)
    queries, keys, values = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    found = varlen_attn(
        queries,
        keys,
        values,
        rows.ends,
        rows.ends,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(found, Tensor), "nothing beside the result was asked for"
    return found[None]


def _has_kernel(query: Tensor, key: Tensor) -> bool:
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return _kernel_agrees(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3])


@cache
@torch.no_grad()
def _kernel_agrees(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int) -> bool:
    """Whether this build of torch has attention over rows of several lengths for such tensors, tried out."""
    random = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randn(1, count, 5, size, generator=random).to(device, dtype)

    states = draw(heads), draw(key_heads), draw(key_heads)
    rows = Rows((2, 3), torch.tensor([0, 2, 5], dtype=torch.int32, device=device))
    try:
        found = _attend_at_once(*states, rows, None, None)
    except (ImportError, TypeError, ValueError, RuntimeError, NotImplementedError):
        return False
    parts = zip(*(torch.split(each, [2, 3], 2) for each in states), strict=True)
    wanted = torch.cat([attend(*part, dropout=0.0, scaling=None, window=None).transpose(1, 2) for part in parts], 1)
    return bool((found - wanted).abs().max() <= 3e-2)
