"""Low-rank adapters (LoRA, arXiv:2106.09685): put into a loaded model, switched off, merged, and named as peft does.

A layer with weight W gets W + alpha / rank * B A, with A random and B zero at first. The model stays the object that
it was, so the networks of heads.py take it with an adapter as they take it without. peft is imported where it is used,
because it takes seconds.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_ray.config import schema
from rlhf_ray.config.paths import ADAPTER_CONFIG
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.loading import load_config, load_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""The weights in a peft adapter directory."""
_NAME = "default"
_PREFIX = "base_model.model."


def add_adapter(
    model: PreTrainedModel, settings: schema.Lora, *, seed: int, where: str, trained: Sequence[str] = ()
) -> None:
    """Puts an adapter into the model's linear layers and freezes all else: the same one for the same seed.

    Args:
        model: a loaded model.
        settings: rank, layers and dropout.
        seed: of the adapter's first weights.
        where: path of the settings, for messages.
        trained: names of modules that are trained whole, beside the adapter.

    Raises:
        ConfigError: a target module is no linear layer of this model, or is its output layer.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    targets = adapted_layers(model, settings, where, trained)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=isinstance(model.get_submodule(targets[0]), Conv1D),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft sets fan_in_fan_out layer by layer, and says so.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    for layer in _layers(model).values():
        for side in (layer.lora_A, layer.lora_B):
            side.to(model.dtype)
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    # The new layers start in training mode, where an adapter may drop out.
    model.train(model.training)


def adapted_layers(model: PreTrainedModel, settings: schema.Lora, where: str, trained: Sequence[str] = ()) -> list[str]:
    """Full names of the linear layers that get an adapter; the model may be an empty one on the meta device.

    Raises:
        ConfigError: a target module is no linear layer of this model, or is its output layer.
    """
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output and name not in trained
    ]
    wanted = settings.target_modules
    if wanted is None:
        return linear
    unknown = [name for name in wanted if not any(_ends(layer, name) for layer in linear)]
    if unknown:
        known = dict.fromkeys(layer.rpartition(".")[2] for layer in linear)
        raise ConfigError(
            f"{where}.target_modules: got {', '.join(unknown)}, wanted names of this model's linear layers, without "
            f"the output layer: {', '.join(known)}"
        )
    return [layer for layer in linear if any(_ends(layer, name) for name in wanted)]


@contextmanager
def adapter_off(network: nn.Module) -> Iterator[None]:
    """The network computes without its adapter: exactly what the base computes. Nothing is to be trained inside."""
    layers = _layers(network).values()
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def named_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's weights by their Hugging Face names in state-dict order, without an adapter's.

    Tied weights come under each of their names, because receivers that pack weights do not see ties.
    """
    layers = _layers(model)
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or name in module._non_persistent_buffers_set:
                continue
            full = f"{path}.{name}" if path else name
            adapted, inside, rest = full.partition(".base_layer.")
            if inside and adapted in layers:
                found[f"{adapted}.{rest}"] = tensor
            elif full.partition(".lora_")[0] not in layers:
                found[full] = tensor
    return found


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter's weights by their names in a peft adapter file, then those of the modules that are trained whole."""
    found = {}
    for name, layer in _layers(model).items():
        found[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A[_NAME].weight
        found[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B[_NAME].weight
    own = {id(weight) for weight in found.values()}
    for name, weight in model.named_parameters():
        if weight.requires_grad and id(weight) not in own:
            found[_PREFIX + name] = weight
    return found


def merged(
    model: PreTrainedModel, weights: Sequence[tuple[str, Tensor]], adapter: Mapping[str, Tensor]
) -> list[tuple[str, Tensor]]:
    """Some of `named_weights` with the adapter's part added, in the weights' type.

    Args:
        model: the model with the adapter; only its layers' shapes and scales are read.
        weights: full tensors by name.
        adapter: full tensors of `adapter_weights`.
    """
    layers = _layers(model)
    result = []
    for name, weight in weights:
        layer = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is not None:
            key = _PREFIX + name.removesuffix(".weight")
            a, b = adapter[f"{key}.lora_A.weight"].float(), adapter[f"{key}.lora_B.weight"].float()
            change = layer.scaling[_NAME] * (b @ a)
            weight = (weight.float() + (change.T if layer.fan_in_fan_out else change)).to(weight.dtype)
        result.append((name, weight))
    return result


def adapter_config(
    settings: schema.Lora,
    names: Iterable[str],
    *,
    base: str,
    revision: str | None = None,
    task: str = "CAUSAL_LM",
    transposed: bool = False,
) -> dict[str, Any]:
    """What stands in adapter_config.json.

    Args:
        settings: rank, scale, dropout and layers.
        names: those of `adapter_weights`.
        base: directory or hub name of the model that the adapter belongs to.
        revision: of a hub model.
        task: peft's name of the task.
        transposed: the layers keep their weights transposed, as GPT-2's do.
    """
    names = [name.removeprefix(_PREFIX) for name in names]
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in names if ".lora_" in name}
    whole = {name.rpartition(".")[0] for name in names if ".lora_" not in name}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": sorted(settings.target_modules or adapted),
        "modules_to_save": sorted(whole) or None,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "inference_mode": True,
    }


def keeps_weights_transposed(model: PreTrainedModel) -> bool:
    """Whether the layers with an adapter keep their weights as [in, out]."""
    return any(layer.fan_in_fan_out for layer in _layers(model).values())


def is_adapter(name: str) -> bool:
    """Whether this is the directory of a peft adapter and of no whole model."""
    return (Path(name) / ADAPTER_CONFIG).is_file() and not (Path(name) / "config.json").is_file()


def read_adapter_config(directory: str) -> dict[str, Any]:
    """What stands in the adapter_config.json of a peft adapter directory.

    Raises:
        ConfigError: it is no JSON object that names a base.
    """
    try:
        found = json.loads((Path(directory) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{directory}: {ADAPTER_CONFIG} is not valid JSON: {error}") from error
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    if not base or not isinstance(base, str):
        raise ConfigError(f"{directory}: {ADAPTER_CONFIG} names no base_model_name_or_path, which the adapter changes")
    return dict(found)


def adapted_model_files(directory: str) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of the model that an adapter and its base make; no weights are read.

    Args:
        directory: peft adapter directory; its own tokenizer, where it has one, stands for the base's.

    Raises:
        ConfigError: the base or the tokenizer cannot be loaded.
    """
    adapter = read_adapter_config(directory)
    base, revision = adapter["base_model_name_or_path"], adapter.get("revision")
    try:
        config = load_config(base, revision)
        own = (Path(directory) / "tokenizer_config.json").is_file()
        return config, load_tokenizer(directory) if own else load_tokenizer(base, revision)
    except ConfigError as error:
        raise ConfigError(f"{directory}: the peft adapter's base cannot be loaded: {error}") from error


def merge_adapter(directory: str, target: Path) -> str:
    """Writes an adapter's language model, merged with its base, as a Hugging Face directory; that directory.

    Args:
        directory: peft adapter directory; its config names the base.
        target: the directory to write.

    Raises:
        ConfigError: the base or the adapter cannot be loaded.
    """
    from peft import AutoPeftModelForCausalLM

    _, tokenizer = adapted_model_files(directory)
    try:
        whole = AutoPeftModelForCausalLM.from_pretrained(directory).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        raise ConfigError(
            f"{directory}: the peft adapter cannot be merged with its base: {lines[0] if lines else error}"
        ) from error
    whole.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


def check_four_bits(where: str) -> None:
    """Raises ConfigError where a base cannot be in 4 bits: bitsandbytes or the GPU for it is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{where}: got nf4, but bitsandbytes is not installed on this worker's machine")
    if not torch.cuda.is_available():
        raise ConfigError(f"{where}: got nf4, but this worker has no GPU; wanted none, or a GPU for it")


def _layers(network: nn.Module) -> dict[str, Any]:
    # Before peft is there no layer has an adapter, and its import would cost every learner seconds.
    peft = sys.modules.get("peft.tuners.lora")
    return {n: m for n, m in network.named_modules() if isinstance(m, peft.LoraLayer)} if peft else {}


def _ends(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")
