"""Generator actors beside bare vLLM: the same prompts, and for each the same number of tokens.

Our side starts an iteration and takes its responses in parts as they end, through Ray, as PPO does: seeded samples,
log-probabilities, texts. The floor's requests end at the lengths that our samples have. Prefix caches are empty before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rlhf_ray.bench import workload
from rlhf_ray.bench.bare_vllm import BareVllm
from rlhf_ray.bench.figures import Figure, Settings, cost, from_pairs
from rlhf_ray.config import schema
from rlhf_ray.data.batches import Prompts, Rollouts
from rlhf_ray.distributed.groups import RayGroup, gather
from rlhf_ray.distributed.place import Place
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.stages.actors import generator_request
from rlhf_ray.workers.generator import Finished, Generator

_BATCHES = {64: 0.92, 128: 0.95}
_LONGEST = 128
_PART = 16
_SAMPLING = schema.Sampling(max_new_tokens=_LONGEST)
_SHARED_PROMPT, _SIBLINGS = 256, 8
# Prompts at once and the longest response: the less there is to decode, the more the cache is worth. Eight responses
# are as long as chance has it, so a repeat has the samples of so many prompts, one batch after the other.
_SHARED = ((1, 32), (1, _LONGEST), (8, _LONGEST))
_DRAWN = 8
# The larger the model, the less of a step is vLLM's own work, and the more of it the prompt's; one takes seconds.
_SIZES: tuple[workload.Size, ...] = ("s", "sm", "m")
_CACHE_GIB = 0.5
_DEADLINE_S = 300.0


class Ours:
    """A generator with a prefix cache and one without, in one process."""

    def __init__(self, place: Place, *, config: schema.Generator, model: str) -> None:
        self.place = place
        self._engines = {
            cached: Generator(
                place,
                config=config.model_copy(update={"prefix_caching": cached}),
                model=model,
                revision=None,
                tokenizer=model,
                max_model_len=_SHARED_PROMPT + _LONGEST,
                seed=1,
            )
            for cached in (True, False)
        }

    def process(self) -> int:
        """Its process id."""
        return os.getpid()

    def forget(self) -> None:
        """Empties all prefix caches."""
        for generator in self._engines.values():
            generator.engine.reset_prefix_cache()

    def generate(self, prompts: Prompts, sampling: schema.Sampling, *, cached: bool = True) -> Rollouts:
        """All responses at once."""
        return self._engines[cached].generate(prompts, sampling, iteration=1)

    def start(self, prompts: Prompts, sampling: schema.Sampling) -> None:
        """Starts the same responses."""
        self._engines[True].start(prompts, sampling, iteration=1)

    def next_finished(self, count: int) -> Finished:
        """The next of them."""
        return self._engines[True].next_finished(1, count)

    def close(self) -> None:
        """Ends the engines."""
        for generator in self._engines.values():
            generator.close()


class Bare:
    """vLLM by itself, with a prefix cache and without; in another process, as one process has one set of kernels."""

    def __init__(self, place: Place, *, config: schema.Generator, model: str) -> None:
        self.place = place
        self._engines = {
            cached: BareVllm(
                model,
                config.model_copy(update={"prefix_caching": cached}),
                max_model_len=_SHARED_PROMPT + _LONGEST,
            )
            for cached in (True, False)
        }

    def process(self) -> int:
        """Its process id."""
        return os.getpid()

    def forget(self) -> None:
        """Empties all prefix caches."""
        for engine in self._engines.values():
            engine.forget()

    def generate(
        self, prompts: Prompts, lengths: Sequence[int], *, logprobs: bool = True, cached: bool = True
    ) -> float:
        """As many tokens for each prompt."""
        return self._engines[cached].generate(prompts.token_ids, lengths, logprobs=logprobs)


_Way = tuple[str, int, Callable[[], float]]
"""A name, the process that works, and the work, which gives the number of tokens."""


@dataclass(frozen=True)
class _Site:
    """The actors of one model and type."""

    ours: RayGroup[Ours]
    bare: RayGroup[Bare]


def measure(settings: Settings) -> list[Figure]:
    """Tokens per CPU-second of the actor for each batch and type, and what the prefix cache is worth."""
    found: list[Figure] = []
    with Cluster(None, call_timeout_s=_DEADLINE_S) as cluster:
        with _started(cluster, settings.folder, "s", "float32") as site:
            for batch in _BATCHES:
                settings.say(f"rollout, batch {batch}, float32")
                found += _tokens(site, batch, "float32", repeats=settings.repeats)
            for case in _SHARED:
                settings.say("rollout, prefix cache, {} prompts, responses of at most {} tokens".format(*case))
                found += _prefix_cache(site, "s", *case, drawn=_DRAWN, repeats=settings.repeats)
        if settings.quick:
            return found
        for size in _SIZES[1:]:
            settings.say(f"rollout, prefix cache, model {size}")
            with _started(cluster, settings.folder, size, "float32") as site:
                found += _prefix_cache(site, size, 1, _LONGEST, drawn=1, repeats=settings.repeats)
        with _started(cluster, settings.folder, "s", "bfloat16") as site:
            for batch in _BATCHES:
                settings.say(f"rollout, batch {batch}, bfloat16")
                found += _tokens(site, batch, "bfloat16", repeats=settings.repeats)
    return found


@contextmanager
def _started(cluster: Cluster, folder: Path, size: workload.Size, dtype: schema.DType) -> Iterator[_Site]:
    model = str(workload.save_model(folder / f"rollout_{size}", size))
    config = schema.Generator(dtype=dtype, max_sequences=max(_BATCHES), kv_cache_gib=_CACHE_GIB)
    ours = generator_request("bench", config, gpus=cluster.gpus)
    with cluster.reserve([ours, replace(ours, role="bare", reuse=None)]) as placement:
        site = _Site(
            placement.start("generator", Ours, config=config, model=model),
            placement.start("bare", Bare, config=config, model=model),
        )
        gather(site.ours.ready, site.bare.ready)
        yield site


def _tokens(site: _Site, batch: int, dtype: schema.DType, *, repeats: int) -> list[Figure]:
    prompts = _prompts(workload.prompts(batch))
    lengths = _lengths(site.ours.first(Ours.generate, prompts, _SAMPLING).result())

    def ours() -> float:
        site.ours.first(Ours.start, prompts, _SAMPLING).result()
        parts = [site.ours.first(Ours.next_finished, _PART) for _ in range(0, batch, _PART)]
        return float(sum(sum(_lengths(part.result().rollouts)) for part in parts))

    def bare(*, logprobs: bool) -> float:
        return site.bare.first(Bare.generate, prompts, lengths, logprobs=logprobs).result()

    ours_id, bare_id = _processes(site)
    ways: list[_Way] = [
        ("ours", ours_id, ours),
        ("bare", bare_id, lambda: bare(logprobs=True)),
        ("without logprobs", bare_id, lambda: bare(logprobs=False)),
    ]
    rates = _in_turn(site, ways, repeats)
    suffix = "" if dtype == "float32" else f"/{dtype}"
    return [
        from_pairs(
            f"rollout/tokens/{batch}{suffix}",
            list(zip(rates["ours"], rates["bare"], strict=True)),
            unit="tokens/CPU-s",
            at_least=_BATCHES[batch] if dtype == "float32" else None,
        ),
        from_pairs(
            f"rollout/tokens_beside_vllm_without_logprobs/{batch}{suffix}",
            list(zip(rates["ours"], rates["without logprobs"], strict=True)),
            unit="tokens/CPU-s",
        ),
    ]


def _prefix_cache(
    site: _Site, size: workload.Size, count: int, longest: int, *, drawn: int, repeats: int
) -> list[Figure]:
    """Eight samples of at most `longest` tokens for each of `drawn` prompts, `count` at once; and by vLLM alone."""
    sampling = schema.Sampling(max_new_tokens=longest, samples_per_prompt=_SIBLINGS)
    prompts = _prompts(workload.prompts(drawn, shortest=_SHARED_PROMPT, longest=_SHARED_PROMPT))
    batches = [prompts.select(list(range(start, start + count))) for start in range(0, drawn, count)]
    each = [batch.select([row for row in range(count) for _ in range(_SIBLINGS)]) for batch in batches]
    lengths = [_lengths(site.ours.first(Ours.generate, batch, sampling).result()) for batch in batches]

    def ours(*, cached: bool) -> float:
        calls = (site.ours.first(Ours.generate, batch, sampling, cached=cached) for batch in batches)
        return float(sum(sum(_lengths(call.result())) for call in calls))

    def bare(*, cached: bool) -> float:
        calls = (site.bare.first(Bare.generate, *rows, cached=cached) for rows in zip(each, lengths, strict=True))
        return sum(call.result() for call in calls)

    ways: list[_Way] = [
        (f"{name} {cached}", process, partial(way, cached=cached))
        for name, way, process in zip(("ours", "bare"), (ours, bare), _processes(site), strict=True)
        for cached in (True, False)
    ]
    rates = _in_turn(site, ways, repeats)

    def figure(name: str, whose: str, at_least: float | None) -> Figure:
        pairs = list(zip(rates[f"{whose} True"], rates[f"{whose} False"], strict=True))
        return from_pairs(f"{name}/{count}x{longest}/{size}", pairs, unit="tokens/CPU-s", at_least=at_least)

    return [
        figure("rollout/prefix_cache", "ours", 1.5),
        figure("rollout/prefix_cache_of_vllm", "bare", None),
    ]


def _processes(site: _Site) -> tuple[int, int]:
    """The process ids of both sides."""
    return site.ours.first(Ours.process).result(), site.bare.first(Bare.process).result()


def _in_turn(site: _Site, ways: Sequence[_Way], repeats: int) -> dict[str, list[float]]:
    """Each way's rates, after one repeat to warm up; every round begins with another way."""
    found: dict[str, list[float]] = {name: [] for name, _, _ in ways}
    for turn in range(-1, repeats):
        start = turn % len(ways)
        for name, process, work in (*ways[start:], *ways[:start]):
            gather(site.ours.first(Ours.forget), site.bare.first(Bare.forget))
            took = cost(work, processes=partial(list[int], [process]))
            if turn >= 0:
                found[name].append(took.per_cpu_second)
    return found


def _prompts(token_ids: list[list[int]]) -> Prompts:
    count = len(token_ids)
    return Prompts(
        token_ids=token_ids,
        texts=[workload.text(tokens) for tokens in token_ids],
        answers=[None] * count,
        ids=list(range(count)),
        repeats=[0] * count,
    )


def _lengths(rollouts: Rollouts) -> list[int]:
    return [int(length) for length in rollouts.sequences.response_mask.sum(1)]
