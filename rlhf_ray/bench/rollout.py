"""Generator actors beside bare vLLM: the same prompts, and for each the same number of tokens.

Our side starts an iteration and takes its responses in parts as they end, through Ray, as PPO does: seeded samples,
log-probabilities, texts. The floor's requests end at the lengths that our samples have. Prefix caches are empty before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from rlhf_ray.bench import workload
from rlhf_ray.bench.bare_vllm import BareVllm
from rlhf_ray.bench.figures import Cost, Figure, Settings, cost, from_pairs
from rlhf_ray.config import schema
from rlhf_ray.data.batches import Prompts, Rollouts
from rlhf_ray.distributed.groups import WorkerGroup
from rlhf_ray.distributed.place import Place
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.stages.actors import generator_request
from rlhf_ray.workers.generator import Finished, Generator

_BATCHES = {64: 0.92, 128: 0.95}
_LONGEST = 128
_PART = 16
_SAMPLING = schema.Sampling(max_new_tokens=_LONGEST)
_SHARED_PROMPT, _SIBLINGS = 256, 8
# Prompts at once and the longest response: the less there is to decode, the more the cache is worth.
_SHARED = ((1, 32), (1, _LONGEST), (8, _LONGEST))
_DEADLINE_S = 300.0


class Contestants:
    """A generator with a prefix cache, one without, and bare vLLM, in one process."""

    def __init__(self, place: Place, *, config: schema.Generator, model: str) -> None:
        self.place = place
        length = _SHARED_PROMPT + _LONGEST

        def generator(*, cached: bool) -> Generator:
            settings = config.model_copy(update={"prefix_caching": cached})
            return Generator(
                place, config=settings, model=model, revision=None, tokenizer=model, max_model_len=length, seed=1
            )

        self._ours = {cached: generator(cached=cached) for cached in (True, False)}
        self._bare = BareVllm(model, config, max_model_len=length)

    def process(self) -> int:
        """Its process id."""
        return os.getpid()

    def forget(self) -> None:
        """Empties all prefix caches."""
        self._bare.forget()
        for generator in self._ours.values():
            generator.engine.reset_prefix_cache()

    def generate(self, prompts: Prompts, sampling: schema.Sampling, *, cached: bool = True) -> Rollouts:
        """All responses at once."""
        return self._ours[cached].generate(prompts, sampling, iteration=1)

    def start(self, prompts: Prompts, sampling: schema.Sampling) -> None:
        """Starts the same responses."""
        self._ours[True].start(prompts, sampling, iteration=1)

    def next_finished(self, count: int) -> Finished:
        """The next of them."""
        return self._ours[True].next_finished(1, count)

    def bare(self, prompts: Prompts, lengths: Sequence[int], *, logprobs: bool) -> float:
        """The same by vLLM alone."""
        return self._bare.generate(prompts.token_ids, lengths, logprobs=logprobs)

    def close(self) -> None:
        """Ends our engines."""
        for generator in self._ours.values():
            generator.close()


def measure(settings: Settings) -> list[Figure]:
    """Tokens per CPU-second of the actor for each batch and type, and what the prefix cache is worth."""
    model = str(workload.save_model(settings.folder / "model"))
    found: list[Figure] = []
    dtypes: tuple[schema.DType, ...] = ("float32",) if settings.quick else ("float32", "bfloat16")
    with Cluster(None, call_timeout_s=_DEADLINE_S) as cluster:
        for dtype in dtypes:
            config = schema.Generator(dtype=dtype, max_sequences=max(_BATCHES), kv_cache_gib=0.5)
            with cluster.reserve([generator_request("bench", config, gpus=cluster.gpus)]) as placement:
                group = placement.start("generator", Contestants, config=config, model=model)
                group.ready.result()
                for batch in _BATCHES:
                    settings.say(f"rollout, batch {batch}, {dtype}")
                    found += _tokens(group, batch, dtype, repeats=settings.repeats)
                if dtype == "float32":
                    settings.say("rollout, prefix cache")
                    found += [_prefix_cache(group, *case, repeats=settings.repeats) for case in _SHARED]
    return found


def _tokens(group: WorkerGroup[Contestants], batch: int, dtype: schema.DType, *, repeats: int) -> list[Figure]:
    prompts = _prompts(workload.prompts(batch))
    lengths = _lengths(group.first(Contestants.generate, prompts, _SAMPLING).result())

    def ours() -> float:
        group.first(Contestants.start, prompts, _SAMPLING).result()
        parts = [group.first(Contestants.next_finished, _PART) for _ in range(0, batch, _PART)]
        return float(sum(sum(_lengths(part.result().rollouts)) for part in parts))

    def bare(*, logprobs: bool) -> float:
        return group.first(Contestants.bare, prompts, lengths, logprobs=logprobs).result()

    ways: dict[str, Callable[[], float]] = {
        "ours": ours,
        "bare": lambda: bare(logprobs=True),
        "without logprobs": lambda: bare(logprobs=False),
    }
    rates = {name: [run.per_cpu_second for run in runs] for name, runs in _in_turn(group, ways, repeats).items()}
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


def _prefix_cache(group: WorkerGroup[Contestants], count: int, longest: int, *, repeats: int) -> Figure:
    """Eight samples of at most `longest` tokens for each of `count` prompts, all at once."""
    shared = workload.prompts(count, shortest=_SHARED_PROMPT, longest=_SHARED_PROMPT)
    prompts = _prompts(shared)
    sampling = schema.Sampling(max_new_tokens=longest, samples_per_prompt=_SIBLINGS)

    def way(*, cached: bool) -> Callable[[], float]:
        return lambda: float(
            sum(_lengths(group.first(Contestants.generate, prompts, sampling, cached=cached).result()))
        )

    runs = _in_turn(group, {"on": way(cached=True), "off": way(cached=False)}, repeats)
    pairs = [(on.per_cpu_second, off.per_cpu_second) for on, off in zip(runs["on"], runs["off"], strict=True)]
    return from_pairs(f"rollout/prefix_cache/{count}x{longest}", pairs, unit="tokens/CPU-s", at_least=1.5)


def _in_turn(
    group: WorkerGroup[Contestants], ways: dict[str, Callable[[], float]], repeats: int
) -> dict[str, list[Cost]]:
    """Each way's repeats, after one to warm up; every round begins with another way."""
    actor = group.first(Contestants.process).result()
    names = list(ways)
    found: dict[str, list[Cost]] = {name: [] for name in names}
    for turn in range(-1, repeats):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            group.first(Contestants.forget).result()
            took = cost(ways[name], processes=lambda: [actor])
            if turn >= 0:
                found[name].append(took)
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
