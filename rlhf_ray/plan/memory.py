"""Memory of every worker at its peak, from config.json and the settings: what it is made of, and whether it fits.

The parts follow from what the code holds at once: torch's AdamW and DeepSpeed's ZeRO copies, one micro-batch of the
longest rows, the chunks of logits of `algorithms.logprobs`, the pages of a sync, an engine's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from rlhf_ray.algorithms.logprobs import CHUNK_BYTES
from rlhf_ray.config import schema
from rlhf_ray.config.role_rules import reward_names
from rlhf_ray.data.packing import token_budget
from rlhf_ray.distributed.wires import shared_bytes
from rlhf_ray.engines.deepspeed_training import REDUCE_ELEMENTS, effective_stage
from rlhf_ray.engines.vllm_generation import cache_bytes
from rlhf_ray.models.loading import torch_dtype
from rlhf_ray.plan.arithmetic import StageArithmetic, longest_row
from rlhf_ray.plan.cluster import ClusterShape
from rlhf_ray.plan.networks import Kind, Network, model_config, network
from rlhf_ray.plan.placement import RolePlacement, StagePlacement

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GIB = 2**30
RESERVE_GIB = {
    "cpu": {"learner": 0.55, "scorer": 0.53, "function": 0.33, "generator": 0.85},
    "cuda": {"learner": 1.5, "scorer": 1.0, "function": 0.0, "generator": 1.5},
}
"""What a worker takes before it holds a model. On a CPU the resident memory of workers of runs with a model of 1 M
parameters, less their model: libraries, Ray, DeepSpeed or vLLM. On a GPU an assumption, not a measurement: CUDA's
context, NCCL's buffers, kernels and fragments."""
DRIVER_GIB = 1.0
"""The driver and Ray's own processes on the first node."""
_LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's default of the parameters that ZeRO 3 holds gathered at once."""
_SHARED_MEMORY = 0.5
"""Share of a node's memory that Linux gives to /dev/shm."""
_NF4_BYTES = 0.5 + 4 / 64
"""A weight in 4 bits, and its part of the scale of its block of 64."""


@dataclass(frozen=True)
class RoleMemory:
    """One worker of a role at its peak.

    Args:
        role: its name.
        device: where its model lies: `GPU`, or `host`.
        parts: GiB by what they are for; those of a GPU role are on each of its GPUs.
        host: GiB that a GPU role takes in host memory besides.
        room: GiB that each of its GPUs has for it; None where that is not known, and for roles in host memory.
        note: what the engine's cache holds.
        advice: the setting that helps most where it does not fit.
    """

    role: str
    device: str
    parts: dict[str, float]
    host: float
    room: float | None
    note: str
    advice: str | None

    @property
    def total(self) -> float:
        """GiB of all parts."""
        return sum(self.parts.values())

    @property
    def in_host_memory(self) -> float:
        """GiB that a worker takes in its node's memory, wherever its model lies."""
        return self.host + (self.total if self.device == "host" else 0.0)

    @property
    def fits(self) -> bool | None:
        """Whether the GPU has room for it; None where that is not known."""
        return None if self.room is None else self.total <= self.room


@dataclass(frozen=True)
class SharedMemory:
    """One GPU that workers of several roles share, at the moment when they take most of it.

    Args:
        roles: whose workers share it.
        moment: when that is, as in `gpu_turns`; empty where no generator is among them.
        total: GiB of all of them together then.
        room: GiB that the GPU has for them; None where that is not known.
        advice: the setting that helps most where it does not fit.
    """

    roles: tuple[str, ...]
    moment: str
    total: float
    room: float | None
    advice: str | None

    @property
    def fits(self) -> bool | None:
        """Whether the GPU has room for all of them; None where that is not known."""
        return None if self.room is None else self.total <= self.room


@dataclass(frozen=True)
class StageMemory:
    """What the workers of a stage that run at one time take.

    Args:
        stage: the stage's name.
        while_: what happens then.
        roles: in the order of the placement.
        shared: the GPUs that several roles share.
        host: GiB in host memory of the node that has most, driver and Ray included.
        host_room: GiB that a node has; None where that is not known.
        advice: the setting that helps most where a node has too little.
    """

    stage: str
    while_: str
    roles: tuple[RoleMemory, ...]
    shared: tuple[SharedMemory, ...]
    host: float
    host_room: float | None
    advice: str | None

    @property
    def fits(self) -> bool | None:
        """Whether every GPU and every node has room; None where that is not known."""
        verdicts = [*(role.fits for role in self.roles), *(shared.fits for shared in self.shared)]
        known = [fits for fits in verdicts if fits is not None]
        if self.host_room is not None:
            known.append(self.host <= self.host_room)
        return all(known) if known else None


@dataclass(frozen=True)
class _Role:
    """A role and how its memory follows from its settings.

    Args:
        section: its key in the stage.
        settings: its section of the pipeline file.
        parts: settings -> bytes by what they are for, and bytes in host memory besides.
        tries: changes of its settings that may help.
    """

    section: str
    settings: Any
    placed: RolePlacement
    parts: Callable[[Any], tuple[dict[str, float], float]]
    tries: tuple[dict[str, Any], ...]


def plan_memory(
    config: schema.Pipeline,
    stage: schema.Stage,
    placement: StagePlacement,
    numbers: StageArithmetic,
    cluster: ClusterShape,
) -> StageMemory:
    """The memory of what a stage reserves at one time.

    Raises:
        ConfigError: a model's config.json cannot be read, or is of an architecture that is not known.
    """
    planner = _Planner(config, stage, placement, numbers, cluster)
    entries = [planner.role(placed) for placed in placement.roles]
    roles = [planner.memory(entry) for entry in entries]
    shared = tuple(planner.shared(entries, roles))
    host = planner.host(roles)
    advice = None
    if cluster.host_gib is not None and host > cluster.host_gib:
        on_host = [entry for entry, role in zip(entries, roles, strict=True) if role.device == "host"]
        advice = _best([found for entry in on_host for found in planner.savings(entry)], host - cluster.host_gib)
    return StageMemory(placement.stage, placement.while_, tuple(roles), shared, host, cluster.host_gib, advice)


class _Planner:
    def __init__(
        self,
        config: schema.Pipeline,
        stage: schema.Stage,
        placement: StagePlacement,
        numbers: StageArithmetic,
        cluster: ClusterShape,
    ) -> None:
        self._config, self._stage, self._placement = config, stage, placement
        self._numbers, self._cluster = numbers, cluster
        self._longest = longest_row(stage)
        names = {role.role for role in placement.roles}
        self._syncs = {"policy", "generator"} <= names

    # ----------------------------------------------------------------------------------- roles

    def role(self, placed: RolePlacement) -> _Role:
        """A role of the placement with its settings."""
        stage: Any = self._stage
        if placed.role in ("policy", "critic"):
            settings = stage.policy if placed.role == "policy" else stage.critic_role
            return _Role(
                placed.role, settings, placed, lambda s: self._learner(placed, s), self._learner_tries(placed, settings)
            )
        if placed.role == "generator":
            tries: list[dict[str, Any]] = [{"dtype": "bfloat16"}]
            if placed.share.gpus:
                tries += [{"tensor_parallel": 2 * stage.generator.tensor_parallel}, {"memory_share": 0.95}]
            else:
                tries.append({"max_sequences": max(1, stage.generator.max_sequences // 4)})
            return _Role("generator", stage.generator, placed, lambda s: self._generator(placed, s), tuple(tries))
        section, settings = "reference", getattr(stage, "reference", None)
        if placed.role != "reference":
            names = [f"reward/{name}" for name in reward_names(stage.reward)]
            section = f"reward.{names.index(placed.role)}"
            settings = stage.reward[names.index(placed.role)]
        tries = []
        if not isinstance(settings, schema.FunctionReward):
            assert settings is not None, "a scorer has settings"
            fewer = max(self._longest, token_budget(settings.micro_batch_tokens, _device(placed)) // 4)
            tries = [{"dtype": "bfloat16"}, {"micro_batch_tokens": fewer}]
        return _Role(section, settings, placed, lambda s: self._scorer(placed, s), tuple(tries))

    def _learner_tries(self, placed: RolePlacement, settings: schema.Learner) -> tuple[dict[str, Any], ...]:
        learner = self._numbers.learners[placed.role]
        fewer = max(learner.row_tokens, token_budget(settings.micro_batch_tokens, _device(placed)) // 4)
        tries: list[dict[str, Any]] = [
            {"activation_checkpointing": True},
            {"micro_batch_tokens": fewer},
            {"dtype": "bfloat16"},
        ]
        if placed.workers > 1:
            tries += [{"zero": 2}, {"zero": 3}]
        if placed.share.gpus:
            tries.append({"zero": max(1, settings.zero), "cpu_offload": True})
        return tuple(tries)

    # ----------------------------------------------------------------------------------- parts

    def _learner(self, placed: RolePlacement, settings: schema.Learner) -> tuple[dict[str, float], float]:
        stage: Any = self._stage
        kind: Kind = "critic"
        if placed.role == "policy":
            joint = isinstance(stage, schema.Ppo) and stage.critic_role and stage.critic_role.kind == "value_head"
            kind = "language_model_and_critic" if joint else "language_model"
            kind = "classifier" if isinstance(stage, schema.RewardModel) else kind
        numbers, device = self._numbers.learners[placed.role], _device(placed)
        net = self._network(settings.model, settings.revision, kind, settings.dtype, device, settings.lora)
        rows = math.ceil(max(self._numbers.mini_batches) / placed.workers)
        if settings.micro_batch_sequences is not None:
            together = max(1, round(numbers.row_tokens / self._longest))
            rows = min(rows, max(1, settings.micro_batch_sequences // together))
        tokens = _tokens(settings.micro_batch_tokens, device, rows=rows, longest=numbers.row_tokens)
        parts, host = learner_parts(net, settings, workers=placed.workers, tokens=tokens, device=device.type)
        if placed.role == "policy" and self._syncs:
            parts["sync"] = self._sync(net, settings.lora, settings.dtype, device, sender=True)
        return parts, host

    def _scorer(self, placed: RolePlacement, settings: Any) -> tuple[dict[str, float], float]:
        device = _device(placed)
        if isinstance(settings, schema.FunctionReward):
            return {"reserve": RESERVE_GIB[device.type]["function"] * GIB}, 0.0
        kind: Kind = "language_model" if isinstance(settings, schema.Reference) else "classifier"
        net = self._network(settings.model, settings.revision, kind, settings.dtype, device)
        rows = math.ceil(self._numbers.samples / placed.workers) if self._numbers.samples else 2**30
        tokens = _tokens(settings.micro_batch_tokens, device, rows=rows, longest=self._longest)
        host = float(net.parameters) * torch_dtype(settings.dtype).itemsize if device.type == "cuda" else 0.0
        return scorer_parts(net, settings.dtype, tokens=tokens, device=device.type), host

    def _generator(self, placed: RolePlacement, settings: schema.Generator) -> tuple[dict[str, float], float]:
        device = _device(placed)
        net = self._network(None, None, "language_model", settings.dtype, device)
        split = settings.tensor_parallel
        width = torch_dtype(settings.dtype).itemsize
        parts = {"weights": net.parameters * width / split}
        if device.type == "cpu":
            # The pages of the model's file that the engine has read stay resident beside its weights.
            parts["file"] = parts["weights"]
            parts["cache"] = float(cache_bytes(settings, self._model(None, None), max_model_len=self._longest))
        if self._syncs:
            policy: Any = self._stage.policy
            parts["sync"] = self._sync(net, policy.lora, policy.dtype, device, sender=False)
        if device.type == "cuda":
            # vLLM holds the logits of all sequences in float32, with their softmax and what is sorted.
            parts["logits"] = 3.0 * settings.max_sequences * net.vocabulary * 4
            parts["cache"] = self._cache(placed, settings, net, taken=sum(parts.values()))
        parts["reserve"] = RESERVE_GIB[device.type]["generator"] * GIB
        return parts, 0.0

    def _cache(self, placed: RolePlacement, settings: schema.Generator, net: Network, *, taken: float) -> float:
        """Bytes of keys and values on a GPU: the setting, what is left, or without a cluster what is asked for."""
        if settings.kv_cache_gib is not None:
            return settings.kv_cache_gib * GIB
        one = self._one_sequence(settings, net)
        budget = self._budget(placed, settings)
        if budget is None:
            return one * self._concurrent(placed, settings)
        reserve = RESERVE_GIB["cuda"]["generator"] * GIB
        return max(one, budget * GIB - taken - reserve)

    def _one_sequence(self, settings: schema.Generator, net: Network) -> float:
        width = torch_dtype(settings.dtype).itemsize
        return net.key_value_elements * width * self._longest / settings.tensor_parallel

    def _concurrent(self, placed: RolePlacement, settings: schema.Generator) -> int:
        samples = self._numbers.samples or settings.max_sequences
        return min(settings.max_sequences, math.ceil(samples / placed.workers))

    def _budget(self, placed: RolePlacement, settings: schema.Generator) -> float | None:
        """GiB that an engine may use of each of its GPUs."""
        if self._cluster.gpu_gib is None:
            return None
        # As `own_part` has it: engines that sleep have the whole GPU while they sample.
        part = 1.0 if settings.sleep else min(1.0, placed.room.gpus or 1.0)
        return self._cluster.gpu_gib * settings.memory_share * part

    def _sync(
        self, net: Network, lora: schema.Lora | None, dtype: schema.DType, device: torch.device, *, sender: bool
    ) -> float:
        """Bytes of the buffers that weights travel through."""
        bucket = self._config.placement.bucket_mib << 20
        width = torch_dtype(dtype).itemsize
        sent = net.parameters * width if lora is None else net.trained * width
        if device.type == "cuda":
            return float(min(2 * bucket if sender else bucket, sent))
        room = math.inf if self._cluster.host_gib is None else self._cluster.host_gib * GIB * _SHARED_MEMORY
        return float(shared_bytes(bucket, sent, room))

    def _network(
        self,
        name: str | schema.NewModel | None,
        revision: str | None,
        kind: Kind,
        dtype: schema.DType,
        device: torch.device,
        lora: schema.Lora | None = None,
    ) -> Network:
        return network(
            self._model(name, revision),
            kind,
            dtype=dtype,
            lora=lora,
            row_tokens=self._longest,
            device="cuda" if device.type == "cuda" else "cpu",
        )

    def _model(self, name: str | schema.NewModel | None, revision: str | None) -> PretrainedConfig:
        """The configuration of a model, or of the policy's where none is named."""
        if name is None:
            name, revision = self._stage.policy.model, self._stage.policy.revision
        return model_config(self._config, name, revision)

    # --------------------------------------------------------------------------------- verdict

    def memory(self, entry: _Role) -> RoleMemory:
        """A role with its verdict."""
        placed = entry.placed
        parts, host = entry.parts(entry.settings)
        gpu = bool(placed.share.gpus)
        room = None
        if gpu and self._cluster.gpu_gib is not None:
            room = self._cluster.gpu_gib * min(1.0, placed.room.gpus)
            if entry.section == "generator":
                room = self._budget(placed, entry.settings)
        found = RoleMemory(
            role=placed.role,
            device="GPU" if gpu else "host",
            parts={name: value / GIB for name, value in parts.items() if value},
            host=host / GIB + (RESERVE_GIB["cpu"]["scorer"] if gpu else 0.0),
            room=room,
            note=self._cache_note(entry, parts) if entry.section == "generator" else "",
            advice=None,
        )
        if found.fits is not False:
            return found
        assert room is not None, "what does not fit has too little room"
        return replace(found, advice=_best(self.savings(entry), found.total - room))

    def shared(self, entries: list[_Role], roles: list[RoleMemory]) -> Iterator[SharedMemory]:
        """The GPUs that several roles share, which take turns where their settings say so."""
        by_host: dict[str, list[tuple[_Role, RoleMemory]]] = {}
        for entry, role in zip(entries, roles, strict=True):
            if role.device == "GPU":
                by_host.setdefault(entry.placed.shares_with or entry.placed.role, []).append((entry, role))
        for members in by_host.values():
            if len(members) < 2:
                continue
            parts = {role.role: role.parts for _, role in members}
            settings = {role.role: entry.settings for entry, role in members}
            moments = _turns(parts, settings)
            moment = max(moments, key=lambda name: moments[name])
            total, room = moments[moment], None
            if self._cluster.gpu_gib is not None:
                room = self._cluster.gpu_gib * min(1.0, members[0][0].placed.room.gpus)
            advice = None
            if room is not None and total > room:
                found = [saving for entry, _ in members for saving in self.savings(entry)]
                for section, name in (("generator", "sleep"), ("policy", "offload"), ("critic", "offload")):
                    if section in settings and not getattr(settings[section], name):
                        changed = settings | {section: settings[section].model_copy(update={name: True})}
                        found.append((total - max(_turns(parts, changed).values()), f"{section}.{name}=true"))
                advice = _best(found, total - room)
            takes_turns = "generator" in settings and moments["learning"] != moments["sampling"]
            yield SharedMemory(tuple(parts), moment if takes_turns else "", total, room, advice)

    def _cache_note(self, entry: _Role, parts: Mapping[str, float]) -> str:
        settings = entry.settings
        net = self._network(None, None, "language_model", settings.dtype, _device(entry.placed))
        wanted = self._concurrent(entry.placed, settings)
        holds = int(parts["cache"] / self._one_sequence(settings, net))
        return f"its cache holds {min(holds, wanted)} of {wanted} sequences of {self._longest} tokens at once"

    def savings(self, entry: _Role) -> list[tuple[float, str]]:
        """GiB that each change of its settings saves, over all workers in host memory, and how it is written."""
        before = sum(entry.parts(entry.settings)[0].values())
        found = []
        for change in entry.tries:
            after = sum(entry.parts(entry.settings.model_copy(update=change))[0].values())
            text = " ".join(f"{entry.section}.{key}={yaml_text(value)}" for key, value in change.items())
            times = 1 if entry.placed.share.gpus else entry.placed.workers
            found.append((times * (before - after) / GIB, text))
        return found

    def host(self, roles: list[RoleMemory]) -> float:
        """GiB in host memory of the node that has most."""
        each: dict[int, float] = {0: DRIVER_GIB}
        for memory, placed in zip(roles, self._placement.roles, strict=True):
            for node, workers in (placed.nodes or {0: placed.workers}).items():
                each[node] = each.get(node, 0.0) + workers * memory.in_host_memory
        return max(each.values())


def _turns(parts: Mapping[str, Mapping[str, float]], settings: Mapping[str, Any]) -> dict[str, float]:
    """GiB of a GPU that roles share at each moment, under their settings."""
    leaving = [role for role, own in settings.items() if getattr(own, "offload", False)]
    sleeps = "generator" in settings and settings["generator"].sleep
    return gpu_turns(parts, sleeps=sleeps, leaving=leaving)


def learner_parts(
    net: Network, settings: schema.Learner, *, workers: int, tokens: int, device: str
) -> tuple[dict[str, float], float]:
    """Bytes of a learner by what they are for, and bytes in host memory besides.

    Args:
        net: its network.
        settings: its section of the pipeline file.
        workers: that share what ZeRO shards.
        tokens: of the largest micro-batch.
        device: cpu or cuda.
    """
    stage, width = effective_stage(settings), torch_dtype(settings.dtype).itemsize
    bucket = float(min(net.trained, REDUCE_ELEMENTS)) * width
    weights = float(net.parameters) * width
    if settings.lora is not None and settings.lora.quantise == "nf4":
        weights -= net.quantisable * (width - _NF4_BYTES)
    if stage == 3:
        weights = weights / workers + min(net.parameters, _LIVE_ELEMENTS) * width
    trained = float(net.trained)
    part = trained / workers
    # Without sharding AdamW has two moments; ZeRO adds float32 copies of the weights that it trains.
    optimizer = 8 * trained if stage == 0 else 12 * part
    match stage:
        case 0:
            gradients = trained * width
        case 1:
            gradients = trained * width + 4 * part
        case _:
            gradients = 2 * 4 * part
    # A model is read into host memory first, as a whole by every worker.
    host = float(net.parameters) * width if device == "cuda" else 0.0
    kept = 0.0
    if settings.cpu_offload and stage > 0:
        kept, optimizer = optimizer + 4 * part, 0.0
        host = max(host, kept)
        gradients = trained * width if stage == 1 else bucket
    if settings.offload and device == "cuda":
        host = max(host, kept + weights + gradients + optimizer)
    activations = net.kept_per_token * tokens
    layer = activations / net.layers
    if settings.activation_checkpointing:
        activations = float(net.layers * net.hidden * width * tokens) + layer
    # The gradients of one layer's activations lie beside what is kept.
    activations += layer
    logits = _logits(net, width, tokens=tokens, device=device) + float(net.vocabulary * net.hidden * width)
    # A step's flat buffers are there when the activations are gone.
    buckets = max(0.0, bucket * (1 if stage == 0 else 2) - activations - logits)
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "logits": logits if net.vocabulary else 0.0,
        "buckets": buckets,
        "reserve": RESERVE_GIB[device]["learner"] * GIB,
    }
    return parts, host


def gpu_turns(
    roles: Mapping[str, Mapping[str, float]], *, sleeps: bool, leaving: Collection[str] = ()
) -> dict[str, float]:
    """GiB that roles take on a GPU which they share by turns, at each moment of an iteration; the largest must fit.

    The moments are those of `trainers.turns`: `sampling`, with the scoring of an evaluation; `transfer`, with the
    learners there and the generator's weights alone awake; `proof`, with the policy's weights beside the awake
    generator; and `learning`, with scoring.

    Args:
        roles: parts by role, as in RoleMemory, of all workers on the GPU.
        sleeps: whether the generator gives its memory back while the learners train.
        leaving: the learners that wait in host memory while the generator samples.
    """
    learners = roles.keys() & {"policy", "critic"}

    def taken(role: str, *parts: str) -> float:
        return sum(value for name, value in roles[role].items() if name in ("reserve", "sync", *parts))

    def learner(role: str, *kept: str) -> float:
        return taken(role, *(kept if role in leaving else ("weights", "gradients", "optimizer")))

    away = sum(learner(role) for role in learners)
    present = sum(taken(role, "weights", "gradients", "optimizer") for role in learners)
    proving = sum(learner(role, *(["weights"] if role == "policy" else [])) for role in learners)
    learning = sum(sum(roles[role].values()) for role in learners)
    scorers = roles.keys() - learners - {"generator"}
    scoring = sum(sum(roles[role].values()) for role in scorers)
    idle = sum(taken(role, "weights") for role in scorers)
    generator = roles.get("generator", {})
    awake = sum(generator.values())
    asleep, woken = (
        (taken("generator"), taken("generator", "weights")) if sleeps else (awake - generator.get("logits", 0.0),) * 2
    )
    return {
        "sampling": awake + away + scoring,
        "transfer": woken + present + idle,
        "proof": awake + proving + idle,
        "learning": asleep + learning + scoring,
    }


def scorer_parts(net: Network, dtype: schema.DType, *, tokens: int, device: str) -> dict[str, float]:
    """Bytes of a network that only judges, by what they are for; `tokens` are those of its largest forward pass."""
    width = torch_dtype(dtype).itemsize
    return {
        "weights": float(net.parameters) * width,
        # Without a backward pass one layer's activations are there at a time.
        "activations": net.kept_per_token * tokens / net.layers,
        "logits": _logits(net, width, tokens=tokens, device=device) if net.vocabulary else 0.0,
        "reserve": RESERVE_GIB[device]["scorer"] * GIB,
    }


def _logits(net: Network, width: int, *, tokens: int, device: str) -> float:
    """Bytes of the logits that are held at once, with their softmax in float32 where it is made as a whole."""
    whole = float(tokens * net.vocabulary)
    if net.full_logits:
        return whole * (width + 3 * 4)
    chunk = CHUNK_BYTES[device]
    held = whole * width if whole * width <= 2 * chunk else chunk
    return held + (3 * 4 * held / width if device == "cuda" else 0.0)


def _tokens(configured: int | None, device: torch.device, *, rows: int, longest: int) -> int:
    """Tokens of the largest forward pass over at most so many rows, none longer than `longest`."""
    return min(max(token_budget(configured, device), longest), rows * longest)


def _device(placed: RolePlacement) -> torch.device:
    return torch.device("cuda" if placed.share.gpus else "cpu")


def _best(savings: list[tuple[float, str]], missing: float) -> str | None:
    """The change that saves most, in words."""
    useful = sorted(((saved, text) for saved, text in savings if saved > 0.005), key=lambda each: -each[0])
    if not useful:
        return None
    saved, text = useful[0]
    return f"{text} saves {saved:.2f} GiB" + ("" if saved >= missing else f" of the {missing:.2f} GiB that are missing")


def yaml_text(value: Any) -> str:
    """A setting's value as an override has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
