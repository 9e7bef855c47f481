"""Writing a model as a Hugging Face directory, shard by shard, so that it is never in memory twice; or its adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from rlhf_ray.config.paths import ADAPTER_CONFIG
from rlhf_ray.models.lora import ADAPTER_WEIGHTS, named_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelWriter:
    """Collects weights into safetensors shards.

    Args:
        directory: the directory to write; made if it does not exist.
        model: the model whose weights will come; only its names and configuration are read.
    """

    def __init__(self, directory: Path, model: PreTrainedModel) -> None:
        self.directory = directory
        self.model = model
        # A tied weight is written once; from_pretrained and vLLM make the other from it.
        first = {id(tensor): name for name, tensor in reversed(named_weights(model).items())}
        self._wanted = set(first.values())
        self._shards: list[list[str]] = []
        self._bytes = 0
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        """Writes one shard."""
        kept = {name: tensor.contiguous().cpu() for name, tensor in tensors if name in self._wanted}
        if not kept:
            return
        save_file(kept, self._partial(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(kept))
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in kept.values())

    def finish(self, tokenizer: PreTrainedTokenizerBase, *, notes: Mapping[str, float]) -> None:
        """Names the shards, and writes index, configuration with `notes`, generation configuration and tokenizer."""
        count = len(self._shards)
        files = (
            ["model.safetensors"]
            if count == 1
            else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        )
        for number, file in enumerate(files):
            self._partial(number).rename(self.directory / file)
        if count > 1:
            index = {
                "metadata": {"total_size": self._bytes},
                "weight_map": {name: file for file, names in zip(files, self._shards, strict=True) for name in names},
            }
            (self.directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        self.model.config.update(dict(notes))
        self.model.config.save_pretrained(self.directory)
        if self.model.can_generate() and self.model.generation_config is not None:
            # save_pretrained would refuse the inconsistent settings that some hub models carry.
            self.model.generation_config.to_json_file(self.directory / "generation_config.json")
        tokenizer.save_pretrained(self.directory)

    def _partial(self, number: int) -> Path:
        return self.directory / f"shard_{number:05d}.partial"


def write_adapter(
    directory: Path,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    notes: Mapping[str, float],
) -> None:
    """Writes a peft adapter directory, with the tokenizer, and `notes` in a file of their own where there are any."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in weights.items()}
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if notes:
        (directory / "notes.json").write_text(json.dumps(notes, indent=2) + "\n")
    tokenizer.save_pretrained(directory)
