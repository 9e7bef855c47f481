"""The norms that vLLM computes on a CPU with its compiled kernels, against those of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.config import schema
from rlhf_ray.distributed.placement import Cluster, RoleRequest
from rlhf_ray.engines.vllm_generation import engine_environment
from rlhf_ray.workers.generator import Generator
from tests.tiny_models import make_llama

EPSILON = 1e-5
Outcome = tuple[list[str], list[tuple[Tensor, Tensor]]]


class NormGenerator(Generator):
    """A generator whose engine computes norms of given rows."""

    def norms(self, x: Tensor, residual: Tensor, weight: Tensor) -> Outcome:
        """Which kernels are chosen, and what they and torch make of the rows: norm, norm of the sum, the sum."""
        engine: Any = self.engine
        found: Outcome = engine._llm.collective_rpc(norms, args=(x, residual, weight))[0]
        return found


def norms(worker: Any, x: Tensor, residual: Tensor, weight: Tensor) -> Outcome:
    from vllm import ir

    plain, fused = ir.ops.rms_norm, ir.ops.fused_add_rms_norm
    chosen = [
        plain.dispatch(x, weight, EPSILON).provider,
        fused.dispatch(x, residual, weight, EPSILON).provider,
    ]
    expected = (
        plain.impls["native"].impl_fn(x, weight, EPSILON),
        *fused.impls["native"].impl_fn(x, residual, weight, EPSILON),
    )
    # The kernel of the sum writes over what it is given.
    ours = (plain(x, weight, EPSILON), *fused.maybe_inplace(x, residual, weight, EPSILON))
    return chosen, list(zip(ours, expected, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has kernels of its own")
def test_norms_of_the_compiled_kernels_are_those_of_torch(cluster: Cluster, tmp_path: Path) -> None:
    """Rows that the kernels cannot read, of an odd width or with gaps, are left to torch."""
    model = make_llama(tmp_path / "model")
    config = schema.Generator(max_sequences=4)
    with cluster.reserve([RoleRequest("generator", env=engine_environment(config, gpu=False))]) as placement:
        generator = placement.start(
            "generator",
            NormGenerator,
            config=config,
            model=model,
            revision=None,
            tokenizer=model,
            max_model_len=64,
            seed=1,
        )
        random = torch.Generator().manual_seed(1)

        def rows(*shape: int, dtype: torch.dtype) -> Tensor:
            return (torch.randn(*shape, generator=random) * 3).to(dtype)

        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
            for width, chosen in ((64, "rlhf_ray"), (768, "rlhf_ray"), (72, "native")):
                given = [rows(5, width, dtype=dtype), rows(5, width, dtype=dtype), rows(width, dtype=dtype)]
                providers, pairs = generator.first(NormGenerator.norms, *given).result()
                assert providers == [chosen] * 2
                for ours, expected in pairs:
                    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
        gaps = rows(5, 128, dtype=torch.float32)[:, :64]
        whole, weight = rows(5, 64, dtype=torch.float32), rows(64, dtype=torch.float32)
        providers, pairs = generator.first(NormGenerator.norms, gaps, whole, weight).result()
        assert providers == ["native"] * 2
        assert all(ours.equal(expected) for ours, expected in pairs)
