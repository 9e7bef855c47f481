"""Tensors away from their device and back: what is kept, what is freed, and who does not notice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlhf_ray.engines import host_copies
from rlhf_ray.engines.host_copies import HostCopies, held_tensors

CPU = torch.device("cpu")


def test_views_see_the_tensor_leave_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copies, "_CHUNK_BYTES", 48)
    whole = torch.randn(5, 7)
    row, before, copies = whole[2], whole.clone(), HostCopies()
    half = torch.arange(6).bfloat16()
    for _ in range(2):
        copies.offload([whole, row, half], device=CPU)
        assert (whole.untyped_storage().nbytes(), half.untyped_storage().nbytes()) == (0, 0)
        copies.offload([whole], device=CPU)
        copies.reload()
        assert torch.equal(whole, before)
        assert half.tolist() == [0, 1, 2, 3, 4, 5]
        row += 1
        before[2] += 1
        copies.reload()
        assert torch.equal(whole, before)


def test_what_stays() -> None:
    """Memory that is shared with what must stay, and what lies on another device."""
    flat = torch.randn(10)
    copies = HostCopies()
    copies.offload([flat[:3]], device=CPU, but=[flat[5:]])
    copies.offload([flat], device=torch.device("cuda"))
    assert flat.untyped_storage().nbytes() == 40
    copies.reload()
    assert flat.abs().sum() > 0


def test_everything_that_is_held_is_found() -> None:
    layer = nn.Linear(2, 2)
    layer(torch.ones(2)).sum().backward()
    layer.weight.shard = torch.ones(3)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.step()
    held = list(held_tensors([layer.weight, {"also": (layer.bias,)}], optimizer, packages=("torch",)))
    moments = [value for state in optimizer.state.values() for value in state.values()]
    wanted = [layer.weight, layer.bias, layer.weight.grad, layer.bias.grad, layer.weight.shard, *moments]
    assert {id(tensor) for tensor in held} == {id(tensor) for tensor in wanted}
    assert list(held_tensors(optimizer, layer)) == []
