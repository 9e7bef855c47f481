"""The floor of learners does the work that it stands for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.bench.bare_training import BareTraining


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("network", ["language_model", "trunk"])
def test_a_step_learns_every_token_and_keeps_float32_weights(llama_directory: Path, dtype: Any, network: Any) -> None:
    bare = BareTraining(llama_directory, dtype, network=network, rows=9, length=5)
    before = [master.detach().clone() for master in bare._masters]
    assert bare.step() == bare.forward() == 45
    assert all(master.dtype == torch.float32 for master in bare._masters)
    assert all(not torch.equal(old, new) for old, new in zip(before, bare._masters, strict=True))
    weights = zip(bare._learnt, bare._masters, strict=True)
    assert all(torch.equal(weight, master.to(weight.dtype)) for weight, master in weights)
    assert all(weight.grad is None for weight in bare._learnt)
