"""The floor of learners and scorers: plain PyTorch and transformers on rows of one length.

Every token is real and every one is trained, so matrix kernels could not be given more to do. In bfloat16 the
network computes in bfloat16 and AdamW keeps float32 weights, which is what a learner does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from rlhf_ray.bench.figures import cost

Dtype: TypeAlias = Literal["float32", "bfloat16"]
Network: TypeAlias = Literal["language_model", "trunk"]

ROWS, LENGTH = 64, 101
_AT_ONCE = (8, 16, 32)


class BareTraining:
    """A model with AdamW that reads or learns dense micro-batches of random tokens.

    Args:
        model: directory of a causal language model.
        dtype: of the network that computes.
        network: `language_model` with a loss on its logits, or its `trunk` and one number after each token.
        rows, length: of all micro-batches together.
    """

    def __init__(
        self,
        model: Path,
        dtype: Dtype,
        *,
        network: Network = "language_model",
        rows: int = ROWS,
        length: int = LENGTH,
    ) -> None:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        head = nn.Linear(loaded.config.hidden_size, 1, dtype=loaded.dtype)
        self._network = loaded if network == "language_model" else nn.Sequential(_States(loaded.base_model), head)
        self._has_logits = network == "language_model"
        self._network.train()
        self._learnt = list(self._network.parameters())
        self._masters = self._learnt if dtype == "float32" else [nn.Parameter(p.detach().float()) for p in self._learnt]
        self._optimizer = torch.optim.AdamW(self._masters, lr=1e-6, fused=True)
        self._random = torch.Generator().manual_seed(0)
        self._shape = (rows, length)
        self._high = loaded.config.vocab_size
        self._at_once: dict[Callable[[], float], int] = {}

    def step(self) -> float:
        """One optimizer step; gives its tokens."""
        for tokens in self._micro_batches(self.step):
            found = self._outputs(tokens).float()
            if self._has_logits:
                loss = cross_entropy(found[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
            else:
                loss = (found - 1.0).square().sum()
            torch.autograd.backward(loss / (self._shape[0] * self._shape[1]))
        self._optimise()
        return float(self._shape[0] * self._shape[1])

    @torch.inference_mode()
    def forward(self) -> float:
        """Forward passes alone, up to the logits or numbers; gives their tokens."""
        for tokens in self._micro_batches(self.forward):
            self._outputs(tokens)
        return float(self._shape[0] * self._shape[1])

    def tokens_per_cpu_second(self) -> float:
        """Of one training step, with as many rows at once as suits it."""
        return self._fastest(self.step)

    def forward_tokens_per_cpu_second(self) -> float:
        """Of forward passes, with as many rows at once as suits them."""
        return self._fastest(self.forward)

    def _fastest(self, work: Callable[[], float]) -> float:
        if work not in self._at_once:
            speeds = {}
            for self._at_once[work] in _AT_ONCE:
                speeds[self._at_once[work]] = cost(work).per_cpu_second
            self._at_once[work] = max(speeds, key=speeds.__getitem__)
        return cost(work).per_cpu_second

    def _outputs(self, tokens: Tensor) -> Tensor:
        if self._has_logits:
            logits: Tensor = self._network(input_ids=tokens, use_cache=False).logits
            return logits
        numbers: Tensor = self._network(tokens)
        return numbers

    def _optimise(self) -> None:
        if self._masters is not self._learnt:
            for master, weight in zip(self._masters, self._learnt, strict=True):
                assert weight.grad is not None, "every weight is learnt"
                master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._masters is not self._learnt:
            with torch.no_grad():
                for master, weight in zip(self._masters, self._learnt, strict=True):
                    weight.copy_(master)

    def _micro_batches(self, work: Callable[[], float]) -> Iterator[Tensor]:
        tokens = torch.randint(1, self._high, self._shape, generator=self._random)
        yield from torch.split(tokens, self._at_once.get(work, _AT_ONCE[0]))


class _States(nn.Module):
    """A trunk whose output is its last hidden states."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self._trunk = trunk

    def forward(self, tokens: Tensor) -> Tensor:
        states: Tensor = self._trunk(input_ids=tokens, use_cache=False).last_hidden_state
        return states
