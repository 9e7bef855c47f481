"""Sizes from a config.json are those of the real network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rlhf_ray.config import schema
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.attention import attend_by_rows
from rlhf_ray.models.heads import build_network, switch_off_dropout
from rlhf_ray.models.loading import load_config
from rlhf_ray.models.lora import add_adapter
from rlhf_ray.plan.networks import Kind, check_synced, network

COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**COMMON, tie_word_embeddings=False),
    "gpt2": transformers.GPT2Config(vocab_size=300, n_embd=64, n_layer=3, n_head=4, n_positions=64),
    "qwen2": transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "gemma2": transformers.Gemma2Config(**COMMON, head_dim=16),
    "mixtral": transformers.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
}
HEADS: dict[Kind, Any] = {"language_model": "none", "critic": "value", "language_model_and_critic": "both"}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("family", CONFIGS)
def test_parameters(family: str, kind: Kind) -> None:
    real = build_network(transformers.AutoModelForCausalLM.from_config(CONFIGS[family]), HEADS[kind])
    found = network(CONFIGS[family], kind, dtype="float32", lora=None, row_tokens=8, device="cpu")
    counted = sum(parameter.numel() for parameter in real.parameters())
    assert (found.parameters, found.trained) == (counted, counted)
    assert found.largest == max(parameter.numel() for parameter in real.parameters())
    assert found.full_logits == (family == "gemma2")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_parameters_of_an_adapter(family: str) -> None:
    lora = schema.Lora(rank=3)
    real = transformers.AutoModelForCausalLM.from_config(CONFIGS[family])
    add_adapter(real, lora, seed=0, where="lora")
    found = network(CONFIGS[family], "language_model", dtype="float32", lora=lora, row_tokens=8, device="cpu")
    assert found.parameters == sum(parameter.numel() for parameter in real.parameters())
    assert found.trained == sum(parameter.numel() for parameter in real.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", ["DistilBert", "Bert", "Roberta"])
def test_classifiers_that_read_both_ways(family: str, device: Any) -> None:
    sizes = {
        "hidden_size": 32,
        "dim": 32,
        "num_hidden_layers": 2,
        "n_layers": 2,
        "num_attention_heads": 4,
        "n_heads": 4,
    }
    config = getattr(transformers, f"{family}Config")(vocab_size=60, intermediate_size=40, hidden_dim=40, **sizes)
    real = transformers.AutoModelForSequenceClassification.from_config(config)
    found = network(config, "classifier", dtype="float32", lora=None, row_tokens=8, device=device)
    assert found.parameters == sum(parameter.numel() for parameter in real.parameters())
    assert found.kept_per_token > 0


def test_a_classifier_has_its_own_head() -> None:
    config = transformers.LlamaConfig(**COMMON, num_labels=1)
    real = transformers.AutoModelForSequenceClassification.from_config(config)
    found = network(config, "classifier", dtype="float32", lora=None, row_tokens=8, device="cpu")
    assert found.parameters == sum(parameter.numel() for parameter in real.parameters())
    assert found.vocabulary == 0


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_forward_pass_keeps(family: str, dtype: Any) -> None:
    """Counted on real tensors of the real model."""
    real = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[family], dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    switch_off_dropout(real)
    by_rows = attend_by_rows(real)
    assert by_rows == (family != "gemma2")
    real.train()
    own = {parameter.untyped_storage().data_ptr() for parameter in real.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _held = real.base_model(
            input_ids=torch.zeros(1, 48, dtype=torch.long), position_ids=torch.arange(48)[None], use_cache=False
        )
    real_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    found = network(CONFIGS[family], "language_model", dtype=dtype, lora=None, row_tokens=48, device="cpu")
    # Where rows are padded a mask is counted that a row alone does not need; experts count twice what they have in
    # bfloat16, also the indices of their tokens.
    most = 1.2 if (family, dtype) == ("mixtral", "float32") else 1.0 if by_rows else 1.1
    assert real_bytes <= found.kept_per_token * 48 <= most * real_bytes


def test_keys_and_values(llama_directory: Path) -> None:
    found = network(
        load_config(str(llama_directory)), "language_model", dtype="float32", lora=None, row_tokens=8, device="cpu"
    )
    # 4 layers, 4 heads of 32.
    assert found.key_value_elements == 2 * 4 * 128


def test_experts_that_vllm_cannot_be_sent_are_refused_before_the_start(tmp_path: Path, llama_directory: Path) -> None:
    """Also behind another stage; not for an engine that takes them, an adapter, or samples without a sync."""
    CONFIGS["mixtral"].save_pretrained(tmp_path / "experts")

    def check(model: str, **ppo: Any) -> None:
        data = {"train": "data.jsonl"}
        reward = [{"kind": "function", "function": "a:b"}]
        policy = {"model": "stage:sft"} | ppo.pop("policy", {})
        stages = [
            {"method": "sft", "steps": 1, "policy": {"model": model}, "data": data},
            {"method": "ppo", "iterations": 1, "policy": policy, "reward": reward, "data": data, **ppo},
            {"method": "collect", "policy": {"model": model}, "reward": reward, "data": data},
        ]
        check_synced(schema.Pipeline.model_validate({"run_dir": "run", "stages": stages}))

    experts = str(tmp_path / "experts")
    with pytest.raises(ConfigError, match=r"ppo\.policy\.model: .*experts is a mixture of experts.*engine=hf"):
        check(experts)
    check(experts, generator={"engine": "hf"})
    check(experts, policy={"lora": {}})
    check(str(llama_directory))
