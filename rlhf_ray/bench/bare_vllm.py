"""The floor of generation: vLLM alone, as its own documentation runs it, with our type, batch and room for keys."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.config import schema
from rlhf_ray.engines.vllm_generation import engine_environment


class BareVllm:
    """An engine in this process.

    Args:
        model: directory of a causal language model.
        config: type, sequences in a batch, room for keys and values, prefix cache; the rest is vLLM's own choice.
        max_model_len: most tokens of a prompt and its response together.
    """

    def __init__(self, model: str | Path, config: schema.Generator, *, max_model_len: int) -> None:
        for name, value in engine_environment(config, gpu=torch.cuda.is_available()).items():
            os.environ.setdefault(name, value)
        import vllm

        assert config.kv_cache_gib is not None, "both sides need the same room for keys and values"
        self._vllm: Any = vllm
        self._llm: Any = vllm.LLM(
            model=str(model),
            dtype=config.dtype,
            max_model_len=max_model_len,
            max_num_seqs=config.max_sequences,
            kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30),
            distributed_executor_backend="uni",
            enforce_eager=not config.compile,
            enable_prefix_caching=config.prefix_caching,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )

    def generate(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], *, logprobs: bool = True) -> float:
        """Samples as many tokens for each prompt as asked for; gives the number of them all.

        Args:
            logprobs: also the log-probability of each token, without which no policy gradient can be taken.
        """
        parameters = [
            self._vllm.SamplingParams(max_tokens=length, ignore_eos=True, logprobs=0 if logprobs else None)
            for length in lengths
        ]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        results = self._llm.generate(requests, parameters, use_tqdm=False)
        return float(sum(len(result.outputs[0].token_ids) for result in results))

    def forget(self) -> None:
        """Empties the prefix cache."""
        self._llm.reset_prefix_cache()
