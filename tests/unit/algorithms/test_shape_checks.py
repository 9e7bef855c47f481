"""The import hook of conftest.py is on: a wrong shape or type does not pass a signature."""

import jaxtyping
import pytest
import torch

from rlhf_ray.algorithms.kl import k1
from rlhf_ray.algorithms.masked import masked_mean
from rlhf_ray.algorithms.policy_losses import KlLoss


def test_tensors_of_different_length_are_refused() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        k1(torch.zeros(2, 3), torch.zeros(2, 1))


def test_a_mask_that_is_no_bool_is_refused() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        masked_mean(torch.zeros(2, 3), torch.ones(2, 3))


def test_a_loss_checks_its_call() -> None:
    loss = KlLoss("k2", 0.1, "token_mean")
    with pytest.raises(jaxtyping.TypeCheckError):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3, 2, dtype=torch.bool))
