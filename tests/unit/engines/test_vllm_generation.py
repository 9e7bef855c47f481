"""What is decided before vLLM is imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from rlhf_ray.config import schema
from rlhf_ray.engines.vllm_generation import VllmEngine, _arguments, cache_bytes, engine_environment, limit_model_len
from rlhf_ray.errors import ConfigError


def llama(**settings: int) -> LlamaConfig:
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**sizes | {"head_dim": 32, "max_position_embeddings": 256} | settings)


def test_the_model_must_be_long_enough() -> None:
    assert limit_model_len("tiny", llama(), 256) == 256
    with pytest.raises(
        ConfigError, match=r"tiny: prompt and response may take 257 tokens, the model's longest .* is 256"
    ):
        limit_model_len("tiny", llama(), 257)


def test_cache_size_by_hand() -> None:
    # 2 (keys, values) * 2 layers * 2 heads * 32 * 4 bytes = 1024 bytes a token; 100 tokens are 4 blocks of 32, and one
    # to spare: 160 KiB a sequence.
    config = schema.Generator(max_sequences=8)
    assert cache_bytes(config, llama(), max_model_len=100) == 8 * 160 * 1024
    assert cache_bytes(config.model_copy(update={"dtype": "bfloat16"}), llama(), max_model_len=100) == 8 * 80 * 1024
    assert cache_bytes(config.model_copy(update={"kv_cache_gib": 0.5}), llama(), max_model_len=100) == 1 << 29
    assert cache_bytes(schema.Generator(max_sequences=100_000), llama(), max_model_len=100) <= 2 << 30


def test_environment_of_the_engine() -> None:
    on_cpu = engine_environment(schema.Generator(), gpu=False)
    assert on_cpu["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert on_cpu["OMP_NUM_THREADS"] == "1"
    assert on_cpu["TORCHDYNAMO_DISABLE"] == "1"
    on_gpu = engine_environment(schema.Generator(compile=True), gpu=True)
    assert "OMP_NUM_THREADS" not in on_gpu
    assert "TORCHDYNAMO_DISABLE" not in on_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="a limit of vLLM's CPU backend")
def test_attention_heads_that_the_cpu_backend_does_not_take(tmp_path: Path) -> None:
    llama(head_dim=48).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"attention heads of 48 dimensions; on a CPU vLLM takes 32, 64, .*engine=hf"):
        VllmEngine(
            config=schema.Generator(), model=str(tmp_path), revision=None, tokenizer=str(tmp_path), max_model_len=64
        )
    assert "vllm" not in sys.modules


class FakeLlm:
    """Notes how it is put to sleep and woken."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def sleep(self, level: int) -> None:
        self.calls.append(level)

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(tags)


@pytest.mark.parametrize(
    ("lora", "keep_weights", "level"), [(None, False, 2), (None, True, 1), (schema.Lora(), False, 1)]
)
def test_how_vllm_sleeps(lora: schema.Lora | None, keep_weights: bool, level: int) -> None:
    """Weights that no transfer will bring are kept in host memory: level 1."""
    engine = object.__new__(VllmEngine)
    engine._lora, engine._llm, engine._sleeps = lora, FakeLlm(), True
    engine.sleep(keep_weights=keep_weights)
    engine.wake("weights")
    engine.wake("cache")
    assert engine._llm.calls == [level, ["weights"], ["kv_cache"]]
    engine._llm, engine._sleeps = FakeLlm(), False
    engine.sleep(keep_weights=keep_weights)
    engine.wake("weights")
    assert engine._llm.calls == []


def test_sleep_is_asked_for_at_the_start_and_on_a_gpu_only() -> None:
    config = schema.Generator(sleep=True)
    assert _arguments(config, llama(), max_model_len=64, gpu=True)["enable_sleep_mode"] is True
    assert _arguments(schema.Generator(), llama(), max_model_len=64, gpu=True)["enable_sleep_mode"] is False
    assert "enable_sleep_mode" not in _arguments(config, llama(), max_model_len=64, gpu=False)
