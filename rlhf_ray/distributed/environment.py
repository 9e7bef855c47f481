"""The environment of a worker's process: threads, memory allocator, devices."""

from __future__ import annotations

import os
from collections.abc import Mapping

from rlhf_ray.distributed import faults
from rlhf_ray.distributed.bundles import Share

_LARGE_BLOCK = str(256 << 20)
# What workers take over from the driver's environment. Never a secret: these values can be read in Ray's own logs.
_PASSED_ON = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_ENDPOINT",
    "TRANSFORMERS_OFFLINE",
    "OMP_WAIT_POLICY",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    faults.VARIABLE,
)


def worker_environment(share: Share, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a worker's process, set before it starts: threads, memory allocator, devices.

    What the user has set of the allocator and of waiting threads stays; their number follows from the share.
    """
    threads = str(int(share.cpus) if share.cpus >= 2 else 1)
    variables = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        # A waiting thread that spins takes the core from the worker that it waits for.
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        # glibc would return and fault in the pages of every large tensor anew.
        "MALLOC_MMAP_THRESHOLD_": _LARGE_BLOCK,
        "MALLOC_TRIM_THRESHOLD_": _LARGE_BLOCK,
    }
    if not share.gpus:
        variables |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return variables | passed_on | dict(extra)
