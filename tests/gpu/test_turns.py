"""Memory that is really given back on a GPU, and bits that really come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Prompts, Sequences, make_sequences
from rlhf_ray.distributed.place import Place
from rlhf_ray.workers.generator import Generator
from rlhf_ray.workers.learner import Learner
from rlhf_ray.workers.objectives import LanguageObjective

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MIB = 1 << 20


def rows() -> Sequences:
    generator = torch.Generator().manual_seed(1)

    def draw(length: int) -> list[int]:
        return torch.randint(3, 290, (length,), generator=generator).tolist()

    return make_sequences([draw(n) for n in (2, 5, 1, 3)], [draw(n) for n in (9, 1, 12, 4)])


@pytest.mark.parametrize(
    "settings", [{"zero": 0}, {"zero": 1}, {"zero": 2}, {"zero": 3}, {"zero": 2, "dtype": "bfloat16"}, {"lora": {}}]
)
def test_a_learner_leaves_the_gpu_and_comes_back(settings: dict[str, Any], llama_directory: Path) -> None:
    learner = Learner(
        Place("policy", 0, 1),
        config=schema.Learner(**settings),
        model=str(llama_directory),
        revision=None,
        head="none",
        seed=1,
        total_steps=10,
    )
    sequences = rows()
    learner.update(sequences, LanguageObjective(), epochs=1, mini_batches=1, iteration=1)
    before = learner.logprobs(sequences)
    held, parameters = torch.cuda.memory_allocated(), sum(p.numel() for p in learner.engine.module.parameters())
    for _ in range(2):
        learner.offload(keep_weights=True)
        assert torch.cuda.memory_allocated() < held
        assert torch.equal(learner.logprobs(sequences), before)
        learner.offload()
        # Rotary tables, kernels' workspaces and the like stay.
        assert torch.cuda.memory_allocated() < held - 4 * parameters * (0.4 if "lora" in settings else 1.0)
        learner.reload()
        assert torch.cuda.memory_allocated() <= held + MIB
        assert torch.equal(learner.logprobs(sequences), before)
    learner.update(sequences, LanguageObjective(), epochs=1, mini_batches=1, iteration=2)
    assert not torch.equal(learner.logprobs(sequences), before)
    learner.close()


@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_a_generator_sleeps_and_samples_the_same_again(engine: Any, llama_directory: Path) -> None:
    if engine == "vllm":
        pytest.importorskip("vllm")
    cache = {"kv_cache_gib": 1.0} if engine == "vllm" else {}
    generator = Generator(
        Place("generator", 0, 1),
        config=schema.Generator(engine=engine, sleep=True, **cache),
        model=str(llama_directory),
        revision=None,
        tokenizer=str(llama_directory),
        max_model_len=64,
        seed=1,
    )
    prompts = Prompts([[1, 50, 60], [1, 80]], ["a", "b"], [None, None], [7, 3], [0, 0])
    sampling = schema.Sampling(max_new_tokens=12)
    wanted = generator.generate(prompts, sampling, iteration=1)
    for _ in range(2):
        free, allocated = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
        generator.sleep(keep_weights=True)
        if engine == "vllm":
            assert torch.cuda.mem_get_info()[0] - free > 900 * MIB
        else:
            assert torch.cuda.memory_allocated() < allocated - MIB
        generator.wake(weights_only=True)
        with pytest.raises(AssertionError, match="sleeps \(cache\)"):
            generator.probe()
        generator.wake()
        again = generator.generate(prompts, sampling, iteration=1)
        assert torch.equal(again.sequences.tokens, wanted.sequences.tokens)
        torch.testing.assert_close(again.generator_logprobs, wanted.generator_logprobs, atol=1e-4, rtol=0)
    generator.sleep(keep_weights=False)
    generator.wake()
    with pytest.raises(AssertionError, match="has given its weights up"):
        generator.probe()
    generator.close()
