"""Weight sync between real actors: beside the engine's own reload of the same weights, and its transport beside memcpy.

A sync is measured by the driver's clock: remote calls, digests and the reset of the prefix cache are in it. The probe
batch, which proves that the weights compute, is a figure of its own: it grows with the probe's tokens. So is what two
bare reloads take at once beside one: engines on cores that share memory slow each other, with or without us. A sync of
two generators therefore stands beside a sync of one and beside two reloads at once.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.bench.figures import Figure, Settings, alone, from_pairs
from rlhf_ray.bench.workload import Size, save_model
from rlhf_ray.config import schema
from rlhf_ray.distributed.groups import RayGroup, gather
from rlhf_ray.distributed.placement import Cluster, RoleRequest
from rlhf_ray.distributed.tracing import DRIVER, Recorder
from rlhf_ray.distributed.transports import ReceivedWeights, TransportSpec
from rlhf_ray.engines.vllm_generation import engine_environment
from rlhf_ray.trainers.weight_sync import WeightSync
from rlhf_ray.workers.generator import Generator
from rlhf_ray.workers.learner import Learner

_GENERATORS = 2
_DEADLINE_S = 120.0
_CACHE_GIB = 0.125
_MAX_LENGTH = 128
# A few hundredths of a second are as long as whatever else ran: a repeat is the median of so many, or of a second's.
# One generator and two, ours and floor, take so many turns in it.
_TIMES = _TURNS = 5
_SECONDS = 1.0


class TimedLearner(Learner):
    """A learner that also copies its own weights."""

    def memcpy_seconds(self) -> float:
        """Seconds to copy as many bytes as the weights have, from memory in use to memory in use."""
        source = torch.ones(self.model_bytes(), dtype=torch.uint8)
        target = torch.ones_like(source)
        start = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - start


class TimedGenerator(Generator):
    """A generator that also reloads its engine's weights without us, and takes weights without loading them."""

    def reload_seconds(self, model: str) -> float:
        """Seconds of the engine's own reload from a state dict that lies in this process."""
        if not hasattr(self, "_state"):
            self._state = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
        engine: Any = self.engine
        start = time.perf_counter()
        engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._state.items()})
        return time.perf_counter() - start

    def take(self, spec: TransportSpec, version: int) -> list[ReceivedWeights]:
        """Takes the weights, digests them, and throws them away."""
        return self.engine.receive(spec, version, first_rank=self.place.rank, load=False)


@dataclass(frozen=True)
class _Site:
    """The actors of one size of model; `generators` by their number."""

    model: str
    policy: RayGroup[TimedLearner]
    generators: dict[int, RayGroup[TimedGenerator]]
    recorder: Recorder


def measure(settings: Settings) -> list[Figure]:
    """End to end, transport alone, two generators beside one, and remote calls, for each size of model."""
    sizes: tuple[Size, ...] = ("s", "m") if settings.quick else ("s", "m", "l")
    recorder = Recorder()
    found: list[Figure] = []
    with Cluster(None, recorder=recorder, call_timeout_s=_DEADLINE_S) as cluster:
        for size in sizes:
            model = settings.folder / f"model_{size}"
            if not (model / "config.json").exists():
                save_model(model, size)
            settings.say(f"sync, model {size}")
            with _started(cluster, str(model), recorder) as site:
                found += [*_end_to_end(site, size, settings.repeats), *_transport(site, size, settings.repeats)]
    return found


@contextmanager
def _started(cluster: Cluster, model: str, recorder: Recorder) -> Iterator[_Site]:
    generator = schema.Generator(max_sequences=8, kv_cache_gib=_CACHE_GIB)
    environment = engine_environment(generator, gpu=False)
    requests = [
        RoleRequest("policy", gpus=0, rendezvous=True),
        RoleRequest("generator", workers=_GENERATORS, gpus=0, env=environment, reuse="generator"),
    ]
    with cluster.reserve(requests) as placement:
        policy = placement.start(
            "policy",
            TimedLearner,
            config=schema.Learner(),
            model=model,
            revision=None,
            head="none",
            seed=1,
            total_steps=1,
        )
        generators = placement.start(
            "generator",
            TimedGenerator,
            config=generator,
            model=model,
            revision=None,
            tokenizer=model,
            max_model_len=_MAX_LENGTH,
            seed=1,
        )
        gather(policy.ready, generators.ready)
        yield _Site(model, policy, {count: generators.part(count) for count in range(1, _GENERATORS + 1)}, recorder)


def _weights(site: _Site, generators: int) -> WeightSync:
    return WeightSync(
        site.policy,
        site.generators[generators],
        settings=schema.Placement(),
        generator_settings=schema.Generator(),
        learner_dtype="float32",
    )


def _end_to_end(site: _Site, size: Size, repeats: int) -> list[Figure]:
    syncs = {count: _weights(site, count) for count in site.generators}
    versions = itertools.count()
    measured, probes, calls, buckets = [], [], [], 0

    def transfer(count: int) -> float:
        nonlocal buckets
        start = time.perf_counter()
        buckets = syncs[count].transfer(next(versions)).buckets
        return time.perf_counter() - start

    def reload(count: int) -> float:
        return max(site.generators[count].all(TimedGenerator.reload_seconds, site.model).result())

    for repeat in range(-1, repeats):
        floors: dict[int, list[float]] = {count: [] for count in syncs}
        seconds: dict[int, list[float]] = {count: [] for count in syncs}
        for _ in range(_TURNS):
            for count in syncs:
                floors[count] += _times(partial(reload, count), at_least=1, seconds=_SECONDS / _TURNS)
                # The learner's sender serves one set of generators: the first transfer after a change starts it anew.
                transfer(count)
                seconds[count] += _times(partial(transfer, count), at_least=1, seconds=_SECONDS / _TURNS)
        site.recorder.drain()
        probe_s = syncs[_GENERATORS].sync(next(versions))["sync/probe_time_s"]
        if repeat >= 0:
            measured.append([median(times) for of in (seconds, floors) for times in of.values()])
            probes.append(probe_s)
            calls.append(sum(span.role != DRIVER for span in site.recorder.drain()))
    one, two, reload_one, reload_two = zip(*measured, strict=True)

    def beside(name: str, ours: Sequence[float], floor: Sequence[float], at_most: float | None) -> Figure:
        pairs = list(zip(ours, floor, strict=True))
        return from_pairs(f"sync/{name}/{size}", pairs, unit="s", at_most=at_most)

    return [
        beside("end_to_end", one, reload_one, 1.25),
        beside("end_to_end_of_two", two, reload_two, 1.25),
        beside("generators/2_1", two, one, 1.3),
        beside("reloads/2_1", reload_two, reload_one, None),
        alone(f"sync/probe/{size}", probes, unit="s"),
        alone(f"sync/remote_calls/{size}", calls, unit="calls", at_most=4 + buckets),
    ]


def _typical(once: Callable[[], float]) -> float:
    """The median of a repeat's times."""
    return median(_times(once, at_least=_TIMES, seconds=_SECONDS))


def _times(once: Callable[[], float], *, at_least: int, seconds: float) -> list[float]:
    """At least so many times, which together are at least so many seconds."""
    times: list[float] = []
    while len(times) < at_least or sum(times) < seconds:
        times.append(once())
    return times


def _transport(site: _Site, size: Size, repeats: int) -> list[Figure]:
    spec = TransportSpec(
        "shared_memory",
        "127.0.0.1",
        site.policy.first(TimedLearner.open_store, _DEADLINE_S).result(),
        receivers=1,
        bucket_bytes=schema.Placement().bucket_mib << 20,
        expected_bytes=site.policy.first(TimedLearner.model_bytes).result(),
    )
    versions = itertools.count(1)

    def take() -> tuple[float, float]:
        """Seconds by the learner's clock, and by the driver's."""
        version = next(versions)
        current = replace(spec, session=version)
        start = time.perf_counter()
        # The receiver first: it waits then, and the learner's clock does not count its call.
        _, sent = gather(
            site.generators[1].first(TimedGenerator.take, current, version),
            site.policy.first(TimedLearner.send_weights, current, version),
        )
        return sent.seconds, time.perf_counter() - start

    pairs, with_calls = [], []
    for repeat in range(-1, repeats):
        memcpy_s = _typical(lambda: site.policy.first(TimedLearner.memcpy_seconds).result())
        inside, outside = zip(*(take() for _ in range(_TIMES)), strict=True)
        if repeat >= 0:
            pairs.append((median(inside), memcpy_s))
            with_calls.append((median(outside), memcpy_s))
    return [
        from_pairs(f"sync/transport/{size}", pairs, unit="s", at_most=3),
        from_pairs(f"sync/transport_with_calls/{size}", with_calls, unit="s"),
    ]
