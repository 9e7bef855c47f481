import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from rlhf_ray.algorithms.language_losses import negative_log_likelihood
from rlhf_ray.algorithms.logprobs import token_logprobs


def test_by_hand() -> None:
    logprobs = torch.tensor([[0.0, math.log(1 / 2), math.log(1 / 4)], [0.0, math.log(1 / 8), -math.inf]])
    mask = torch.tensor([[False, False, True], [False, True, False]])
    loss, metrics = negative_log_likelihood(logprobs, mask)
    assert loss.item() == pytest.approx(5 * math.log(2))
    assert metrics == {}


def test_against_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, generator=generator, dtype=torch.float64)
    tokens = torch.randint(11, (3, 6), generator=generator)
    mask = torch.rand(3, 6, generator=generator) < 0.5
    mask[:, 0] = False
    loss, _ = negative_log_likelihood(token_logprobs(logits, tokens), mask)
    labels = tokens.masked_fill(~mask, -100)[:, 1:]
    wanted = cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss / mask.sum(), wanted, rtol=0, atol=1e-10)
