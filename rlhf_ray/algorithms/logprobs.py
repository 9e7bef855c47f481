"""Log-probabilities and entropies of tokens. The one place where logits are shifted against tokens.

The logits at t - 1 predict token t. Every result here is shifted: index t speaks of token t, given
the tokens before it, and position 0, which nothing predicts, is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from rlhf_ray.algorithms.checks import require
from rlhf_ray.shapes import LastHidden, TokenFloat, TokenIds, TokenLogits, TokenMask, WantedFloat

Entropy: TypeAlias = Literal["off", "reported", "trained"]
"""Whether entropies are computed, and whether they have a gradient."""

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
"""Size of the logits that are held at once, by device; up to twice as many are kept for the backward pass."""
_BLOCK_BYTES = 1 << 20


def token_logprobs(
    logits: TokenLogits, tokens: TokenIds, *, temperature: float = 1.0, starts: TokenMask | None = None
) -> TokenFloat:
    """[B, T] log softmax(logits / temperature) of each token, given the ones before it; 0 at position 0.

    Args:
        logits: the model's output at every position, finite; half precision is computed in float32.
        tokens: token ids, all of them inside the vocabulary.
        temperature: the temperature that the tokens were sampled with, above 0.
        starts: True at the first token of every sequence packed into a row; those are 0 as well.
    """
    scaled = _predictions(logits, temperature)
    return _shift(_select(scaled, tokens), starts)


def token_logprobs_and_entropy(
    logits: TokenLogits,
    tokens: TokenIds,
    *,
    temperature: float = 1.0,
    starts: TokenMask | None = None,
    entropy_gradient: bool = True,
) -> tuple[TokenFloat, TokenFloat]:
    """[B, T] log-probabilities as `token_logprobs`, and [B, T] entropies of the distributions they come from.

    Args:
        logits, tokens, temperature, starts: as for `token_logprobs`.
        entropy_gradient: off where the entropy is only reported: it then keeps no [B, T, V] for the backward pass.
    """
    scaled = _predictions(logits, temperature)
    observed = scaled if entropy_gradient else scaled.detach()
    entropy = observed.logsumexp(-1) - (observed.softmax(-1) * observed).sum(-1)  # H = log Z - E[logit]
    return _shift(_select(scaled, tokens), starts), _shift(entropy, starts)


def _predictions(logits: TokenLogits, temperature: float) -> Tensor:
    require(temperature > 0, "temperature", temperature, "a number above 0")
    precise = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return precise if temperature == 1.0 else precise / temperature


def _select(scaled: Tensor, tokens: TokenIds) -> Tensor:
    chosen = scaled.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return chosen - scaled.logsumexp(-1)  # log softmax(x)_i = x_i - log Z


def _shift(predicted: Tensor, starts: TokenMask | None) -> TokenFloat:
    shifted = pad(predicted, (1, 0))
    return shifted if starts is None else shifted.masked_fill(starts, 0.0)


def projected_logprobs(
    hidden: LastHidden,
    weight: Tensor,
    bias: Tensor | None,
    tokens: TokenIds,
    wanted: TokenMask,
    *,
    temperature: float = 1.0,
    entropy: Entropy = "off",
    chunk_bytes: int | None = None,
) -> tuple[WantedFloat, WantedFloat | None]:
    """[M] log-probabilities, and entropies, of the M wanted tokens in row order, from the states behind the logits.

    Equal to `token_logprobs_and_entropy` of the logits W h + b, of which it never holds more than a chunk: those of the
    next chunk take their place, and the backward pass makes them anew. Those of two chunks or less are kept for it.

    With x = (W h + b) / temperature, p = softmax(x), the token y, and the entropy H = -sum_v p_v log p_v:

        d log p_y / d x_v = [v = y] - p_v        d H / d x_v = -p_v (log p_v + H)

    so gradients g of log p_y and e of H give x the gradient D_v = g [v = y] - p_v (g + e (log p_v + H)), and then
    h gets W^T D / temperature, W the sum over tokens of D h^T / temperature, and b that of D / temperature.

    Args:
        hidden: the last hidden states; in half precision the logits have it too, what follows them is in float32.
        weight: [V, H] of the output layer; one that needs no gradient costs none.
        bias: [V] of the output layer.
        tokens: token ids, all of them inside the vocabulary.
        wanted: the tokens that are asked for; never at position 0.
        temperature: the temperature that the tokens were sampled with, above 0.
        entropy: `off` gives None, `reported` entropies without a gradient.
        chunk_bytes: size of a chunk's logits; by default 32 MiB, on a GPU 256 MiB.
    """
    require(temperature > 0, "temperature", temperature, "a number above 0")
    chunk_bytes = chunk_bytes or CHUNK_BYTES["cuda" if hidden.is_cuda else "cpu"]
    predicting = wanted[:, 1:].flatten().nonzero().squeeze(1)
    states = hidden[:, :-1].flatten(0, 1).index_select(0, predicting)
    chunk = max(1, chunk_bytes // (len(weight) * states.element_size()))
    if len(states) <= 2 * chunk:
        chunk = max(1, len(states))
    found: tuple[Tensor, Tensor | None] = _Projected.apply(  # type: ignore[no-untyped-call]
        states, weight, bias, tokens[:, 1:][wanted[:, 1:]], temperature, entropy, chunk
    )
    return found


class _Projected(torch.autograd.Function):
    """`projected_logprobs` of states [M, H] and the tokens [M] that they predict, `chunk` of them at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        entropy: Entropy,
        chunk: int,
    ) -> tuple[Tensor, Tensor | None]:
        logprobs = states.new_empty(len(states), dtype=torch.promote_types(states.dtype, torch.float32))
        entropies = None if entropy == "off" else torch.empty_like(logprobs)
        buffer = _buffer(states, weight, chunk)
        for rows in _cut(len(states), chunk):
            logits = _project(states[rows], weight, bias, buffer)
            for part, scaled in _blocks(logits, temperature):
                at = slice(rows.start + part.start, rows.start + part.stop)
                log_p = scaled.log_softmax(-1)
                logprobs[at] = log_p.gather(-1, tokens[at, None]).squeeze(-1)
                if entropies is not None:
                    entropies[at] = -(scaled.softmax(-1).mul_(log_p)).sum(-1)
        ctx.save_for_backward(states, weight, bias, tokens, entropies)
        ctx.temperature, ctx.chunk, ctx.trains_entropy = temperature, chunk, entropy == "trained"
        ctx.logits = buffer if len(states) <= chunk else None
        if entropy == "reported":
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor, of_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        states, weight, bias, tokens, entropies = ctx.saved_tensors
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        by_logprob = of_logprobs / ctx.temperature
        trained = of_entropies is not None and ctx.trains_entropy
        by_entropy = of_entropies / ctx.temperature if trained else None
        # What the logits become is overwritten, so a second pass over the same graph makes them anew.
        kept, ctx.logits = ctx.logits, None
        buffer = _buffer(states, weight, ctx.chunk) if kept is None else kept
        to_states = torch.empty_like(states) if wants_states else None
        to_weight: Tensor | None = None
        to_bias = by_logprob.new_zeros(len(weight)) if wants_bias else None
        for rows in _cut(len(states), ctx.chunk):
            logits = _project(states[rows], weight, bias, buffer) if kept is None else kept
            for part, scaled in _blocks(logits, ctx.temperature):
                at = slice(rows.start + part.start, rows.start + part.stop)
                slope = scaled.softmax(-1)
                if by_entropy is None:
                    slope.mul_(-by_logprob[at, None])
                else:
                    spread = scaled.log_softmax(-1).add_(entropies[at, None]).mul_(by_entropy[at, None])
                    slope.mul_(spread.add_(by_logprob[at, None]).neg_())
                slope.scatter_add_(1, tokens[at, None], by_logprob[at, None])
                logits[part] = slope
            if to_states is not None:
                torch.mm(logits, weight, out=to_states[rows])
            if wants_weight:
                to_weight = _add_product(to_weight, logits, states[rows])
            if to_bias is not None:
                to_bias += logits.sum(0, dtype=to_bias.dtype)
        return (
            to_states,
            None if to_weight is None else to_weight.to(weight.dtype),
            None if to_bias is None else to_bias.to(bias.dtype),
            *[None] * 4,
        )


def _buffer(states: Tensor, weight: Tensor, chunk: int) -> Tensor:
    return states.new_empty(min(chunk, len(states)), len(weight))


def _cut(count: int, chunk: int) -> Iterator[slice]:
    """Parts of about the same size; one empty part of nothing, so that a gradient of zero has its shape."""
    size = math.ceil(count / max(1, math.ceil(count / chunk)))
    for start in range(0, max(count, 1), max(size, 1)):
        yield slice(start, min(start + size, count))


def _project(states: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    out = buffer[: len(states)]
    if bias is None:
        return torch.mm(states, weight.T, out=out)
    return torch.addmm(bias, states, weight.T, out=out)


def _blocks(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """The logits over the temperature in float32 or wider; on a CPU in parts that stay in its cache."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    size = len(logits) if logits.is_cuda else _BLOCK_BYTES // (logits.shape[1] * precise.itemsize)
    for start in range(0, len(logits), max(size, 1)):
        part = slice(start, min(start + max(size, 1), len(logits)))
        block = logits[part].to(precise)
        yield part, block if temperature == 1.0 else block / temperature


def _add_product(total: Tensor | None, slopes: Tensor, states: Tensor) -> Tensor:
    """The sum with that of slopes^T states; of several products in half precision it is in float32."""
    if total is None:
        return slopes.T @ states
    precise = torch.promote_types(slopes.dtype, torch.float32)
    if precise == slopes.dtype:
        return total.addmm_(slopes.T, states)
    return total.to(precise).add_(slopes.T @ states)
