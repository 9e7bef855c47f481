"""A policy's adapter (arXiv:2106.09685) on its way into an engine that loads it from files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from rlhf_ray.config import schema
from rlhf_ray.config.paths import ADAPTER_CONFIG
from rlhf_ray.models.lora import ADAPTER_WEIGHTS, adapted_layers, adapter_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MEMORY = Path("/dev/shm")


@contextmanager
def adapter_files(lora: schema.Lora, tensors: Mapping[str, Tensor], *, base: str) -> Iterator[Path]:
    """A peft directory with these tensors, in memory where the machine has a file system for it; gone at the end.

    Args:
        lora: rank and scale.
        tensors: by their names in peft's files.
        base: directory or hub name of the model that the adapter belongs to.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf_ray_adapter_", dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        path = Path(folder)
        (path / ADAPTER_CONFIG).write_text(json.dumps(adapter_config(lora, tensors, base=base)))
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path / ADAPTER_WEIGHTS)
        yield path


def layer_names(model: PretrainedConfig, lora: schema.Lora) -> list[str]:
    """Last parts of the names of the layers that get an adapter, such as q_proj; no weights are read.

    Raises:
        ConfigError: a target module is no linear layer of this model, or is its output layer.
    """
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(model)
    return sorted({name.rpartition(".")[2] for name in adapted_layers(empty, lora, "policy.lora")})
