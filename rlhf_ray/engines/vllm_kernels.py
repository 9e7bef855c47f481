"""Kernels that vLLM was compiled with and does not use on a CPU: norms in one pass instead of six operations of torch.

A step of few sequences is mostly the calling of operations, and there are two norms in every layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm import ir
from vllm.platforms import current_platform

_PROVIDER = "rlhf_ray"
# The kernels read rows by whole vector registers.
_WIDTH = 64

current_platform.import_kernels()
_AVAILABLE = current_platform.is_cpu() and hasattr(torch.ops._C, "fused_add_rms_norm")

PRIORITY = {name: [_PROVIDER, "native"] for name in ("rms_norm", "fused_add_rms_norm")}
"""vLLM's `ir_op_priority`: what these kernels do not take, torch computes as before."""


def _takes(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    plain = variance_size is None and weight is not None and weight.dtype == x.dtype
    return plain and x.shape[-1] % _WIDTH == 0 and x.is_contiguous()


def _takes_both(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    alike = x_residual.dtype == x.dtype and x_residual.is_contiguous()
    return alike and _takes(x, weight, epsilon, variance_size)


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    output = torch.empty_like(x)
    torch.ops._C.rms_norm(output, x, weight, epsilon)
    return output


def _fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


ir.ops.rms_norm.register_impl(_PROVIDER, supports_args=_takes, supported=_AVAILABLE)(_rms_norm)
ir.ops.fused_add_rms_norm.register_impl(_PROVIDER, supports_args=_takes_both, supported=_AVAILABLE, inplace=True)(
    _fused_add_rms_norm
)
