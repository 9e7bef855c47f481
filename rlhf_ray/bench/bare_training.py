"""The floor of learners and scorers: plain PyTorch on rows of one length."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from rlhf_ray.bench.figures import Cost, cost

Dtype: TypeAlias = Literal["float32", "bfloat16"]

ROWS, LENGTH, MICRO_BATCHES = 5, 101, 6


class BareTraining:
    """A model with AdamW that learns from dense micro-batches of random tokens.

    Args:
        model: directory of a causal language model.
        dtype: of its weights.
    """

    def __init__(self, model: Path, dtype: Dtype) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._model.train()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-6)
        self._random = torch.Generator().manual_seed(0)

    def step(self) -> float:
        """One optimizer step; gives its tokens."""
        for tokens in self._micro_batches():
            logits = self._model(input_ids=tokens, use_cache=False).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
            torch.autograd.backward(loss / MICRO_BATCHES)
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(ROWS * LENGTH * MICRO_BATCHES)

    @torch.no_grad()
    def forward(self) -> float:
        """As many tokens judged: the log-probability of each."""
        for tokens in self._micro_batches():
            logits = self._model(input_ids=tokens, use_cache=False).logits
            logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None])
        return float(ROWS * LENGTH * MICRO_BATCHES)

    def tokens_per_cpu_second(self) -> float:
        """Of one training step."""
        done: Cost = cost(self.step)
        return done.per_cpu_second

    def forward_tokens_per_cpu_second(self) -> float:
        """Of forward passes."""
        return cost(self.forward).per_cpu_second

    def _micro_batches(self) -> list[torch.Tensor]:
        high = self._model.config.vocab_size
        shape = (ROWS, LENGTH)
        return [torch.randint(1, high, shape, generator=self._random) for _ in range(MICRO_BATCHES)]
