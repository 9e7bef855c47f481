"""What vLLM is told of an adapter before and while it loads it."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from rlhf_ray.config import schema
from rlhf_ray.engines.adapters import adapter_files, layer_names
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.loading import load_causal_lm
from rlhf_ray.models.lora import adapter_weights, add_adapter

LLAMA = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=300)


def test_peft_reads_what_is_written_and_nothing_is_left(llama_directory: Path) -> None:
    lora = schema.Lora(rank=3, alpha=7.5, target_modules=("q_proj", "down_proj"))
    model = load_causal_lm(str(llama_directory))
    add_adapter(model, lora, seed=1, where="policy.lora")
    tensors = adapter_weights(model)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(0.02)
    with adapter_files(lora, tensors, base=str(llama_directory)) as folder:
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        config = json.loads((folder / "adapter_config.json").read_text())
        again = peft.PeftModel.from_pretrained(load_causal_lm(str(llama_directory)), str(folder))
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 7.5, ["down_proj", "q_proj"])
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert not folder.exists()


def test_layers_by_the_last_parts_of_their_names() -> None:
    everywhere = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert layer_names(LLAMA, schema.Lora()) == everywhere
    assert layer_names(LLAMA, schema.Lora(target_modules=("v_proj", "self_attn.q_proj"))) == ["q_proj", "v_proj"]
    assert layer_names(GPT2Config(n_layer=1), schema.Lora()) == ["c_attn", "c_fc", "c_proj"]
    for refused in ("lm_head", "embed_tokens", "qproj"):
        with pytest.raises(ConfigError, match=rf"policy.lora.target_modules: got {refused}"):
            layer_names(LLAMA, schema.Lora(target_modules=("q_proj", refused)))
