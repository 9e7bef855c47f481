"""Generation with vLLM, inside this process: on CPU and on GPU.

vLLM runs without its engine subprocess: when that dies `generate` never returns, while a dying actor is reported
at once. Most of the start is the import of vLLM: a second engine in the same process starts in a fraction of a second.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from rlhf_ray.config import schema
from rlhf_ray.config.role_rules import ADAPTER_RANKS
from rlhf_ray.distributed.memory import peak_memory_gib
from rlhf_ray.distributed.transports import Inbox, ReceivedWeights, TransportSpec
from rlhf_ray.engines.adapters import adapter_files, layer_names
from rlhf_ray.engines.generation import EnginePart, Sample
from rlhf_ray.errors import ConfigError, InstallError, WeightSyncError
from rlhf_ray.models.loading import (
    head_dim,
    key_value_elements,
    load_config,
    load_eos_token_ids,
    load_tokenizer,
    torch_dtype,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CPU_BLOCK = 32
_CPU_STEP_TOKENS = 1024
_CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
_CPU_CACHE_LIMIT = 2 << 30
_SLEEP_TAGS: dict[EnginePart, str] = {"weights": "weights", "cache": "kv_cache"}
_EXTENSION = "rlhf_ray.engines.vllm_worker_extension.WeightReceiver"
_SCHEDULER = "rlhf_ray.engines.vllm_scheduler.SiblingScheduler"


def engine_environment(config: schema.Generator, *, gpu: bool) -> dict[str, str]:
    """Variables that must stand in the environment of the engine's process before it starts."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if not gpu:
        # Two threads on a busy core wait for each other at every barrier: ten times slower.
        environment["OMP_NUM_THREADS"] = "1"
    if not config.compile:
        # vLLM compiles one small function for log-probabilities even in eager mode, which takes 13 s and a compiler.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    return environment


def limit_model_len(name: str, model: PretrainedConfig, wanted: int) -> int:
    """The given number of tokens, checked against the longest sequence that the model takes.

    Raises:
        ConfigError: the model is shorter.
    """
    longest = getattr(model, "max_position_embeddings", None)
    if longest is not None and wanted > longest:
        raise ConfigError(
            f"{name}: prompt and response may take {wanted} tokens, the model's longest sequence is {longest}; "
            "lower data.max_prompt_tokens or sampling.max_new_tokens"
        )
    return wanted


def cache_bytes(config: schema.Generator, model: PretrainedConfig, *, max_model_len: int) -> int:
    """Bytes for keys and values on a CPU: the setting, or room for max_sequences within 2 GiB."""
    if config.kv_cache_gib is not None:
        return int(config.kv_cache_gib * 2**30)
    per_token = key_value_elements(model) * torch_dtype(config.dtype).itemsize
    blocks = -(-max_model_len // _CPU_BLOCK) + 1
    one = blocks * _CPU_BLOCK * per_token
    limit = min(_CPU_CACHE_LIMIT, psutil.virtual_memory().total // 4)
    return max(2 * one, min(config.max_sequences * one, limit))


class VllmEngine:
    """An engine of vLLM with one model.

    Args:
        config: the generator's section of the pipeline file.
        model: directory or hub name.
        revision: revision of a hub model.
        tokenizer: directory or hub name of the tokenizer.
        max_model_len: most tokens of a prompt and its response together.
        lora: the policy's adapter, where it alone is received.

    Raises:
        ConfigError: vLLM cannot run this model or its adapter, or the model's sequences are shorter.
        InstallError: vLLM is missing.
    """

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
        model_config = load_config(model, revision)
        self._max_model_len = limit_model_len(model, model_config, max_model_len)
        self._vocab_size = int(model_config.vocab_size)
        self._tensor_parallel = config.tensor_parallel
        self._model = model
        self._lora = lora
        self._inbox = Inbox()
        self._loads = 0
        self._started = 0
        # Prompts and parameters of what was started and has not ended, and what has ended and was not given yet.
        self._unfinished: dict[int, tuple[list[int], Any]] = {}
        self._ended: list[tuple[int, Sample]] = []
        # vLLM's request for the adapter of the present version; None: the model as it was loaded.
        self._adapter: Any = None
        gpu = torch.cuda.is_available()
        if not gpu and head_dim(model_config) not in _CPU_HEAD_DIMS:
            raise ConfigError(
                f"{model}: attention heads of {head_dim(model_config)} dimensions; on a CPU vLLM takes "
                f"{', '.join(map(str, _CPU_HEAD_DIMS))}; choose another model, or generator.engine=hf"
            )
        self._tokenizer = load_tokenizer(tokenizer)
        self._stop_token_ids = list(load_eos_token_ids(model, revision, self._tokenizer))
        arguments = _arguments(config, model_config, max_model_len=self._max_model_len, gpu=gpu)
        if lora is not None:
            if gpu and config.dtype == "float32":
                raise ConfigError(
                    "generator.dtype: got float32, wanted bfloat16: on a GPU vLLM takes adapters in 16 bits only"
                )
            _check_takes_adapters(model, model_config)
            arguments |= _adapter_arguments(lora, layer_names(model_config, lora))
        source = {"model": model, "revision": revision, "tokenizer": tokenizer}
        self._llm: Any = _start(source | arguments, config, model_config, gpu=gpu)
        self._llm.llm_engine.set_weight_version("0")
        self._sleeps = gpu and config.sleep
        self._block = self._llm.llm_engine.vllm_config.cache_config.block_size if config.prefix_caching else 0

    @property
    def receivers(self) -> int:
        """Number of receivers that a transfer of weights meets in this engine: of an adapter this process alone."""
        return 1 if self._lora else self._tensor_parallel

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its response together."""
        return self._max_model_len

    @property
    def cache_block(self) -> int:
        """Tokens of a block of the prefix cache; 0 where there is none."""
        return int(self._block)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model knows."""
        return self._vocab_size

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: schema.Sampling, *, seeds: Sequence[int]
    ) -> list[Sample]:
        """One response for each prompt, in order; a response depends on its prompt, its seed and the weights alone."""
        parameters = self._parameters(sampling, seeds)
        return [self._sample(*ended) for ended in zip(self._run(prompts, parameters), parameters, strict=True)]

    def start(self, prompts: Sequence[Sequence[int]], sampling: schema.Sampling, *, seeds: Sequence[int]) -> list[int]:
        """Queues the same responses, and gives their numbers, which were never given before; `step` generates them."""
        parameters = self._parameters(sampling, seeds)
        requests = [(list(prompt), one) for prompt, one in zip(prompts, parameters, strict=True)]
        numbers = [self._add(*request) for request in requests]
        self._unfinished.update(zip(numbers, requests, strict=True))
        return numbers

    def step(self) -> list[tuple[int, Sample]]:
        """One step of all that was started; numbers and responses that have ended since the last call."""
        if self._unfinished and not self._ended:
            self._advance()
        ended, self._ended = self._ended, []
        return ended

    def restart(self) -> None:
        """Every response that was started and has not ended begins anew: from its prompt, with its seed."""
        self._llm.llm_engine.abort_request([str(number) for number in self._unfinished])
        for number, request in self._unfinished.items():
            self._add(*request, number=number)

    def _parameters(self, sampling: schema.Sampling, seeds: Sequence[int]) -> list[Any]:
        vllm = _vllm()
        return [
            vllm.SamplingParams(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty,
                min_tokens=sampling.min_new_tokens,
                max_tokens=sampling.max_new_tokens,
                stop=list(sampling.stop),
                stop_token_ids=self._stop_token_ids,
                seed=seed,
                logprobs=0,
                flat_logprobs=True,
                # Text token by token as it comes costs 5 %, and only stop strings need it.
                detokenize=bool(sampling.stop) or not self._tokenizer.is_fast,
            )
            for seed in seeds
        ]

    def prompt_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """For each prompt the log-probability of each token at temperature 1, computed afresh; 0 for the first."""
        # vLLM does not read its prefix cache for these.
        parameters = _vllm().SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        results = self._run(prompts, [parameters] * len(prompts))
        return [[0.0, *result.prompt_logprobs.logprobs] for result in results]

    def next_tokens(self, sequences: Sequence[Sequence[int]], count: int) -> list[list[tuple[int, float]]]:
        """For each sequence the `count` most likely next tokens and their log-probabilities, best first."""
        count = min(count, self._vocab_size)
        parameters = _vllm().SamplingParams(temperature=0.0, max_tokens=1, logprobs=count, detokenize=False)
        found = []
        for result in self._run(sequences, [parameters] * len(sequences)):
            ranked = sorted(result.outputs[0].logprobs[0].items(), key=lambda item: item[1].rank)
            found.append([(int(token), float(value.logprob)) for token, value in ranked[:count]])
        return found

    def _run(self, prompts: Sequence[Sequence[int]], parameters: Sequence[Any]) -> list[Any]:
        """vLLM's results for these requests alone; what was started before goes on meanwhile, but waits its turn."""
        numbers = [self._add(list(prompt), one, priority=-1) for prompt, one in zip(prompts, parameters, strict=True)]
        found: dict[int, Any] = {}
        while len(found) < len(numbers):
            found |= self._advance()
        return [found[number] for number in numbers]

    def _add(self, prompt: list[int], parameters: Any, *, number: int | None = None, priority: int = 0) -> int:
        if number is None:
            number, self._started = self._started, self._started + 1
        parameters.output_kind = _final_only()
        self._llm.llm_engine.add_request(
            str(number),
            {"type": "token", "prompt_token_ids": prompt},
            parameters,
            # vLLM takes the smallest priority first, then the earliest; no clock may decide.
            priority=priority,
            arrival_time=float(number),
            lora_request=self._adapter,
        )
        return number

    def _advance(self) -> dict[int, Any]:
        """One step of vLLM; results, by number, of what was not started by `start`."""
        results = {int(result.request_id): result for result in self._llm.llm_engine.step()}
        for number in sorted(results.keys() & self._unfinished.keys()):
            _, parameters = self._unfinished.pop(number)
            self._ended.append((number, self._sample(results.pop(number), parameters)))
        return results

    def _sample(self, result: Any, parameters: Any) -> Sample:
        output = result.outputs[0]
        token_ids, finished, text = list(output.token_ids), output.finish_reason == "stop", output.text
        if not parameters.detokenize:
            text = self._text(result.prompt_token_ids, token_ids[:-1] if finished else token_ids)
        return Sample(
            token_ids=token_ids,
            logprobs=list(output.logprobs.logprobs),
            finished=finished,
            text=text,
            versions=[int(span.version) for span in output.weight_versions for _ in range(span.start, span.end)],
        )

    def _text(self, prompt: Sequence[int], response: Sequence[int]) -> str:
        """The text that a response adds to its prompt's, as vLLM makes it: half a character at the end is left out."""
        tokenizer = self._tokenizer.backend_tokenizer
        stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
        try:
            return "".join(piece for token in response if (piece := stream.step(tokenizer, token)))
        except Exception:
            # Bytes that are no text can confuse a stream, and its error has no class of its own.
            before = tokenizer.decode(list(prompt), skip_special_tokens=True)
            return str(tokenizer.decode([*prompt, *response], skip_special_tokens=True)[len(before) :])

    def receive(
        self, spec: TransportSpec, version: int, *, first_rank: int, load: bool = True
    ) -> list[ReceivedWeights]:
        """Takes a transfer of weights and loads them; one result per receiver.

        Raises:
            ConfigError: vLLM does not know a layer that the adapter belongs to.
            WeightSyncError: another version arrives, the sender fails, or a deadline passes.
        """
        if self._lora is not None:
            tensors: dict[str, Tensor] = {}
            arrived = self._inbox.take(spec, version, rank=first_rank, load=tensors.update)
            if load:
                self._load_adapter(self._lora, tensors, version)
            self._llm.llm_engine.set_weight_version(str(version))
            return [arrived]
        plain = {"first_rank": first_rank, "version": version, "load": load}
        results = self._llm.collective_rpc("rlhf_receive", args=(spec.as_dict(),), kwargs=plain)
        self._llm.llm_engine.set_weight_version(str(version))
        return [ReceivedWeights(**result) for result in results]

    def _load_adapter(self, lora: schema.Lora, tensors: Mapping[str, Tensor], version: int) -> None:
        """Puts the adapter into vLLM's one place for it, under an id and a name that were never used before.

        Its prefix cache knows an adapter by its name and path, its workers by the id. Unfinished responses hold on to
        the id that they began with: its adapter is replaced.
        """
        under_way = bool(self._unfinished) and self._adapter is not None
        self._loads += not under_way
        with adapter_files(lora, tensors, base=self._model) as path:
            adapter = _lora_request()(f"policy@{version}", self._loads, str(path), load_inplace=under_way)
            try:
                self._llm.llm_engine.add_lora(adapter)
            except ValueError as error:
                raise ConfigError(
                    f"policy.lora: vLLM cannot use this adapter ({error}); choose other target_modules, or set "
                    "generator.engine=hf"
                ) from error
        if not under_way:
            self._adapter = adapter

    def reset_prefix_cache(self) -> None:
        """Forgets keys and values of the weights before; those of unfinished responses are computed anew.

        Raises:
            WeightSyncError: the cache is in use.
        """
        if not self._llm.reset_prefix_cache(reset_running_requests=bool(self._unfinished)):
            raise WeightSyncError("the engine's prefix cache cannot be reset while requests are running")

    def sleep(self, *, keep_weights: bool) -> None:
        """Gives the GPU's memory back, weights and prefix cache with it; on a CPU vLLM cannot, and nothing is moved."""
        if self._sleeps:
            # Level 1 keeps the weights in host memory, level 2 the buffers alone.
            self._llm.sleep(level=1 if keep_weights or self._lora is not None else 2)

    def wake(self, part: EnginePart) -> None:
        """Takes memory for this part again; vLLM goes on when both are there."""
        if self._sleeps:
            self._llm.wake_up(tags=[_SLEEP_TAGS[part]])

    def memory_gib(self) -> float:
        """Peak memory so far: the GPUs' where there are any, else the process's."""
        if torch.cuda.is_available():
            return float(sum(self._llm.collective_rpc("rlhf_peak_memory"))) / 2**30
        return peak_memory_gib()

    def close(self) -> None:
        """Ends the engine and its workers, and frees its memory; may be called again."""
        self._inbox.close()
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            gc.collect()


def _start(arguments: Mapping[str, Any], config: schema.Generator, model: PretrainedConfig, *, gpu: bool) -> Any:
    for name, value in engine_environment(config, gpu=gpu).items():
        os.environ.setdefault(name, value)
    vllm = _vllm()
    try:
        if not gpu:
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
            _import_architecture(model)
            if not config.compile:
                arguments = {**arguments, "ir_op_priority": _norms()}
        return vllm.LLM(**arguments)
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"{arguments['model']}: vLLM cannot run this model: {error}") from error


def _import_architecture(model: PretrainedConfig) -> None:
    """Imports vLLM's class for the model here; else vLLM does so in another process, which takes 7 s."""
    registry = _vllm().ModelRegistry
    for name in model.architectures or []:
        entry = registry.models.get(name)
        if hasattr(entry, "load_model_cls"):
            registry.register_model(name, entry.load_model_cls())


def _arguments(config: schema.Generator, model: PretrainedConfig, *, max_model_len: int, gpu: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "dtype": config.dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_sequences,
        "tensor_parallel_size": config.tensor_parallel,
        "distributed_executor_backend": "mp" if config.tensor_parallel > 1 else "uni",
        "enforce_eager": not config.compile,
        "enable_prefix_caching": config.prefix_caching,
        "scheduling_policy": "priority",
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": -1,
        "generation_config": "vllm",
        "worker_extension_cls": _EXTENSION,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "trust_remote_code": False,
        "seed": 0,
    }
    if not gpu:
        arguments["block_size"] = _CPU_BLOCK
        # A prompt in two parts rewinds its sample's generator, which a CPU's cannot.
        arguments["enable_chunked_prefill"] = False
        arguments["scheduler_cls"] = _SCHEDULER
        # Prompts of one step stay in the processor's caches: half as fast again as vLLM's 8192 tokens.
        arguments["max_num_batched_tokens"] = max(_CPU_STEP_TOKENS, max_model_len, config.max_sequences)
        arguments["kv_cache_memory_bytes"] = cache_bytes(config, model, max_model_len=max_model_len)
    elif config.kv_cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
    else:
        arguments["gpu_memory_utilization"] = config.memory_share
    if gpu:
        arguments["enable_sleep_mode"] = config.sleep
    return arguments


def _adapter_arguments(lora: schema.Lora, layers: Sequence[str]) -> dict[str, Any]:
    """Room for one adapter: loading the next one drops it. Other layers are left as fast as they were."""
    rank = next(rank for rank in ADAPTER_RANKS if rank >= lora.rank)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank, "lora_target_modules": list(layers)}


def _check_takes_adapters(name: str, model: PretrainedConfig) -> None:
    """Raises ConfigError where vLLM has no adapters for this architecture."""
    registry = _vllm().ModelRegistry
    for architecture in model.architectures or []:
        entry = registry.models.get(architecture)
        if hasattr(entry, "load_model_cls") and not getattr(entry.load_model_cls(), "supports_lora", False):
            raise ConfigError(
                f"{name}: vLLM has no adapters for {architecture}; set generator.engine=hf, or remove policy.lora"
            )


def _final_only() -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.FINAL_ONLY


def _norms() -> Any:
    from rlhf_ray.engines.vllm_kernels import PRIORITY

    return PRIORITY


def _lora_request() -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest


@cache
def _vllm() -> Any:
    # vLLM runs `lscpu` and finds other programs of the virtual environment by PATH.
    folder = str(Path(sys.executable).parent)
    if folder not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", "")])
    try:
        import vllm
    except ImportError as error:
        raise InstallError(
            f"vLLM cannot be imported ({error}); `rlhf-ray doctor` gives the line that installs it for this machine"
        ) from error
    return vllm
