"""Log-probabilities and entropies of tokens. The one place where logits are shifted against tokens.

The logits at t - 1 predict token t. Every result here is shifted: index t speaks of token t, given
the tokens before it, and position 0, which nothing predicts, is 0.
"""

import torch
from torch.nn.functional import pad

from rlhf_ray.algorithms.checks import require
from rlhf_ray.shapes import TokenFloat, TokenIds, TokenLogits, TokenMask


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


def _predictions(logits: TokenLogits, temperature: float) -> torch.Tensor:
    require(temperature > 0, "temperature", temperature, "a number above 0")
    precise = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return precise if temperature == 1.0 else precise / temperature


def _select(scaled: torch.Tensor, tokens: TokenIds) -> torch.Tensor:
    chosen = scaled.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return chosen - scaled.logsumexp(-1)  # log softmax(x)_i = x_i - log Z


def _shift(predicted: torch.Tensor, starts: TokenMask | None) -> TokenFloat:
    shifted = pad(predicted, (1, 0))
    return shifted if starts is None else shifted.masked_fill(starts, 0.0)
