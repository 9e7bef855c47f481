"""What a GPU or a processor core can do, from data sheets or measured, for the estimate of time.

The figures of GPUs are the makers' published peaks without sparsity; what of them a program reaches is an assumption
of `plan.time`. The network is one adapter for each GPU, as in the makers' reference systems: an assumption too. Of a
GPU that is sold with several sizes of memory the largest stands here.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from rlhf_ray.config import schema


@dataclass(frozen=True)
class Device:
    """One GPU, or one processor core.

    Args:
        name: as people call it.
        bfloat16: TFLOP/s in that type.
        float32: TFLOP/s, without TF32.
        memory: GB/s to its memory.
        link: GB/s in each direction to another of its node.
        network: GB/s in each direction to another node.
        gib: of memory; None for a core.
        host: GB/s in each direction between a GPU and its node's memory: its PCI Express slot of 16 lanes.
    """

    name: str
    bfloat16: float
    float32: float
    memory: float
    link: float
    network: float
    gib: float | None = None
    host: float = 32

    def flops(self, dtype: schema.DType) -> float:
        """FLOP/s at its peak."""
        return 1e12 * (self.bfloat16 if dtype == "bfloat16" else self.float32)


GPUS = {
    device.name: device
    for device in (
        Device("B200", bfloat16=2250, float32=75, memory=8000, link=900, network=50, gib=180, host=64),
        Device("H200", bfloat16=989, float32=67, memory=4800, link=450, network=50, gib=141, host=64),
        Device("H100", bfloat16=989, float32=67, memory=3350, link=450, network=50, gib=80, host=64),
        Device("H20", bfloat16=148, float32=44, memory=4000, link=450, network=50, gib=96, host=64),
        Device("A100", bfloat16=312, float32=19.5, memory=2039, link=300, network=25, gib=80),
        Device("L40S", bfloat16=362, float32=91.6, memory=864, link=32, network=12.5, gib=48),
        Device("L4", bfloat16=121, float32=30.3, memory=300, link=32, network=3.1, gib=24),
        Device("RTX4090", bfloat16=165, float32=82.6, memory=1008, link=32, network=1.25, gib=24),
        Device("RTX3090", bfloat16=71, float32=35.6, memory=936, link=32, network=1.25, gib=24),
        Device("MI300X", bfloat16=1307, float32=163, memory=5300, link=448, network=50, gib=192, host=64),
        Device("MI325X", bfloat16=1307, float32=163, memory=6000, link=448, network=50, gib=256, host=64),
    )
}
CORE = Device("CPU core", bfloat16=0.15, float32=0.1, memory=10, link=5, network=1.25)
"""A core of a server with AVX-512; an assumption where this machine is not the one that is planned for."""


def find_gpu(name: str) -> Device | None:
    """The GPU that a text speaks of, such as `NVIDIA A100-SXM4-80GB`; None where there are no figures of it."""
    words = re.findall(r"[A-Z0-9]+", name.upper())
    pairs = ["".join(pair) for pair in itertools.pairwise(words)]
    return next((GPUS[word] for word in (*words, *pairs) if word in GPUS), None)


def measure_core(seconds: float = 0.1) -> Device:
    """A core of this machine: float32 matrix products in one thread, and copies; the rest is as `CORE` has it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        left, right = torch.randn(384, 384), torch.randn(384, 384)
        source = torch.ones(16 << 20)
        target = torch.empty_like(source)
        products = _best(lambda: left @ right, seconds)
        copies = _best(lambda: target.copy_(source), seconds)
    finally:
        torch.set_num_threads(threads)
    float32 = 2 * 384**3 / products / 1e12
    share = float32 / CORE.float32
    memory = 2 * source.nbytes / copies / 1e9
    return Device("core of this machine", CORE.bfloat16 * share, float32, memory, CORE.link, CORE.network)


def _best(work: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of the calls that fit into so many seconds; two calls at least."""
    work()
    found, until = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        work()
        end = time.perf_counter()
        found = min(found, end - start)
        if end > until:
            return found
