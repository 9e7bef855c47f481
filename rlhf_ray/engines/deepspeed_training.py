"""Training with DeepSpeed: ZeRO 0 to 3 on CPU or GPU. The only file that imports deepspeed.

The engine is given a loss that is already divided by the global count of its unit; it averages
gradients over ranks as DeepSpeed does, so the loss carries the number of ranks as a factor.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from rlhf_ray.config import schema
from rlhf_ray.engines.host_copies import HostCopies, held_tensors
from rlhf_ray.errors import CheckpointError

# transformers may import DeepSpeed before this file does, and DeepSpeed warns where it has to guess.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

_TAG = "state"
REDUCE_ELEMENTS = 50_000_000
"""Most elements of the buckets that gradients and weights are exchanged in."""


def join_process_group(*, rank: int, size: int, timeout_s: float) -> torch.device:
    """Makes this process rank `rank` of `size`, and gives the device to train on.

    More than one rank meet at MASTER_ADDR:MASTER_PORT of the environment (gloo on CPU, NCCL on GPU).
    Calling it again in the same process keeps the group it has.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if dist.is_initialized():
        assert dist.get_world_size() == size, f"this process is one of {dist.get_world_size()} ranks, wanted {size}"
    else:
        os.environ.setdefault("LOCAL_RANK", "0")
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(size)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=HashStore() if size == 1 else None,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
        )
    _deepspeed().init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )
    return device


def learning_rate(settings: schema.Optimizer, *, step: int, total_steps: int) -> float:
    """Learning rate of the optimizer step number `step`, counted from 0.

    It rises over the warm-up so that step `warmup_steps` is the first with the full rate; linear and cosine then
    fall so that step total_steps - 1 has final_ratio of it.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    match settings.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1.0 - progress
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (settings.final_ratio + (1.0 - settings.final_ratio) * share)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: matrices decay, vectors (biases, norms) do not."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class TrainingEngine:
    """A network, its optimizer, and their shards on this rank.

    Args:
        module: the network, on the CPU; its forward takes and gives tensors (tuples allowed).
        settings: the learner's section of the pipeline file.
        device: where to train, of `join_process_group`.
        total_steps: optimizer steps of the whole stage, for the schedule.
    """

    def __init__(self, module: nn.Module, *, settings: schema.Learner, device: torch.device, total_steps: int) -> None:
        self.settings = settings
        self.device = device
        self.total_steps = total_steps
        self.stage = effective_stage(settings)
        self.steps = 0
        self.skipped_steps = 0
        self._trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._has_frozen = any(not parameter.requires_grad for parameter in module.parameters())
        if self._has_frozen:
            _leave_out_frozen(module, self._trained)
        optimizer = torch.optim.AdamW(
            decay_groups(module, settings.optimizer.weight_decay),
            lr=settings.optimizer.learning_rate,
            betas=settings.optimizer.betas,
            eps=settings.optimizer.eps,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self._engine: Any = _deepspeed().initialize(
                model=module,
                optimizer=optimizer,
                config=_config(settings, self.stage, module),
                dist_init_required=False,
            )[0]
        self._engine.checkpoint_engine.load = _load_safely
        # On a CPU host memory is all there is.
        self.moves_states = device.type == "cuda"
        self._weights, self._states = HostCopies(), HostCopies()
        self._away: tuple[str, ...] = ()

    @property
    def module(self) -> nn.Module:
        """The network; with ZeRO 3 its parameters are empty outside a forward pass."""
        module: nn.Module = self._engine.module
        return module

    def forward(self, *inputs: Any) -> Any:
        """The network's outputs."""
        self._check_here("weights")
        return self._engine(*inputs)

    def train(self, mode: bool) -> None:
        """Switches between training (True) and evaluation mode."""
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Adds the loss's gradients; every rank must call it equally often between two steps."""
        self._check_here("states")
        with _quiet():
            self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> tuple[float, float]:
        """One optimizer step over the gradients gathered so far -> (gradient norm before clipping, learning rate).

        A gradient that is not finite skips the step (weights and moments stay) and counts in `skipped_steps`; the norm
        is then nan.
        """
        self._check_here("states")
        rate = learning_rate(self.settings.optimizer, step=self.steps, total_steps=self.total_steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        with _quiet():
            norm = self._step_unsharded() if self.stage == 0 else self._step_sharded()
        self.steps += 1
        if not math.isfinite(norm):
            self.skipped_steps += 1
            return math.nan, rate
        return norm, rate

    def _step_sharded(self) -> float:
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else math.nan

    def _step_unsharded(self) -> float:
        # At stage 0 DeepSpeed neither reports a norm nor looks for overflow, so both are done here.
        self._engine.buffered_allreduce_fallback(elements_per_buffer=REDUCE_ELEMENTS)
        learnt = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in learnt if p.grad is not None])
        if not bool(norm.isfinite()):
            self._engine.zero_grad()
            return math.nan
        clip = self.settings.optimizer.gradient_clip
        if clip > 0:
            torch.nn.utils.clip_grads_with_norm_(learnt, clip, norm)
        self._engine.enable_backward_allreduce = False
        self._engine.step()
        return float(norm)

    def buckets(self, owned: Mapping[str, Tensor], *, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """Weights of the network in buckets of about bucket_bytes.

        Every rank must iterate to the end; each gets the full tensors, gathered one bucket at a time, valid until the
        next one.

        Args:
            owned: the network's own tensors by the names that they are to have.
        """
        self._check_here("weights")
        bucket: list[str] = []
        filled = 0
        for name, tensor in owned.items():
            size = _numel(tensor) * tensor.element_size()
            if bucket and filled + size > bucket_bytes:
                yield from self._gathered(bucket, owned)
                bucket, filled = [], 0
            bucket.append(name)
            filled += size
        if bucket:
            yield from self._gathered(bucket, owned)

    def _gathered(self, names: Sequence[str], owned: Mapping[str, Tensor]) -> Iterator[list[tuple[str, Tensor]]]:
        sharded = list({id(owned[name]): owned[name] for name in names if hasattr(owned[name], "ds_id")}.values())
        context = _deepspeed().zero.GatheredParameters(sharded) if sharded else nullcontext()
        with context:
            yield [(name, owned[name].detach()) for name in names]

    def nbytes(self, owned: Mapping[str, Tensor]) -> int:
        """Bytes of these weights in full, however they are sharded."""
        return sum(_numel(tensor) * tensor.element_size() for tensor in owned.values())

    def save(self, directory: Path) -> None:
        """Writes this rank's shard of weights, optimizer and counters; every rank calls it with the same directory.

        Frozen weights are left out.
        """
        self._check_here("weights", "states")
        self._engine.save_checkpoint(
            str(directory),
            tag=_TAG,
            client_state={"rlhf_ray": [self.steps, self.skipped_steps]},
            save_latest=False,
            exclude_frozen_parameters=self._has_frozen,
        )

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote.

        Raises:
            CheckpointError: nothing there, or not of this ZeRO stage and number of ranks.
        """
        self._check_here("weights", "states")
        if not (directory / _TAG).is_dir():
            raise CheckpointError(f"{directory}: no learner state here; wanted a folder written by Learner.save")
        try:
            path, client = self._engine.load_checkpoint(str(directory), tag=_TAG, custom_load_fn=self._load_weights)
        except Exception as error:
            raise CheckpointError(
                f"{directory}: this learner state does not fit ZeRO stage {self.stage} "
                f"and {dist.get_world_size()} workers: {error}"
            ) from error
        if path is None:
            raise CheckpointError(f"{directory}: the learner state is incomplete")
        self.steps, self.skipped_steps = client["rlhf_ray"]

    def _load_weights(self, src: Mapping[str, Any], dst: nn.Module) -> None:
        if self._has_frozen and src.keys() != self._trained:
            raise ValueError("its weights are not those that are trained here")
        dst.load_state_dict(src, strict=not self._has_frozen)

    def offload(self, *, keep_weights: bool = False) -> None:
        """Moves gradients, optimizer states and master weights into host memory, and the weights unless they are kept.

        On a CPU nothing is moved. DeepSpeed's own `offload_states` is not used: it knows no stage 0, at stage 3 no
        optimizer but its own, and it leaves AdamW's step counters on the GPU.
        """
        self._away = ("states",) if keep_weights and "weights" not in self._away else ("states", "weights")
        if not self.moves_states:
            return
        if self.stage == 3:
            self._engine.empty_partition_cache()
        tensors = [*self.module.parameters(), *self.module.buffers()]
        weights = tensors + [tensor.ds_tensor for tensor in tensors if hasattr(tensor, "ds_tensor")]
        held = held_tensors(tensors, self._engine.optimizer, packages=("deepspeed", "torch"))
        self._states.offload(held, device=self.device, but=weights)
        if "weights" in self._away:
            self._weights.offload(weights, device=self.device)

    def reload(self) -> None:
        """Brings back what is in host memory, bit for bit."""
        self._weights.reload()
        self._states.reload()
        self._away = ()

    def _check_here(self, *parts: str) -> None:
        missing = [part for part in parts if part in self._away]
        assert not missing, f"the learner's {' and '.join(missing)} are in host memory; `reload` comes first"

    def close(self) -> None:
        """Frees the engine's hooks and buffers; the process group stays."""
        self._engine.destroy()


def effective_stage(settings: schema.Learner) -> int:
    """ZeRO stage that is run: at least 2 with bfloat16.

    Below it DeepSpeed either accumulates gradients in bfloat16 or takes steps that are not finite.
    """
    return max(settings.zero, 2) if settings.dtype == "bfloat16" else settings.zero


def _leave_out_frozen(module: nn.Module, trained: Set[str]) -> None:
    """Lets state_dict give what is trained only; DeepSpeed's own way overlooks the second name of tied weights."""

    def keep(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        for name in [name for name in state if name.removeprefix(prefix) not in trained]:
            del state[name]

    module.register_state_dict_post_hook(keep)  # type: ignore[no-untyped-call]


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _config(settings: schema.Learner, stage: int, module: nn.Module) -> dict[str, Any]:
    trained = _bucket_elements(parameter for parameter in module.parameters() if parameter.requires_grad)
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "reduce_bucket_size": trained,
        "allgather_bucket_size": trained,
    }
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 10_000,
            "stage3_prefetch_bucket_size": _bucket_elements(module.parameters()),
        }
    if settings.cpu_offload and stage > 0:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": settings.optimizer.gradient_clip if stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if settings.dtype == "bfloat16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return config


def _bucket_elements(parameters: Iterable[Tensor]) -> int:
    # DeepSpeed allocates whole buckets, so a small model gets small ones; their size must be even.
    return min(REDUCE_ELEMENTS, 2 * math.ceil(sum(parameter.numel() for parameter in parameters) / 2))


@cache
def _deepspeed() -> Any:
    with _quiet():
        import deepspeed

    # Without this init_distributed compiles a C++ extension that training does not use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    return deepspeed


class _quiet(warnings.catch_warnings):  # noqa: N801
    """Hides the deprecation notices that DeepSpeed's collectives draw from torch."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")


def _load_safely(path: str, map_location: Any = None) -> Any:
    """Reads a checkpoint file of DeepSpeed without running what may be hidden in it."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([fragment_address, ZeroStageEnum, LossScaler]):
        return torch.load(path, map_location=map_location, weights_only=True)
