"""The driver of a large PPO run, simulated: a real loop, real groups, real Ray; the workers are stand-ins that sleep.

64 generators, 16 scorers (8 for the reward, 8 for the reference) and 32 learners (16 for the policy, 16 for the critic)
answer after realistic times with tensors of realistic sizes: 16,384 samples of 256 prompt tokens and up to 512 response
tokens. What is measured is what the driver itself does meanwhile, its memory, and Ray's object store.

The times are those of networks with 7 billion parameters on as many H100: 512 steps of 50 ms to generate; 8.7 million
tokens at 2 x 7e9 FLOPs each, and 4e14 a second, are 300 GPU-seconds for a network to judge them, and three times as
many for it to learn from them once; 2 s to send 14 GB to every generator. So that a benchmark ends, the stand-ins sleep
for a part of it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf_ray.algorithms.kl import FixedKlController
from rlhf_ray.bench.figures import Figure, Settings, alone, from_pairs
from rlhf_ray.config import schema
from rlhf_ray.data.batches import Rollouts, Sequences, one_version
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.data.streams import Stream
from rlhf_ray.distributed.gauges import RayGauges
from rlhf_ray.distributed.groups import gather
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.distributed.stand_ins import Answer, Choose, Prepared, object_store_bytes, start_stand_ins
from rlhf_ray.distributed.tracing import Recorder
from rlhf_ray.distributed.transports import Endpoint, ReceivedWeights, SentWeights
from rlhf_ray.stages.site import LearnerParts
from rlhf_ray.trainers.ppo import PpoGroups, train_ppo
from rlhf_ray.trainers.run import RunFolder, StageRun
from rlhf_ray.trainers.sampling import SampleStream, chunk_sizes, generators_together
from rlhf_ray.trainers.scaling import Growth, Scaling
from rlhf_ray.trainers.turns import GpuTurns
from rlhf_ray.trainers.weight_sync import WeightSync
from rlhf_ray.workers.generator import Finished, ProbeResult
from rlhf_ray.workers.learner import Values

ITERATIONS = 50
QUICK_ITERATIONS = 10
SPEED = 10.0
_TIMEOUT_S = 300.0
_LITTLE_MIB = 64.0
_FEW_CALLS = 2500
_MANY = 40
_VARIANTS = 16
_PROCESSES = {"generator": 2, "reward/model": 1, "reference": 1, "policy": 1, "critic": 1}
_VOCABULARY = 128_000
_WORDS = 30_000
_TENSORS = 291
_PROBE = (4, 48)
_WORDS_PER_TOKEN = 0.75
_WEIGHT_BYTES = 14 << 30
_STATISTICS = ("loss", "grad_norm", "clip_fraction", "approx_kl", "entropy", "guard/skipped_steps")


@dataclass(frozen=True)
class Scale:
    """How large the run is; half of the scorers are the reference's, half of the learners the critic's."""

    generators: int = 64
    scorers: int = 16
    learners: int = 32
    samples: int = 16_384
    samples_per_prompt: int = 4
    prompt_tokens: int = 256
    response_tokens: int = 512


@dataclass(frozen=True)
class Times:
    """How long an iteration's work takes, in seconds.

    Args:
        generation: until the last response ends.
        judging: GPU-seconds of a network that reads all samples.
        learning: GPU-seconds of a network that learns from all samples.
        sync: of the weights.
    """

    generation: float = 25.6
    judging: float = 300.0
    learning: float = 900.0
    sync: float = 2.0

    def iteration(self, scale: Scale) -> float:
        """An iteration at least: the scorers have all to read from the first quarter of the responses on."""
        judging, learning = self.judging / (scale.scorers // 2), self.learning / (scale.learners // 2)
        return self.generation / 4 + judging + learning + self.sync


@dataclass(frozen=True)
class Observation:
    """One iteration.

    Args:
        metrics: its row.
        memory_mib: memory of the driver's process at its end, files and the object store's pages not counted.
        store_mib: what is in Ray's object store then.
        calls: made to workers in it.
    """

    metrics: Mapping[str, float]
    memory_mib: float
    store_mib: float
    calls: int

    @property
    def driver_s(self) -> float:
        """Seconds in which the driver did anything but wait for workers."""
        return self.metrics["driver/busy_share"] * self.metrics["time/iteration_s"]

    @property
    def idle_s(self) -> float:
        """Seconds in which no worker did anything."""
        return self.metrics["time/idle_share"] * self.metrics["time/iteration_s"]


class _Watch:
    """A tracker that looks at the driver whenever an iteration has ended."""

    def __init__(self, cast: _Cast) -> None:
        self.seen: list[Observation] = []
        self._cast = cast
        self._calls_before = cast.calls
        self._process = psutil.Process()

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        memory = self._process.memory_info()
        calls, self._calls_before = self._cast.calls - self._calls_before, self._cast.calls
        own = memory.rss - memory.shared
        self.seen.append(Observation(dict(metrics), own / 2**20, object_store_bytes() / 2**20, calls))

    def write_histogram(self, iteration: int, name: str, values: Sequence[float]) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def measure(settings: Settings) -> list[Figure]:
    """Seconds of the driver per realistic iteration, and how its memory and the object store grow."""
    iterations = QUICK_ITERATIONS if settings.quick else ITERATIONS
    settings.say(f"{iterations} iterations, stand-ins {SPEED:g} times as fast as workers")
    return figures(simulate(settings.folder / "run", iterations=iterations))


def figures(seen: Sequence[Observation], *, scale: Scale = Scale(), times: Times = Times()) -> list[Figure]:
    """The figures of a run; its first iteration is the warm-up. The memory's floor is that of the second third."""
    work_s = times.iteration(scale)
    steady = seen[1:]
    third = len(steady) // 3
    middle, last = steady[third : 2 * third], steady[2 * third :]
    before, after = (float(np.mean([each.memory_mib for each in part])) for part in (middle, last))
    # From one iteration to the next the memory varies by a few percent, by how freed pieces lie.
    growth = 1.05 if len(steady) >= _MANY else 1.1
    return [
        from_pairs("driver/overhead", [(each.driver_s, work_s) for each in steady], unit="s", at_most=0.05),
        from_pairs("driver/no_worker_runs", [(each.idle_s, work_s) for each in steady], unit="s", at_most=0.05),
        from_pairs("driver/memory", [(after, before)], unit="MiB", at_most=growth),
        alone("driver/object_store", [each.store_mib for each in steady], unit="MiB", at_most=_LITTLE_MIB),
        alone("driver/calls", [float(each.calls) for each in steady], unit="calls", at_most=_FEW_CALLS),
        alone(
            "driver/cpu",
            [each.metrics["driver/cpu_share"] * each.metrics["time/iteration_s"] for each in steady],
            unit="s",
        ),
    ]


def simulate(
    folder: Path, *, iterations: int, scale: Scale = Scale(), times: Times = Times(), speed: float = SPEED
) -> list[Observation]:
    """Runs PPO with stand-ins that are `speed` times as fast as workers; what was seen after each iteration."""
    config = schema.Ppo.model_validate(
        {
            "method": "ppo",
            "iterations": iterations,
            "prompts_per_iteration": scale.samples // scale.samples_per_prompt,
            "policy": {"model": "simulated"},
            "reward": [{"kind": "model", "model": "simulated"}],
            "sampling": {"max_new_tokens": scale.response_tokens, "samples_per_prompt": scale.samples_per_prompt},
            "data": {"train": "simulated.jsonl"},
            "evaluation": {"every": 0},
            "checkpoints": {"every": 0},
        }
    )
    recorder = Recorder()
    cast = _Cast(config, scale, times, speed)
    with ExitStack() as stack:
        stack.enter_context(Cluster("local", recorder=recorder, num_cpus=4))
        home = stack.enter_context(RunFolder.create(folder, {"config.yaml": ""}))
        started = {}
        for role, size in cast.sizes.items():
            started[role] = start_stand_ins(
                role,
                size,
                cast.answers(role),
                cast.replies(role),
                processes=_PROCESSES[role],
                collective=role in ("policy", "critic"),
                timeout_s=_TIMEOUT_S,
                recorder=recorder,
            )
            stack.callback(started[role].close)
        watch = _Watch(cast)
        gather(*(group.ready for group in started.values()))
        groups = PpoGroups(
            policy=started["policy"],
            critic=started["critic"],
            reference=started["reference"],
            generator=started["generator"],
            rewards={"model": started["reward/model"]},
        )
        weights = WeightSync(
            groups.policy,
            groups.generator,
            settings=schema.Placement(),
            generator_settings=config.generator,
            learner_dtype=config.policy.dtype,
        )
        samples = SampleStream(config, groups.generator, cast.prompts())
        kl = FixedKlController(0.05)
        with StageRun(
            home,
            config,
            total=iterations,
            seed=1,
            tracking=schema.Tracking(),
            recorder=recorder,
            trackers=[RayGauges(run="simulated", stage="ppo"), watch],
        ) as run:
            learners = {role: started[role] for role in ("policy", "critic")}
            run.start_or_resume(LearnerParts(learners, kl, samples=samples))
            scaling = Scaling(
                home.path, "ppo", groups.generator, _FullHouse(), message=run.message, done=0, total=iterations
            )
            train_ppo(config, groups, samples, None, weights, GpuTurns(), kl, scaling, run)
    return watch.seen


class _FullHouse:
    """Where no worker comes or goes."""

    def fixed(self, role: str) -> str:
        return "the stand-ins are as many as they are"

    def grow(self, role: str, workers: int) -> Growth:
        raise NotImplementedError(self.fixed(role))

    def shrink(self, role: str, workers: int) -> None:
        raise NotImplementedError(self.fixed(role))


@dataclass(frozen=True)
class _Chunk:
    """What all generators' chunks of one number have in common; [C, T] with T of the longest.

    Args:
        attention: real tokens.
        response: response tokens.
        logprobs: of the response tokens; the same for generator and learner.
    """

    attention: Tensor
    response: Tensor
    logprobs: Tensor


class _Cast:
    """What the stand-ins answer, and how long it takes them."""

    def __init__(self, config: schema.Ppo, scale: Scale, times: Times, speed: float) -> None:
        self.sizes = {
            "generator": scale.generators,
            "reward/model": scale.scorers // 2,
            "reference": scale.scorers // 2,
            "policy": scale.learners // 2,
            "critic": scale.learners // 2,
        }
        self._config = config
        self._scale = scale
        self._times = times
        self._speed = speed
        self._random = np.random.default_rng(1)
        self.calls = 0
        counts = chunk_sizes(config, scale.samples // scale.generators)
        piece = counts[0] * generators_together(config, scale.generators)
        self._rows = {role: piece // size for role, size in self.sizes.items() if role != "generator"}
        assert len(set(counts)) == 1, f"unequal chunks: {counts}"
        assert all(piece % size == 0 for size in self.sizes.values()), f"{piece} rows are no equal shares of each role"
        # Only so many rows differ, so that each worker's share of a piece has the same lengths.
        pattern = math.gcd(counts[0], *self._rows.values())
        # What ends first is short.
        ends = [scale.response_tokens * (number + 1) // len(counts) for number in range(len(counts))]
        self._chunks = [self._make_chunk(start, end, counts[0], pattern) for start, end in pairwise([0, *ends])]
        self._words = np.array([f"word{number}" for number in range(_WORDS)])

    def prompts(self) -> PromptSet:
        """Prompts for two iterations."""
        count, length = 2 * self._config.prompts_per_iteration, self._scale.prompt_tokens
        return PromptSet(
            report={"rows": count},
            cut=frozenset(),
            tokens=list(self._random.integers(_VOCABULARY, size=(count, length), dtype=np.int32)),
            texts=self._texts([length] * count),
            messages=[[] for _ in range(count)],
            answers=[None] * count,
            ids=list(range(count)),
            stream=Stream(sizes=[count], weights=[1.0], seed=1, shuffle=True),
            length=None,
            seed=1,
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel())),
        )

    def replies(self, role: str) -> dict[Hashable, Prepared]:
        """What the workers of a role answer, by the keys that `answers` gives."""
        values: dict[Hashable, Any] = dict.fromkeys(("start", "fill_cache", "save"))
        values |= {"memory": 60.0, "counts": {}, "model_bytes": _WEIGHT_BYTES, "open_store": 1}
        values |= {"endpoint": Endpoint("127.0.0.1", "simulated", ()), "update": dict.fromkeys(_STATISTICS, 0.5)}
        digests = {f"model.layers.{number}.weight": 2**60 + number for number in range(_TENSORS)}
        ones = torch.ones(_PROBE, dtype=torch.long)
        probe = Sequences(ones, ones.bool(), ones.bool())
        for version in range(self._config.iterations + 1):
            values["send_weights", version] = SentWeights(version, digests, _WEIGHT_BYTES)
            values["receive_weights", version] = [ReceivedWeights(version, digests, _WEIGHT_BYTES)]
            values["probe", version] = ProbeResult(probe, torch.zeros(_PROBE), version)
        prepared = {key: Prepared(value) for key, value in values.items()}
        if role == "generator":
            for variant in range(_VARIANTS):
                places = self._random.permutation(self._scale.samples // self._scale.generators)
                for number, own in enumerate(np.split(places, len(self._chunks))):
                    finished = self._finished(self._chunks[number], own)
                    versions = finished.rollouts.policy_versions.numpy()
                    prepared["next_finished", variant, number] = Prepared(finished, versions)
            return prepared
        rows = self._rows[role]
        return prepared | {key: Prepared(value) for key, value in self._judgements(role, rows).items()}

    def answers(self, role: str) -> Choose:
        """How the workers of a role answer a call."""
        given: defaultdict[int, int] = defaultdict(int)
        held: dict[int, int] = {}
        size, times = self.sizes[role], self._times

        def choose(
            rank: int, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]
        ) -> tuple[Hashable, float, int]:
            match method:
                case "next_finished":
                    number = given[rank] % len(self._chunks)
                    given[rank] += 1
                    # The fastest generator needs four fifths of the slowest one's time.
                    seconds = times.generation / len(self._chunks) * (0.8 + 0.2 * rank / max(size - 1, 1))
                    return (method, rank % _VARIANTS, number), seconds, kwargs["iteration"] - 1
                case "send_weights" | "receive_weights":
                    held[rank] = args[1]
                    return (method, args[1]), times.sync, 1
                case "probe":
                    return (method, held[rank]), 0.0, 1
                case "logprobs" | "values" | "score":
                    sequences = args[0].sequences if method == "score" else args[0]
                    rows, width = sequences.tokens.shape
                    return (method, rows, width), times.judging * rows / self._scale.samples, 1
                case "update":
                    return method, times.learning / size, 1
                case _:
                    return method, 0.0, 1

        def answer(rank: int, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Answer:
            self.calls += 1
            key, seconds, number = choose(rank, method, args, kwargs)
            return Answer(key, seconds / self._speed, number)

        return answer

    def _make_chunk(self, shortest: int, longest: int, count: int, pattern: int) -> _Chunk:
        """Responses of lengths between the two; one at least of the longest."""
        lengths = self._random.integers(shortest + 1, longest + 1, size=pattern)
        lengths[0] = longest
        before = self._scale.prompt_tokens
        position = torch.arange(before + longest)
        attention = (position < torch.from_numpy(before + lengths)[:, None]).repeat(count // pattern, 1)
        response = attention & (position >= before)
        drawn = torch.from_numpy(-self._random.exponential(1.0, (pattern, before + longest))).float()
        return _Chunk(attention, response, drawn.repeat(count // pattern, 1) * response)

    def _finished(self, chunk: _Chunk, places: Any) -> Finished:
        """Samples at these places of a generator's batch."""
        # The driver puts them in order, and then they are the rows of the chunk.
        order = torch.from_numpy(places).argsort().argsort()
        count, width = chunk.response.shape
        sequences = Sequences(
            torch.from_numpy(self._random.integers(_VOCABULARY, size=(count, width))), chunk.attention, chunk.response
        )
        lengths = chunk.response.sum(1)
        rollouts = Rollouts(
            sequences=sequences,
            generator_logprobs=chunk.logprobs,
            finished=lengths < self._scale.response_tokens,
            prompts=self._texts([self._scale.prompt_tokens] * count),
            responses=self._texts(lengths.tolist()),
            answers=[None] * count,
            prompt_ids=torch.from_numpy(places // self._scale.samples_per_prompt),
            policy_versions=one_version(sequences, 1),
        )
        return Finished(torch.from_numpy(places), rollouts.select(order.tolist()))

    def _judgements(self, role: str, rows: int) -> dict[Hashable, Any]:
        """What scorers and networks say of their share of a piece."""
        values: dict[Hashable, Any] = {}
        for count in (0, 1):
            values["logprobs", count, _PROBE[1]] = torch.zeros(count, _PROBE[1])
        for chunk in self._chunks:
            width = chunk.response.shape[1]
            times = -(-rows // len(chunk.response))
            logprobs, response = chunk.logprobs.repeat(times, 1)[:rows], chunk.response.repeat(times, 1)[:rows]
            noise = torch.from_numpy(self._random.normal(size=(rows, width))).float() * response
            values["score", rows, width] = torch.from_numpy(self._random.normal(size=rows)).float()
            values["values", rows, width] = Values(noise, noise[:, -1].clone())
            values["logprobs", rows, width] = logprobs + noise * (0.05 if role == "reference" else 1e-6)
        return values

    def _texts(self, tokens: Sequence[int]) -> list[str]:
        """Texts of so many tokens; their words are as frequent as those of a language."""
        counts = [max(1, int(_WORDS_PER_TOKEN * each)) for each in tokens]
        drawn = np.minimum(self._random.zipf(1.2, size=sum(counts)), _WORDS) - 1
        parts = np.split(self._words[drawn], np.cumsum(counts)[:-1])
        return [" ".join(part) for part in parts]
