"""PPO, run whole, against the sum of the floors of its parts, and what sampling one step ahead gains.

The work: 64 prompts of 32 to 64 tokens, a policy, a critic, a reference and a reward model of the same size, KL in the
reward: one generation, four forward passes (reward, reference, critic, old log-probabilities), two training steps.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_ray.bench import end_to_end, workload
from rlhf_ray.bench.bare_training import BareTraining, Dtype
from rlhf_ray.bench.bare_vllm import BareVllm
from rlhf_ray.bench.figures import Figure, Settings, alone, cost, from_pairs
from rlhf_ray.config import schema
from rlhf_ray.distributed.groups import WorkerGroup
from rlhf_ray.distributed.place import Place
from rlhf_ray.distributed.placement import Cluster, RoleRequest
from rlhf_ray.engines.vllm_generation import engine_environment
from rlhf_ray.trainers.journal import read_rollouts

SAMPLES = 64
FORWARDS, STEPS = 4, 2
_WARM_UP = 2
_FLOORS_CPUS = 0.01
_ACTOR = "ray::Host"
_REWARD = "def length(prompts, responses, answers):\n    return [float(len(r.split())) for r in responses]\n"


@dataclass(frozen=True)
class Iteration:
    """One iteration of a run.

    Args:
        wall_s: seconds.
        cpu_s: CPU seconds of the driver, the `generator`, the `others` among the actors, and Ray's own processes.
        samples: responses.
        generated: their tokens.
        tokens: with their prompts'.
        driver_share: the driver's CPU seconds per second.
    """

    wall_s: float
    cpu_s: Mapping[str, float]
    samples: int
    generated: float
    tokens: float
    driver_share: float

    @property
    def ours_s(self) -> float:
        """CPU seconds of driver and actors."""
        return self.cpu_s["driver"] + self.cpu_s["generator"] + self.cpu_s["others"]


@dataclass
class Processes:
    """The processes of this benchmark by side, and a core for each side where that is asked for.

    Args:
        cores: one for the generators and one for all others; None: each runs where it likes.
    """

    cores: tuple[int, int] | None = None
    _sides: dict[int, str] = field(default_factory=dict)

    def look(self) -> dict[str, float]:
        """CPU seconds of each side so far."""
        seconds = dict.fromkeys(("driver", "generator", "others", "ray"), 0.0)
        for number in end_to_end.family():
            try:
                process = psutil.Process(number)
                side = self._sides.get(number) or self._new(process)
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            seconds[side] += times.user + times.system
        return seconds

    def _new(self, process: psutil.Process) -> str:
        side = _side(process)
        # One of Ray's processes may be waiting to become an actor.
        if side != "ray":
            self._sides[process.pid] = side
            if self.cores is not None:
                core = self.cores[0 if side == "generator" else 1]
                for thread in process.threads():
                    os.sched_setaffinity(thread.id, {core})
        return side


def _side(process: psutil.Process) -> str:
    if process.pid == os.getpid():
        return "driver"
    if not any(part.startswith(_ACTOR) for part in process.cmdline()):
        return "ray"
    libraries = (Path(mapped.path) for mapped in process.memory_maps() if mapped.path.endswith(".so"))
    return "generator" if any("vllm" in library.parts for library in libraries) else "others"


@dataclass(frozen=True)
class Rates:
    """Tokens per CPU-second of bare vLLM, of a bare dense forward pass, and of a bare dense training step."""

    generation: float
    forward: float
    training: float

    def seconds(self, it: Iteration) -> float:
        """CPU seconds of the same work at the floor."""
        return it.generated / self.generation + it.tokens * (FORWARDS / self.forward + STEPS / self.training)


class Floors:
    """The bare libraries in one actor, which does nothing while they are not measured."""

    def __init__(self, place: Place, *, model: str, dtype: Dtype) -> None:
        self.place = place
        self._training = BareTraining(Path(model), dtype)
        self._training.step()
        config = schema.Generator(dtype=dtype, max_sequences=2 * SAMPLES, kv_cache_gib=0.5)
        self._vllm = BareVllm(model, config, max_model_len=256)
        self._work = workload.prompts(SAMPLES), [len(response) for response in workload.responses(SAMPLES)]
        self._vllm.generate(*self._work)

    def rates(self) -> Rates:
        """One measurement of each."""
        self._vllm.forget()
        generation = cost(lambda: self._vllm.generate(*self._work)).per_cpu_second
        forward = self._training.forward_tokens_per_cpu_second()
        return Rates(generation, forward, self._training.tokens_per_cpu_second())


def measure(settings: Settings) -> list[Figure]:
    """All figures; the main ones alone where it has to be quick."""
    model = workload.save_model(settings.folder / "model")
    save_reward_model(model, settings.folder / "reward_model")
    end_to_end.write_prompts(settings.folder / "prompts.jsonl", workload.prompts(16 * SAMPLES))
    (settings.folder / "bench_rewards.py").write_text(_REWARD)
    with end_to_end.local_ray() as cluster:
        figures, natural = _against_the_floors(settings, cluster, model, "float32")
        if not settings.quick:
            figures += _against_the_floors(settings, cluster, model, "bfloat16")[0]
            figures += _batches(settings, model, natural)
            figures += _one_step_ahead(settings, model)
    return figures


def _against_the_floors(
    settings: Settings, cluster: Cluster, model: Path, dtype: Dtype
) -> tuple[list[Figure], list[Iteration]]:
    """Samples per CPU-second beside the sum of the floors, which are measured before the run and after it."""
    environment = engine_environment(schema.Generator(dtype=dtype), gpu=False)
    with cluster.reserve([RoleRequest("floors", cpus=_FLOORS_CPUS, gpus=0, env=environment)]) as placement:
        floors: WorkerGroup[Floors] = placement.start("floors", Floors, model=str(model), dtype=dtype)
        half = -(-settings.repeats // 2)
        rates = [floors.first(Floors.rates).result() for _ in range(half)]
        found = _run(settings, f"whole_{dtype}", stage(settings, model, dtype=dtype))
        rates += [floors.first(Floors.rates).result() for _ in range(half)]
    pairs = [(it.samples / it.ours_s, it.samples / rate.seconds(it)) for it, rate in zip(found, rates, strict=False)]
    bound = 0.80 if dtype == "float32" else 0.65
    per_second = [it.samples / it.wall_s for it in found]
    figures = [
        from_pairs(f"ppo/samples/{dtype}", pairs, unit="samples per CPU-second", at_least=bound),
        alone(f"ppo/samples_per_second/{dtype}", per_second, unit="samples per second"),
    ]
    if dtype == "float32":
        shares, unit = [it.driver_share for it in found], "CPU seconds per second"
        figures.append(alone("ppo/driver_cpu_share", shares, unit=unit, at_most=0.05))
        figures.append(alone("ppo/ray_cpu_share", [it.cpu_s["ray"] / it.wall_s for it in found], unit=unit))
    return figures, found


def save_reward_model(model: Path, directory: Path) -> Path:
    """Writes a reward model of the same size with a random head; gives its directory."""
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(directory)
    workload.tokenizer().save_pretrained(directory)
    return directory


def _batches(settings: Settings, model: Path, natural: Sequence[Iteration]) -> list[Figure]:
    """Four times the batch, and responses that are all of the mean length, against the run of natural lengths."""
    unit = "samples per second"
    large = _run(settings, "batch_256", stage(settings, model, samples=4 * SAMPLES))
    length = round(sum(it.generated for it in natural) / sum(it.samples for it in natural))
    same = {"min_new_tokens": length, "max_new_tokens": length}
    uniform = _run(settings, "same_length", stage(settings, model, sampling=same))

    def pairs(ours: Sequence[Iteration], others: Sequence[Iteration]) -> list[tuple[float, float]]:
        return [(a.samples / a.wall_s, b.samples / b.wall_s) for a, b in zip(ours, others, strict=True)]

    return [
        from_pairs("ppo/batch/256_64", pairs(large, natural), unit=unit, at_least=0.98),
        from_pairs("ppo/lengths/natural_mean", pairs(natural, uniform), unit=unit, at_least=0.85),
    ]


def _one_step_ahead(settings: Settings, model: Path) -> list[Figure]:
    """A core for the generator and one for all others, with work that weighs about the same on both."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        settings.say("one step ahead needs two cores, left out")
        return []
    changes = {
        "policy": {"model": str(model), "dtype": "bfloat16"},
        "generator": {"dtype": "float32"},
        "reward": [{"kind": "function", "function": "bench_rewards:length"}],
        "advantages": {"estimator": "leave_one_out"},
        "critic": None,
        "kl": {"place": "off"},
        "old_logprobs": "generator",
        "prompts_per_iteration": SAMPLES // 2,
        "sampling": {"max_new_tokens": 128, "samples_per_prompt": 2},
    }
    work = {name: value for name, value in {**stage(settings, model), **changes}.items() if value is not None}
    work.pop("reference")
    pinned = (cores[0], cores[1])
    try:
        strict = _run(settings, "in_turns", work, cores=pinned)
        ahead = _run(settings, "one_step_ahead", {**work, "staleness": 1}, cores=pinned)
    finally:
        os.sched_setaffinity(0, set(cores))
    sides = [(it.wall_s, max(it.cpu_s["generator"], it.cpu_s["others"] + it.cpu_s["driver"])) for it in ahead]
    both = [(a.samples / a.wall_s, s.samples / s.wall_s) for a, s in zip(ahead, strict, strict=True)]
    return [
        from_pairs("ppo/one_step_ahead/wall", sides, unit="s", at_most=1.15),
        from_pairs("ppo/one_step_ahead/speedup", both, unit="samples per second", at_least=1.25),
    ]


def stage(
    settings: Settings,
    model: Path,
    *,
    dtype: Dtype = "float32",
    samples: int = SAMPLES,
    sampling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The pipeline's stage; it has one iteration more than is measured, because the last one is not like the others."""
    typed = {"dtype": dtype}
    return {
        "method": "ppo",
        "iterations": _WARM_UP + settings.repeats + 1,
        "prompts_per_iteration": samples,
        "policy": {"model": str(model), **typed},
        "critic": typed,
        "reference": typed,
        "generator": typed,
        "reward": [{"kind": "model", "model": str(settings.folder / "reward_model"), **typed}],
        "sampling": {"max_new_tokens": 128, **(sampling or {})},
        "data": {"train": str(settings.folder / "prompts.jsonl")},
    }


def _run(
    settings: Settings, name: str, work: Mapping[str, Any], *, cores: tuple[int, int] | None = None
) -> list[Iteration]:
    """The iterations after the warm-up, the last one left out."""
    settings.say(f"PPO, {name}")
    folder = settings.folder / name
    schema.Ppo.model_validate(work)
    course = end_to_end.run(work, folder, look=Processes(cores).look)
    found = []
    for index in range(_WARM_UP, len(course.rows) - 1):
        journal = folder / "ppo" / "rollouts" / f"iteration_{course.rows[index]['iteration']:06}.parquet"
        sequences = read_rollouts(journal).rollouts.sequences
        before, after = course.looks[index - 1], course.looks[index]
        found.append(
            Iteration(
                wall_s=course.ends[index][0] - course.ends[index - 1][0],
                cpu_s={side: after[side] - before[side] for side in after},
                samples=len(sequences),
                generated=float(sequences.response_mask.sum()),
                tokens=float(sequences.attention_mask.sum()),
                driver_share=float(course.rows[index]["driver/cpu_share"]),
            )
        )
    return found
