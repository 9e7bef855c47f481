"""Generation with transformers, token by token: the oracle in tests, and the way out where vLLM has no build."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.algorithms.logprobs import token_logprobs
from rlhf_ray.config import schema
from rlhf_ray.distributed.memory import peak_memory_gib
from rlhf_ray.distributed.transports import Inbox, ReceivedWeights, TransportSpec
from rlhf_ray.engines.generation import EnginePart, Sample
from rlhf_ray.engines.host_copies import HostCopies
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.models.loading import load_causal_lm, load_eos_token_ids, load_tokenizer
from rlhf_ray.models.lora import adapter_weights, add_adapter


class HfEngine:
    """A transformers model that samples one response at a time.

    Args:
        config: the generator's section of the pipeline file.
        model: directory or hub name.
        revision: revision of a hub model.
        tokenizer: directory or hub name of the tokenizer.
        max_model_len: most tokens of a prompt and its response together.
        lora: the policy's adapter, where it alone is received.
    """

    receivers = 1
    cache_block = 0

    def __init__(
        self,
        *,
        config: schema.Generator,
        model: str,
        revision: str | None,
        tokenizer: str,
        max_model_len: int,
        lora: schema.Lora | None = None,
    ) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = load_causal_lm(model, revision, config.dtype)
        if lora is not None:
            # Until the first transfer the adapter adds nothing.
            add_adapter(self._model, lora, seed=0, where="policy.lora")
        self._model.to(self._device)
        self._weights = self._model.state_dict() if lora is None else adapter_weights(self._model)
        self._tokenizer = load_tokenizer(tokenizer)
        self._stop_token_ids = sorted(load_eos_token_ids(model, revision, self._tokenizer))
        self._inbox = Inbox()
        # On a CPU host memory is all there is.
        self.moves_weights = self._device.type == "cuda"
        self._copies = HostCopies()
        self._version = 0
        self._started = 0
        self._queue: deque[tuple[int, list[int], schema.Sampling, int]] = deque()
        self.max_model_len = max_model_len
        self.vocab_size = int(self._model.config.vocab_size)

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: schema.Sampling, *, seeds: Sequence[int]
    ) -> list[Sample]:
        """One response for each prompt, in order; a response depends on its prompt, its seed and the weights alone."""
        return [self._sample(list(prompt), sampling, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def start(self, prompts: Sequence[Sequence[int]], sampling: schema.Sampling, *, seeds: Sequence[int]) -> list[int]:
        """Queues the same responses, and gives their numbers."""
        first = self._started
        self._started += len(prompts)
        numbers = list(range(first, self._started))
        for number, prompt, seed in zip(numbers, prompts, seeds, strict=True):
            self._queue.append((number, list(prompt), sampling, seed))
        return numbers

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Sample]]:
        """The next response of the queue, whole."""
        if not self._queue:
            return []
        number, prompt, sampling, seed = self._queue.popleft()
        return [(number, self._sample(prompt, sampling, seed))]

    def restart(self) -> None:
        """What has not ended has not begun."""

    def _sample(self, prompt: list[int], sampling: schema.Sampling, seed: int) -> Sample:
        random = torch.Generator().manual_seed(seed)
        tokens: list[int] = []
        logprobs: list[float] = []
        past: Any = None
        fresh = prompt
        before = self._text(prompt)
        while len(tokens) < sampling.max_new_tokens:
            outputs = self._model(torch.tensor([fresh], device=self._device), past_key_values=past, use_cache=True)
            past = outputs.past_key_values
            logits = outputs.logits[0, -1].float().cpu()
            if len(tokens) < sampling.min_new_tokens:
                logits[self._stop_token_ids] = -torch.inf
            distribution = filtered_logprobs(logits, torch.tensor(prompt + tokens), sampling)
            if sampling.temperature == 0:
                token = int(distribution.argmax())
            else:
                token = int(torch.multinomial(distribution.exp(), 1, generator=random))
            tokens.append(token)
            logprobs.append(float(distribution[token]))
            fresh = [token]
            if token in self._stop_token_ids:
                return self._made(tokens, logprobs, True, self._text(prompt + tokens[:-1])[len(before) :])
            text = self._text(prompt + tokens)[len(before) :]
            ends = [text.index(stop) for stop in sampling.stop if stop in text]
            if ends and len(tokens) >= sampling.min_new_tokens:
                return self._made(tokens, logprobs, True, text[: min(ends)])
        return self._made(tokens, logprobs, False, self._text(prompt + tokens)[len(before) :])

    def _made(self, tokens: list[int], logprobs: list[float], finished: bool, text: str) -> Sample:
        return Sample(tokens, logprobs, finished, text, [self._version] * len(tokens))

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    @torch.inference_mode()
    def prompt_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """For each prompt the log-probability of each token at temperature 1; 0 for the first token."""
        found = []
        for prompt in prompts:
            tokens = torch.tensor([list(prompt)], device=self._device)
            logits = self._model(tokens, use_cache=False).logits.float()
            found.append([float(value) for value in token_logprobs(logits, tokens)[0]])
        return found

    @torch.inference_mode()
    def next_tokens(self, sequences: Sequence[Sequence[int]], count: int) -> list[list[tuple[int, float]]]:
        """For each sequence the `count` most likely next tokens and their log-probabilities, best first."""
        found = []
        for sequence in sequences:
            logits = self._model(torch.tensor([list(sequence)], device=self._device), use_cache=False).logits[0, -1]
            best = logits.float().log_softmax(0).topk(min(count, self.vocab_size))
            found.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        return found

    def receive(
        self, spec: TransportSpec, version: int, *, first_rank: int, load: bool = True
    ) -> list[ReceivedWeights]:
        """Takes a transfer of weights and loads them; a list of one."""
        load_them = self._load if load else lambda arriving: None
        received = [self._inbox.take(spec, version, rank=first_rank, load=load_them)]
        self._version = version
        return received

    @torch.no_grad()
    def _load(self, arriving: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in arriving:
            if name not in self._weights:
                raise WeightSyncError(f"tensor {name!r} arrived, and the generator's model has none of this name")
            self._weights[name].copy_(tensor)

    def reset_prefix_cache(self) -> None:
        """Nothing is kept between calls."""

    def sleep(self, *, keep_weights: bool) -> None:
        """Moves the model into host memory, also where its weights are not to be kept; on a CPU nothing is moved."""
        if self.moves_weights:
            self._copies.offload([*self._model.parameters(), *self._model.buffers()], device=self._device)

    def wake(self, part: EnginePart) -> None:
        """Brings the model back; it has no cache."""
        if part == "weights":
            self._copies.reload()

    def memory_gib(self) -> float:
        """Peak memory so far: the GPU's where there is one, else the process's."""
        return peak_memory_gib()

    def close(self) -> None:
        """Frees the receiver's buffers."""
        self._inbox.close()


def filtered_logprobs(logits: Tensor, context: Tensor, sampling: schema.Sampling) -> Tensor:
    """[V] log-probabilities of the next token after penalty, temperature and filters, renormalised.

    Args:
        logits: [V] of the model.
        context: the tokens so far, prompt included.
    """
    if sampling.repetition_penalty != 1.0:
        seen = torch.unique(context)
        penalised = logits[seen]
        factor = sampling.repetition_penalty
        logits[seen] = torch.where(penalised > 0, penalised / factor, penalised * factor)
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    probabilities = logits.softmax(0)
    if sampling.min_p > 0:
        logits = logits.masked_fill(probabilities < sampling.min_p * probabilities.max(), -torch.inf)
    if sampling.top_k > 0:
        smallest = logits.topk(min(sampling.top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(0).cumsum(0) - ordered.softmax(0)
        logits = logits.index_fill(0, index[before >= sampling.top_p], -torch.inf)
    return logits.log_softmax(0)
