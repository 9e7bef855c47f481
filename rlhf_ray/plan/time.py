"""Seconds of an iteration from a model of its work: operations, bytes, and what is waited for.

A forward pass is two operations for each multiplied parameter and token, a training step six (arXiv:2001.08361, sec.
2.1), and attention adds to both. Decoding reads weights and keys and values at every step, so it is bound by memory.
What of a device's peak is reached is an assumption, as are the fixed costs; `--measured` puts a run's figures in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlhf_ray.config import schema
from rlhf_ray.config.role_rules import reward_names
from rlhf_ray.data.packing import token_budget
from rlhf_ray.distributed.bundles import Share
from rlhf_ray.engines.deepspeed_training import effective_stage
from rlhf_ray.models.loading import torch_dtype
from rlhf_ray.plan.arithmetic import StageArithmetic, longest_row
from rlhf_ray.plan.data import Lengths
from rlhf_ray.plan.hardware import Device
from rlhf_ray.plan.memory import learner_parts
from rlhf_ray.plan.networks import Kind, Network, model_config, network
from rlhf_ray.trainers.ppo import optimizer_steps
from rlhf_ray.trainers.sampling import chunk_sizes

FORWARD_EFFICIENCY = 0.5
"""Share of the peak that a forward pass over packed rows, or over prompts, reaches; an assumption."""
TRAINING_EFFICIENCY = 0.4
"""Share of the peak that a training step reaches; an assumption."""
MEMORY_EFFICIENCY = 0.7
"""Share of the bandwidth to memory that decoding and the optimizer reach; an assumption."""
LINK_EFFICIENCY = 0.7
"""Share of the bandwidth between devices that collectives and syncs reach, and copies to the host; an assumption."""
LAYER_S = 2e-4
"""Least seconds of one layer in a forward pass, in which its kernels are started; an assumption."""
DECODED_LAYER_S = 1e-4
"""The same in a step of decoding, but for captured graphs (`generator.compile`); an assumption."""
STEP_S = 3e-3
"""Fixed seconds of a step of decoding: the engine's scheduler and sampler; an assumption."""
CALL_S = 5e-3
"""Fixed seconds of a call to a group of workers; an assumption."""
WORKER_S = 2e-4
"""Seconds of the driver for each worker of a call; an assumption."""
SAMPLE_S = 1e-4
"""Seconds of the driver for each sample: merging, advantages, writing it; an assumption."""
HOP_S = 3e-5
"""Latency of one step of a collective between devices; an assumption."""
FUNCTION_S = 1e-4
"""Seconds that a reward function takes for a sample; an assumption."""
RELOAD_GB_S = {"cuda": 50.0, "cpu": 0.6}
"""GB/s at which an engine takes new weights. On a CPU as the sync benchmark has measured it, the sender's copy
included; on a GPU an assumption."""
_ADAM_BYTES = 28
"""Bytes that AdamW reads and writes for each parameter in float32: weight, gradient, two moments."""
_POINTS = 32


@dataclass(frozen=True)
class Hardware:
    """What the workers compute on.

    Args:
        gpu: of the cluster; None where it has none.
        core: one of its CPU cores.
        gpus_per_node: of each node.
        cores: of the whole cluster.
    """

    gpu: Device | None
    core: Device
    gpus_per_node: int
    cores: float


@dataclass(frozen=True)
class Task:
    """What one role does in an iteration.

    Args:
        phase: generate, score, learn, turns or sync.
        role: who does it.
        name: as in the metrics, `time/<name>_s`; of the sync `sync`.
        seconds: of its slowest worker, with the device to itself.
        waiting: seconds of them that are communication between the workers.
        rows: samples, or rows of a mini-batch, that are dealt to the workers.
        workers: of the role.
        devices: that each worker keeps busy.
        gpu: whether those are GPUs.
    """

    phase: str
    role: str
    name: str
    seconds: float
    waiting: float
    rows: int
    workers: int
    devices: int
    gpu: bool


@dataclass(frozen=True)
class StageTime:
    """The time of a stage, without its evaluations, checkpoints and start.

    Args:
        stage: its name.
        lengths: tokens of the rows that it was worked out for.
        tasks: what its roles do in an iteration.
        phases: seconds by phase; `driver` is what falls between the calls.
        hidden_s: seconds of them that pass while another phase is under way.
        iterations: of the whole stage; None where they are not known.
        gpus: whole GPUs that it holds.
    """

    stage: str
    lengths: Lengths
    tasks: tuple[Task, ...]
    phases: dict[str, float]
    hidden_s: float
    iterations: int | None
    gpus: int

    @property
    def iteration_s(self) -> float:
        """Seconds of an iteration."""
        return sum(self.phases.values()) - self.hidden_s

    @property
    def run_s(self) -> float | None:
        """Seconds of all iterations."""
        return None if self.iterations is None else self.iterations * self.iteration_s

    @property
    def gpu_hours(self) -> float | None:
        """Hours of all its GPUs together."""
        return None if self.run_s is None else self.run_s * self.gpus / 3600


Factors = Mapping[str, float]
"""What an earlier run took over what was worked out for it, by the name of the task."""


def stage_time(
    config: schema.Pipeline,
    stage: schema.Stage,
    numbers: StageArithmetic,
    shares: Mapping[str, Share],
    lengths: Lengths,
    hardware: Hardware,
    *,
    cache_gib: float | None,
    factors: Factors,
) -> StageTime:
    """The time of a stage.

    Args:
        config: the pipeline.
        stage: one of its stages, or the same with other numbers of workers.
        numbers: its batches.
        shares: what each worker of a role gets, by role; the roles that run while the stage trains.
        lengths: tokens of its rows.
        hardware: what it runs on.
        cache_gib: an engine's cache on each of its GPUs; None: as many sequences as the settings allow fit.
        factors: by which the seconds of tasks are corrected.

    Raises:
        ConfigError: a model's config.json cannot be read.
    """
    work = _Work(config, stage, shares, lengths, hardware, cache_gib)
    match stage:
        case schema.Ppo():
            tasks = _ppo(work, stage, numbers)
        case schema.Collect():
            tasks = [work.generate(numbers.batch), *work.scores(stage.reward, numbers.samples)]
        case _:
            tasks = _supervised(work, stage, numbers)
    tasks = [replace(task, seconds=task.seconds * factors.get(task.name, 1.0)) for task in tasks]
    phases = {
        phase: _together([task for task in tasks if task.phase == phase], hardware, shares, work.workers)
        for phase in dict.fromkeys(task.phase for task in tasks)
    }
    rows = numbers.samples or numbers.batch
    phases["driver"] = len(tasks) * CALL_S + sum(WORKER_S * task.workers for task in tasks) + SAMPLE_S * rows
    gpus = math.ceil(sum(work.workers[role] * share.gpus for role, share in shares.items()) - 1e-6)
    hidden = _hidden(stage, tasks, phases, work.workers, gpus, hardware)
    return StageTime(stage.name, lengths, tuple(tasks), phases, hidden, numbers.iterations, gpus)


class _Work:
    """The tasks of one stage's roles."""

    def __init__(
        self,
        config: schema.Pipeline,
        stage: Any,
        shares: Mapping[str, Share],
        lengths: Lengths,
        hardware: Hardware,
        cache_gib: float | None,
    ) -> None:
        self._config, self._stage, self._shares, self._lengths = config, stage, shares, lengths
        self._hardware, self._cache_gib = hardware, cache_gib
        self.workers = {role: role_settings(stage, role).workers for role in shares}

    # ------------------------------------------------------------------------------------ tasks

    def generate(self, prompts: int) -> Task:
        """Sampling of a batch by the engines; each has its share of the prompts."""
        settings, lengths = self._stage.generator, self._lengths
        each = self._stage.sampling.samples_per_prompt
        net = self._net(None, None, "language_model", settings.dtype, "generator")
        own = math.ceil(prompts / settings.workers)
        filled = own * (1 if settings.prefix_caching else each) * lengths.prompt
        device, dtype = self._device("generator"), settings.dtype
        prefill = self._flops(net, filled, lengths.prompt, training=False) / (FORWARD_EFFICIENCY * device.flops(dtype))
        seconds = prefill / self._parallel("generator") + self._decode(settings, net, own * each)
        return self._task("generate", "generator", "generate", seconds, rows=prompts)

    def _decode(self, settings: schema.Generator, net: Network, samples: int) -> float:
        """Seconds of one engine: full rounds as long as samples wait, then the last ones to the longest response.

        Responses end so that the share (1 - t / longest) ** (longest / mean - 1) of them outlives t tokens, whose mean
        is `mean`.
        """
        device, parallel, lengths = self._device("generator"), self._parallel("generator"), self._lengths
        width = torch_dtype(settings.dtype).itemsize
        keys = float(net.key_value_elements * width)
        slots = min(samples, settings.max_sequences)
        if self._cache_gib is not None:
            slots = min(slots, max(1, int(self._cache_gib * 2**30 * settings.tensor_parallel / (keys * lengths.row))))
        fixed = STEP_S + (0.0 if settings.compile else DECODED_LAYER_S * net.layers)
        if settings.tensor_parallel > 1:
            fixed += 2 * HOP_S * net.layers

        def step(active: float, context: float) -> float:
            flops = active * (2 * net.multiplied + 4 * net.layers * net.hidden * context)
            read = net.multiplied * width + active * context * keys
            busy = max(
                flops / (FORWARD_EFFICIENCY * device.flops(settings.dtype)),
                read / (MEMORY_EFFICIENCY * 1e9 * device.memory),
            )
            return busy / parallel + fixed

        mean, longest = max(1.0, lengths.response), max(1.0, lengths.longest)
        power = max(0.0, longest / mean - 1)
        rounds = (samples - slots) * mean / slots * step(slots, lengths.prompt + mean / 2)
        # The last response is expected to end where half a sequence is left.
        end = longest if power == 0 else longest * (1 - (0.5 / max(slots, 1)) ** (1 / power))
        tail = 0.0
        for point in range(_POINTS):
            at = end * (point + 0.5) / _POINTS
            tail += end / _POINTS * step(max(1.0, slots * (1 - at / longest) ** power), lengths.prompt + at)
        return rounds + tail

    def scores(self, rewards: Sequence[schema.Reward], samples: int) -> list[Task]:
        """The scorers' work."""
        found = []
        for name, settings in zip(reward_names(rewards), rewards, strict=True):
            role = f"reward/{name}"
            if role not in self._shares:
                continue
            if isinstance(settings, schema.FunctionReward):
                seconds = FUNCTION_S * math.ceil(samples / settings.workers)
            else:
                net = self._net(settings.model, settings.revision, "classifier", settings.dtype, role)
                seconds = self._forward(net, role, samples, settings.dtype, settings.micro_batch_tokens)
            found.append(self._task("score", role, f"reward_{name}_score", seconds, rows=samples))
        return found

    def reference(self, samples: int, name: str) -> Task:
        """The reference's log-probabilities, by workers of its own or by the policy's with its adapter off."""
        settings, policy = self._stage.reference, self._stage.policy
        role = "reference" if "reference" in self._shares else "policy"
        model = (settings.model, settings.revision) if role == "reference" else (policy.model, policy.revision)
        dtype = settings.dtype if role == "reference" else policy.dtype
        net = self._net(*model, "language_model", dtype, role)
        seconds = self._forward(net, role, samples, dtype, settings.micro_batch_tokens)
        return self._task("score", role, name if role == "reference" else f"policy_{name}", seconds, rows=samples)

    def judgement(self, role: str, samples: int, method: str) -> Task:
        """A learner's log-probabilities or values before the update."""
        settings = role_settings(self._stage, role)
        net = self._net(settings.model, settings.revision, self._kind(role), settings.dtype, role, settings.lora)
        seconds = self._forward(net, role, samples, settings.dtype, settings.micro_batch_tokens)
        return self._task("score", role, f"{role}_{method}", seconds, rows=samples)

    def update(self, role: str, mini_batches: Mapping[int, int], *, epochs: int, together: int) -> Task:
        """All optimizer steps of an iteration.

        Args:
            mini_batches: how many there are of each size.
            epochs: passes over them.
            together: sequences in a row, 2 for pairs.
        """
        settings = role_settings(self._stage, role)
        net = self._net(settings.model, settings.revision, self._kind(role), settings.dtype, role, settings.lora)
        seconds = waiting = 0.0
        for rows, number in mini_batches.items():
            computed, waited = self._step(net, role, settings, rows * together)
            seconds += epochs * number * (computed + waited)
            waiting += epochs * number * waited
        return self._task("learn", role, f"{role}_update", seconds, rows=max(mini_batches), waiting=waiting)

    def sync(self) -> Task:
        """The weights' way from the policy's first worker through all engines at once, and into them."""
        policy, generator = self._stage.policy, self._stage.generator
        net = self._net(policy.model, policy.revision, "language_model", policy.dtype, "policy", policy.lora)
        sent = (net.parameters if policy.lora is None else net.trained) * torch_dtype(policy.dtype).itemsize / 1e9
        on_gpu = bool(self._shares["generator"].gpus)
        total = self.workers["policy"] + self.workers["generator"] * self._parallel("generator")
        device = self._device("generator")
        far = total > self._hardware.gpus_per_node if on_gpu else False
        link = LINK_EFFICIENCY * (device.network if far else device.link)
        loaded = sent / RELOAD_GB_S["cuda" if on_gpu else "cpu"]
        way = sent / link if on_gpu else 0.0
        buckets = math.ceil(sent * 1e9 / (self._config.placement.bucket_mib << 20))
        seconds = way + loaded + (buckets + math.log2(max(2, total))) * HOP_S + 4 * CALL_S + WORKER_S * total
        task = self._task("sync", "generator", "sync", seconds, rows=generator.workers, waiting=way)
        return replace(task, workers=1 if on_gpu else self.workers["generator"])

    def turns(self) -> list[Task]:
        """What leaves the GPUs for host memory and comes back, once each; as `trainers.turns` has it.

        An engine that sleeps keeps its weights only beside adapters: else a sync brings them.
        """
        stage, tasks = self._stage, []
        for role in ("policy", "critic"):
            if role in self._shares and self._shares[role].gpus and role_settings(stage, role).offload:
                settings = role_settings(stage, role)
                net = self._net(
                    settings.model, settings.revision, self._kind(role), settings.dtype, role, settings.lora
                )
                parts, _ = learner_parts(net, settings, workers=settings.workers, tokens=1, device="cuda")
                moved = parts["weights"] + parts["gradients"] + parts["optimizer"]
                tasks += self._moves(role, ("offload", "reload"), moved)
        if stage.generator.sleep and self._shares["generator"].gpus:
            net = self._net(None, None, "language_model", stage.generator.dtype, "generator")
            weights = net.parameters * torch_dtype(stage.generator.dtype).itemsize / stage.generator.tensor_parallel
            tasks += self._moves("generator", ("sleep", "wake"), 0.0 if stage.policy.lora is None else weights)
        return tasks

    # ------------------------------------------------------------------------------------- work

    def _moves(self, role: str, methods: Sequence[str], nbytes: float) -> list[Task]:
        """Calls that each move so many bytes between every GPU of a role and host memory."""
        seconds = nbytes / (LINK_EFFICIENCY * 1e9 * self._device(role).host)
        return [
            self._task("turns", role, f"{role}_{method}", seconds, rows=self.workers[role], waiting=seconds)
            for method in methods
        ]

    def _step(self, net: Network, role: str, settings: schema.Learner, rows: int) -> tuple[float, float]:
        """Seconds of one optimizer step: those of a worker, and those of the collectives."""
        workers, lengths, device = settings.workers, self._lengths, self._device(role)
        tokens = math.ceil(rows / workers) * lengths.row
        passes = self._passes(role, settings.micro_batch_tokens, tokens)
        flops = self._flops(net, tokens, lengths.row, training=True, again=settings.activation_checkpointing)
        launched = passes * 3 * LAYER_S * net.layers
        computed = max(flops / (TRAINING_EFFICIENCY * device.flops(settings.dtype)) / self._parallel(role), launched)
        stage, width = effective_stage(settings), torch_dtype(settings.dtype).itemsize
        own = net.trained / (workers if stage else 1)
        # Offloaded states are read over the host's memory and bus.
        slow = 10.0 if settings.cpu_offload and self._shares[role].gpus else 1.0
        computed += slow * own * _ADAM_BYTES / (MEMORY_EFFICIENCY * 1e9 * device.memory)
        if workers == 1:
            return computed, 0.0
        # A ring all-reduce moves twice the bytes; ZeRO 3 gathers the weights for both passes of every micro-batch too.
        moved = 2.0 * net.trained * width + (2.0 * passes * net.parameters * width if stage == 3 else 0.0)
        return computed, self._collective(role, moved, workers)

    def _collective(self, role: str, nbytes: float, workers: int) -> float:
        """Seconds in which each worker of a ring sends so many bytes, first within nodes and then between them."""
        device, each = self._device(role), max(1, self._hardware.gpus_per_node)
        hops = 2 * math.ceil(math.log2(workers)) * HOP_S
        near, nodes = min(workers, each), math.ceil(workers / each)
        if not self._shares[role].gpus:
            near, nodes = workers, 1
        seconds = nbytes * (near - 1) / near / (LINK_EFFICIENCY * 1e9 * device.link)
        if nodes > 1:
            seconds += nbytes / near * (nodes - 1) / nodes / (LINK_EFFICIENCY * 1e9 * device.network)
        return seconds + hops

    def _forward(self, net: Network, role: str, rows: int, dtype: schema.DType, budget: int | None) -> float:
        """Seconds of a forward pass over a worker's share of the rows."""
        tokens = math.ceil(rows / self.workers[role]) * self._lengths.row
        flops = self._flops(net, tokens, self._lengths.row, training=False)
        launched = self._passes(role, budget, tokens) * LAYER_S * net.layers
        peak = FORWARD_EFFICIENCY * self._device(role).flops(dtype)
        return max(flops / peak / self._parallel(role), launched)

    def _flops(self, net: Network, tokens: float, row: float, *, training: bool, again: bool = False) -> float:
        """Operations on so many tokens in rows of this length; `again`: activations are computed twice."""
        # A token attends to half of its row on average; scores and values are two products.
        attention = 2.0 * net.layers * net.hidden * row
        forward = 2.0 * net.multiplied + attention
        if not training:
            return tokens * forward
        trained = min(net.trained, net.multiplied)
        backward = 2.0 * net.multiplied + 2.0 * trained + 2 * attention
        return tokens * (forward * (2 if again else 1) + backward)

    def _passes(self, role: str, budget: int | None, tokens: float) -> int:
        device = torch.device("cuda" if self._shares[role].gpus else "cpu")
        return max(1, math.ceil(tokens / token_budget(budget, device)))

    def _parallel(self, role: str) -> int:
        """Devices that one worker computes on."""
        share = self._shares[role]
        return max(1, math.ceil(share.gpus)) if share.gpus else max(1, int(share.cpus))

    def _device(self, role: str) -> Device:
        gpu = self._hardware.gpu if self._shares[role].gpus else None
        return gpu or self._hardware.core

    def _kind(self, role: str) -> Kind:
        stage = self._stage
        if role == "critic":
            return "critic"
        if isinstance(stage, schema.RewardModel):
            return "classifier"
        joint = isinstance(stage, schema.Ppo) and stage.critic_role and stage.critic_role.kind == "value_head"
        return "language_model_and_critic" if joint else "language_model"

    def _net(
        self,
        model: str | schema.NewModel | None,
        revision: str | None,
        kind: Kind,
        dtype: schema.DType,
        role: str,
        lora: schema.Lora | None = None,
    ) -> Network:
        if model is None:
            model, revision = self._stage.policy.model, self._stage.policy.revision
        return network(
            model_config(self._config, model, revision),
            kind,
            dtype=dtype,
            lora=lora,
            row_tokens=longest_row(self._stage),
            device="cuda" if self._shares[role].gpus else "cpu",
        )

    def _task(self, phase: str, role: str, name: str, seconds: float, *, rows: int, waiting: float = 0.0) -> Task:
        name = name.replace("/", "_")
        gpu = bool(self._shares[role].gpus)
        return Task(phase, role, name, seconds, waiting, rows, self.workers[role], self._parallel(role), gpu)


def role_settings(stage: Any, role: str) -> Any:
    """A role's section of the stage."""
    if role == "critic":
        return stage.critic_role
    if role.startswith("reward/"):
        return dict(zip(reward_names(stage.reward), stage.reward, strict=True))[role.removeprefix("reward/")]
    return getattr(stage, role)


def _ppo(work: _Work, stage: schema.Ppo, numbers: StageArithmetic) -> list[Task]:
    samples = numbers.samples
    tasks = [work.generate(numbers.batch), *work.scores(stage.reward, samples)]
    if stage.kl_place != "off":
        tasks.append(work.reference(samples, "reference_logprobs"))
    if stage.old_logprobs == "learner":
        tasks.append(work.judgement("policy", samples, "logprobs"))
    critic = stage.critic_role
    if critic is not None:
        tasks.append(work.judgement("critic" if critic.kind == "network" else "policy", samples, "values"))
    for role in optimizer_steps(stage):
        tasks.append(work.update(role, numbers.mini_batches, epochs=stage.epochs, together=1))
    return [*tasks, *work.turns(), work.sync()]


def _supervised(work: _Work, stage: Any, numbers: StageArithmetic) -> list[Task]:
    together = 1 if stage.method == "sft" else 2
    tasks = []
    if stage.method == "dpo" and stage.needs_reference:
        tasks.append(work.reference(2 * numbers.batch, "reference_answer_logprobs"))
    return [*tasks, work.update("policy", {numbers.batch: 1}, epochs=1, together=together)]


def _together(
    tasks: Sequence[Task], hardware: Hardware, shares: Mapping[str, Share], workers: Mapping[str, int]
) -> float:
    """Seconds of tasks that run side by side: of the longest, or of all on the devices that they share.

    One worker does its own tasks one after the other.
    """
    by_role: dict[str, float] = {}
    for task in tasks:
        by_role[task.role] = by_role.get(task.role, 0.0) + task.seconds
    found = max(by_role.values(), default=0.0)
    for gpu in (True, False):
        held = sum(workers[role] * share.gpus for role, share in shares.items())
        there = math.ceil(held - 1e-6) if gpu else hardware.cores
        busy = sum(task.seconds * task.workers * task.devices for task in tasks if task.gpu == gpu)
        found = max(found, busy / max(1.0, there))
    return found


def _hidden(
    stage: schema.Stage,
    tasks: Sequence[Task],
    phases: Mapping[str, float],
    workers: Mapping[str, int],
    gpus: int,
    hardware: Hardware,
) -> float:
    """Seconds of the phases that pass while another one is under way, on devices of its own.

    Samples ahead pass beside scoring and learning; without them finished pieces are judged while others are sampled,
    so that the last piece is what is waited for. A reference scores one batch ahead.
    """
    wanted = dict.fromkeys((True, False), 0.0)
    for gpu, devices in {task.role: (task.gpu, task.workers * task.devices) for task in tasks}.values():
        wanted[gpu] += devices
    if wanted[True] > gpus + 1e-6 or wanted[False] > hardware.cores + 1e-6:
        return 0.0
    score, learn = phases.get("score", 0.0), phases.get("learn", 0.0)
    match stage:
        case schema.Ppo():
            generate = phases["generate"]
            if stage.staleness:
                return min(generate, score + learn)
            if stage.generator.sleep or any(role_settings(stage, role).offload for role in optimizer_steps(stage)):
                return 0.0
            own = math.ceil(stage.prompts_per_iteration / workers["generator"]) * stage.sampling.samples_per_prompt
            pieces = len(chunk_sizes(stage, own))
            return min(score * (1 - 1 / pieces), generate * (1 - 1 / pieces))
        case schema.Dpo():
            return min(score, learn)
        case _:
            return 0.0
