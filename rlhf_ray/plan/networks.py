"""Sizes of a network from its config.json alone: parameters, what a forward pass keeps for the backward pass, keys.

The network is built without memory (torch's meta device and fake tensors), so every architecture is counted as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from rlhf_ray.config import schema
from rlhf_ray.config.effects import generator_of
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.attention import attend, set_attention_by_rows
from rlhf_ray.models.heads import hidden_size, switch_off_dropout
from rlhf_ray.models.loading import (
    key_value_elements,
    load_config,
    merges_weights,
    new_config,
    quiet_transformers,
    torch_dtype,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Kind = Literal["language_model", "critic", "language_model_and_critic", "classifier"]
Device = Literal["cpu", "cuda"]
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_CAPS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


@dataclass(frozen=True)
class Network:
    """Sizes of a network.

    Args:
        parameters: all of them, those used twice counted once.
        trained: those that get gradients.
        multiplied: those that every token is multiplied with; of several experts those that a token goes to.
        quantisable: those in linear layers, which QLoRA holds in 4 bits.
        largest: of the largest single tensor.
        layers: number of blocks.
        hidden: width of the hidden states.
        vocabulary: outputs of its output layer; 0 where it has none.
        full_logits: whether the logits of all tokens lie in memory at once.
        kept_per_token: bytes that a forward pass keeps for the backward pass, for each token.
        key_value_elements: elements of keys and values that one token has in an engine's cache.
    """

    parameters: int
    trained: int
    multiplied: int
    quantisable: int
    largest: int
    layers: int
    hidden: int
    vocabulary: int
    full_logits: bool
    kept_per_token: float
    key_value_elements: int


def model_config(config: schema.Pipeline, name: str | schema.NewModel, revision: str | None) -> PretrainedConfig:
    """The configuration behind a model's name in a pipeline; of an earlier stage's model that of what it started from.

    Raises:
        ConfigError: it cannot be read.
    """
    made = {schema.STAGE + stage.name: stage.policy for stage in config.stages}
    while isinstance(name, str) and (policy := made.get(name)) is not None:
        name, revision = policy.model, policy.revision
    if isinstance(name, schema.NewModel):
        return _new(name)
    file = Path(name) / "config.json"
    return _loaded(name, revision, file.stat().st_mtime_ns if file.is_file() else 0)


def check_synced(config: schema.Pipeline) -> None:
    """Raises ConfigError where vLLM could not take the weights that a stage's policy has."""
    for stage in config.stages:
        generator, policy = generator_of(stage), stage.policy
        if generator is None or generator.engine != "vllm" or not isinstance(policy, schema.Learner) or policy.lora:
            continue
        model = model_config(config, policy.model, policy.revision)
        if merges_weights(model):
            raise ConfigError(
                f"{stage.name}.policy.model: {model.name_or_path} is a mixture of experts, whose weights transformers "
                "merges; vLLM takes them one by one, so they cannot be synced to it yet; set generator.engine=hf"
            )


_new = cache(new_config)


@cache
def _loaded(name: str, revision: str | None, changed: int) -> PretrainedConfig:
    """The configuration of a model as it was when it was changed last."""
    quiet_transformers()
    return load_config(name, revision)


def network(
    model: PretrainedConfig,
    kind: Kind,
    *,
    dtype: schema.DType,
    lora: schema.Lora | None,
    row_tokens: int,
    device: Device,
) -> Network:
    """Sizes of a network.

    Args:
        model: its configuration.
        kind: what stands on its trunk.
        dtype: type of the weights.
        lora: the adapter that is trained instead of the whole network.
        row_tokens: tokens of the rows that it reads, for what attention keeps.
        device: where it computes; on a CPU attention keeps float32 whatever the weights are.

    Raises:
        ConfigError: there is no such network of this architecture.
    """
    return _network(_configured(model), kind, dtype, lora, row_tokens, device)


@dataclass(frozen=True)
class _Configured:
    """A configuration that can be a key."""

    key: str
    config: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Configured) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


_seen: dict[int, _Configured] = {}


def _configured(model: PretrainedConfig) -> _Configured:
    """The configuration as a key, written once: writing it takes longer than all that is worked out from it."""
    found = _seen.get(id(model))
    if found is None:
        found = _seen[id(model)] = _Configured(model.to_json_string(use_diff=False), model)
    return found


@cache
def _network(
    configured: _Configured,
    kind: Kind,
    dtype: schema.DType,
    lora: schema.Lora | None,
    row_tokens: int,
    device: Device,
) -> Network:
    config = configured.config
    with torch.device("meta"):
        built = _build(config, kind, dtype)
        if lora is not None:
            from rlhf_ray.models.lora import add_adapter

            add_adapter(built, lora, seed=0, where="lora", trained=("score",) if kind == "classifier" else ())
    of_network = list((built.base_model if kind == "critic" else built).parameters())
    head = (hidden_size(built) + 1) if kind in ("critic", "language_model_and_critic") else 0
    output = built.get_output_embeddings() if kind.startswith("language") else None
    text = config.get_text_config()
    return Network(
        parameters=sum(each.numel() for each in of_network) + head,
        trained=sum(each.numel() for each in of_network if each.requires_grad) + head,
        multiplied=_multiplied(
            of_network, text, None if output is None else output.weight, built.get_input_embeddings().weight
        )
        + head,
        quantisable=_quantisable(built, output),
        largest=max(each.numel() for each in of_network),
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        vocabulary=0 if output is None else int(output.weight.shape[0]),
        full_logits=any(getattr(text, name, None) not in (None, 1, 1.0) for name in _CAPS),
        kept_per_token=_kept_bytes(config, kind, dtype, row_tokens, device) / row_tokens,
        key_value_elements=key_value_elements(text),
    )


def _build(config: Any, kind: Kind, dtype: schema.DType) -> PreTrainedModel:
    import transformers

    auto = (
        transformers.AutoModelForSequenceClassification if kind == "classifier" else transformers.AutoModelForCausalLM
    )
    try:
        built: PreTrainedModel = auto.from_config(config, dtype=torch_dtype(dtype), attn_implementation="sdpa")
    except ValueError as error:
        raise ConfigError(f"{config.name_or_path or config.model_type}: {str(error).splitlines()[0]}") from error
    switch_off_dropout(built)
    return built.train()


def _kept_bytes(config: Any, kind: Kind, dtype: schema.DType, tokens: int, device: Device) -> int:
    """Bytes of what one row keeps between forward and backward pass, the parameters aside; without an adapter."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        built = _build(config, kind, dtype)
        if dtype == "float32" and any(each.dim() == 3 for each in built.parameters()):
            # What torch computes with experts it foretells in bfloat16 alone.
            return 2 * _kept_bytes(config, kind, "bfloat16", tokens, device)
        try:
            set_attention_by_rows(built, None if device == "cpu" else _attention_of_a_gpu)
            return _kept(built, tokens, causal=True)
        except (TypeError, ValueError, NotImplementedError):
            built.set_attn_implementation("sdpa")
            return _kept(built, tokens, causal=kind != "classifier")


def _attention_of_a_gpu(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    if attention_mask is not None or other.get("softcap") is not None:
        raise NotImplementedError("attention with a mask of its own")
    return attend(query, key, value, dropout=0.0, scaling=scaling, window=sliding_window).transpose(1, 2), None


def _kept(built: PreTrainedModel, tokens: int, *, causal: bool) -> int:
    own = {each.untyped_storage()._cdata for each in built.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long)
    # Classifiers that read in both directions take no positions and have no cache.
    left_to_right = {"position_ids": torch.arange(tokens)[None], "use_cache": False} if causal else {}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        built.base_model(input_ids=ids, **left_to_right)
    # Holding on to the storages keeps their numbers from being given to others.
    return sum(storage.nbytes() for storage in kept.values())


def _multiplied(parameters: Sequence[torch.Tensor], text: Any, output: Any, table: torch.Tensor) -> int:
    """Elements of matrices, without the input's embeddings unless they are the output layer's weight too."""
    experts = next((found for name in _EXPERTS if (found := getattr(text, name, None))), 1)
    share = (getattr(text, "num_experts_per_tok", None) or experts) / experts
    return sum(
        round(each.numel() * (share if each.dim() == 3 else 1))
        for each in parameters
        if each.dim() > 1 and (each is not table or output is table)
    )


def _quantisable(built: PreTrainedModel, output: Any) -> int:
    linear: Sequence[torch.nn.Linear] = [
        module for module in built.modules() if isinstance(module, torch.nn.Linear) and module is not output
    ]
    return sum(module.weight.numel() for module in linear if not module.weight.requires_grad)
