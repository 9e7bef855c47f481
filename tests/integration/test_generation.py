"""vLLM in a Ray actor against transformers: same numbers, same ends, seeded samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Prompts, Rollouts
from rlhf_ray.distributed.groups import WorkerGroup
from rlhf_ray.distributed.placement import Cluster, RoleRequest
from rlhf_ray.engines.hf_generation import HfEngine, filtered_logprobs
from rlhf_ray.engines.vllm_generation import engine_environment
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.loading import load_causal_lm, load_tokenizer
from rlhf_ray.workers.generator import Generator
from tests.tiny_models import make_gpt2, make_llama

Start = Callable[..., WorkerGroup[Generator]]
CONFIG = schema.Generator(max_sequences=16)


@pytest.fixture(scope="module")
def start(cluster: Cluster) -> Iterator[Start]:
    """Starts one generator, in the process of the one before."""
    with ExitStack() as stack:
        running: list[Any] = []

        def one(
            model: str,
            *,
            max_model_len: int = 160,
            seed: int = 1,
            lora: schema.Lora | None = None,
            config: schema.Generator = CONFIG,
            worker: type[Generator] = Generator,
        ) -> WorkerGroup[Generator]:
            for placement in running:
                placement.close()
            request = RoleRequest("generator", env=engine_environment(CONFIG, gpu=False), reuse="generator")
            placement = stack.enter_context(cluster.reserve([request]))
            running[:] = [placement]
            group = placement.start(
                "generator",
                worker,
                config=config,
                model=model,
                revision=None,
                tokenizer=model,
                max_model_len=max_model_len,
                seed=seed,
                lora=lora,
            )
            group.ready.result()
            return group

        yield one


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    ending = Path(make_llama(folder / "ending", seed=2, tied=False))
    (ending / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *range(240, 300)]}))
    return {
        "tied llama": make_llama(folder / "tied"),
        "llama of many ends": str(ending),
        "gpt2": make_gpt2(folder / "gpt2"),
    }


def make_prompts(model: str) -> Prompts:
    texts = ["The film by Anna was", "I hated it, and", "story"]
    tokenizer = load_tokenizer(model)
    tokens = [tokenizer(text)["input_ids"] for text in texts]
    return Prompts(token_ids=tokens, texts=texts, answers=[None] * 3, ids=[5, 2, 9], repeats=[0, 0, 0])


def responses(rollouts: Rollouts) -> list[list[int]]:
    masks = rollouts.sequences.response_mask
    return [rollouts.sequences.tokens[row][mask].tolist() for row, mask in enumerate(masks)]


@torch.no_grad()
def recomputed(model: Any, rollouts: Rollouts, sampling: schema.Sampling) -> torch.Tensor:
    """[B, T] the samples' log-probabilities by transformers, step by step through the same filters."""
    found = torch.zeros(rollouts.sequences.tokens.shape)
    for row, length in enumerate(rollouts.sequences.lengths().tolist()):
        tokens = rollouts.sequences.tokens[row, :length]
        logits = model(tokens[None], use_cache=False).logits[0]
        for position in rollouts.sequences.response_mask[row].nonzero().flatten().tolist():
            step = filtered_logprobs(logits[position - 1].clone(), tokens[:position], sampling)
            found[row, position] = step[tokens[position]]
    return found


FILTERS = schema.Sampling(
    temperature=0.7, top_k=60, top_p=0.9, min_p=0.01, repetition_penalty=1.2, max_new_tokens=24, samples_per_prompt=2
)


@pytest.mark.parametrize("name", ["tied llama", "llama of many ends", "gpt2"])
def test_engine_agrees_with_transformers(name: str, models: dict[str, str], start: Start) -> None:
    model, prompts = models[name], make_prompts(models[name])
    generator = start(model)
    oracle = load_causal_lm(model)

    probe = generator.first(Generator.probe).result()
    logits = torch.stack([oracle(row[None], use_cache=False).logits[0] for row in probe.sequences.tokens]).detach()
    expected = logits[:, :-1].log_softmax(-1).gather(2, probe.sequences.tokens[:, 1:, None])[..., 0]
    assert (probe.logprobs[:, 1:] - expected).abs().max() < 1e-4
    assert probe.sequences.tokens.shape == (4, 81)
    assert torch.equal(probe.sequences.tokens[:, -1], logits[:, -2].argmax(-1))

    for sampling in (schema.Sampling(max_new_tokens=24, samples_per_prompt=3), FILTERS):
        sampled = generator.split(Generator.generate, prompts, sampling, iteration=1).result()
        assert (sampled.generator_logprobs - recomputed(oracle, sampled, sampling)).abs().max() < 1e-4

    # Seeds: the same tokens and numbers whatever else is in the batch, others in another iteration.
    sampling = schema.Sampling(max_new_tokens=24, samples_per_prompt=3)
    whole = generator.split(Generator.generate, prompts, sampling, iteration=1).result()
    part = generator.split(Generator.generate, prompts.select([2, 1]), sampling, iteration=1).result()
    assert responses(part) == responses(whole)[6:] + responses(whole)[3:6]
    values = whole.generator_logprobs[whole.sequences.response_mask].tolist()
    again = part.select([3, 4, 5, 0, 1, 2])
    assert values[-sum(map(len, responses(part))) :] == again.generator_logprobs[again.sequences.response_mask].tolist()
    assert len({tuple(row) for row in responses(whole)}) == 9
    later = generator.split(Generator.generate, prompts, sampling, iteration=2).result()
    assert responses(later) != responses(whole)

    # Greedy: token for token what transformers says, end and text included.
    greedy = schema.Sampling(temperature=0.0, max_new_tokens=16)
    engine = HfEngine(config=CONFIG, model=model, revision=None, tokenizer=model, max_model_len=160)
    found = generator.split(Generator.generate, prompts, greedy, iteration=1).result()
    samples = engine.generate(prompts.token_ids, greedy, seeds=[0] * 3)
    assert responses(found) == [sample.token_ids for sample in samples]
    assert found.finished.tolist() == [sample.finished for sample in samples]


def test_responses_end_where_they_should(models: dict[str, str], start: Start) -> None:
    model = models["llama of many ends"]
    generator, prompts = start(model), make_prompts(model)

    def sample(**settings: Any) -> Rollouts:
        sampling = schema.Sampling(max_new_tokens=8, samples_per_prompt=8, **settings)
        return generator.split(Generator.generate, prompts, sampling, iteration=1).result()

    free = sample()
    for tokens, finished in zip(responses(free), free.finished.tolist(), strict=True):
        ends = [token == 2 or token >= 240 for token in tokens]
        assert ends == [False] * (len(ends) - 1) + [finished], "an end token is kept, and is the last one"
        assert finished or len(tokens) == 8
    assert set(free.finished.tolist()) == {True, False}
    assert min(map(len, responses(sample(min_new_tokens=6)))) >= 6

    # The same seeds with a stop string that one of these responses has in it.
    row, stop = next(
        (row, c) for row, text in enumerate(free.responses) for c in text[1:] if c.isascii() and c.isalpha()
    )
    stopped = sample(stop=(stop,))
    assert stopped.finished[row]
    assert stopped.responses[row] == free.responses[row][: free.responses[row].index(stop)]
    kept = responses(stopped)[row]
    assert kept == responses(free)[row][: len(kept)], "the tokens of the stop string are kept"
    assert stop in load_tokenizer(model).decode(kept)


def test_more_prompts_than_one_step_of_the_engine_takes(models: dict[str, str], start: Start) -> None:
    generator = start(models["tied llama"])
    texts = [f"{number} " + "The film by Anna was long. " * 8 for number in range(12)]
    tokens = [load_tokenizer(models["tied llama"])(text)["input_ids"][:150] for text in texts]
    assert sum(map(len, tokens)) > 1024
    prompts = Prompts(tokens, texts, [None] * len(texts), list(range(len(texts))), [0] * len(texts))
    sampling = schema.Sampling(max_new_tokens=2)
    together = generator.first(Generator.generate, prompts, sampling, iteration=1).result()
    alone = generator.first(Generator.generate, prompts.select([11]), sampling, iteration=1).result()
    assert responses(together)[11] == responses(alone)[0]


class CountingGenerator(Generator):
    """A generator that counts what its engine does."""

    def counted(self, prompts: Prompts, sampling: schema.Sampling) -> tuple[Rollouts, dict[str, int]]:
        """Responses, tokens that went through the model, blocks that were copied, and times that one was put back."""
        scheduler = self.engine._llm.llm_engine.engine_core.engine_core.scheduler
        schedule, steps = type(scheduler).schedule, []
        scheduler.schedule = lambda *args, **kwargs: steps.append(schedule(scheduler, *args, **kwargs)) or steps[-1]
        rollouts = self.generate(prompts, sampling, iteration=1)
        del scheduler.schedule
        return rollouts, {
            "tokens": sum(step.total_num_scheduled_tokens for step in steps),
            "copies": sum(len(step.kv_cache_block_copies or ()) for step in steps),
            "put back": sum(len(step.preempted_req_ids or ()) for step in steps),
        }


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_sequences": 3}, {"kv_cache_gib": 0.0002}],
    ids=["all at once", "three at once", "in too little memory"],
)
def test_samples_of_one_prompt_compute_it_once(settings: dict[str, Any], models: dict[str, str], start: Start) -> None:
    """Whatever its length beside the cache's blocks of 32, and each goes on as if it had computed all of it."""
    model = models["llama of many ends"]
    tokens = load_tokenizer(model)("The film by Anna was long, and I hated it. " * 8)["input_ids"]
    lengths = (7, 32, 33, 90)
    prompts = Prompts(
        [tokens[place : place + n] for place, n in enumerate(lengths)], [""] * 4, [None] * 4, [0, 1, 2, 3], [0] * 4
    )
    sampling = schema.Sampling(min_new_tokens=2, max_new_tokens=40, samples_per_prompt=4)
    found = {}
    for caching in (True, False):
        config = CONFIG.model_copy(update={"prefix_caching": caching, **settings})
        generator = start(model, config=config, worker=CountingGenerator)
        found[caching] = generator.first(CountingGenerator.counted, prompts, sampling).result()
    (shared, did), (apart, did_apart) = found[True], found[False]
    assert responses(shared) == responses(apart)
    assert (shared.generator_logprobs - apart.generator_logprobs).abs().max() < 1e-5
    assert len({len(response) for response in responses(shared)}) > 3
    decoded = sum(len(response) - 1 for response in responses(shared))
    if settings:
        assert did["tokens"] < did_apart["tokens"]
        assert (did["put back"] > 0) == ("kv_cache_gib" in settings)
    else:
        # A prompt of 33 tokens has a whole block before its last token, which is computed anyway.
        assert did == {"tokens": decoded + sum(lengths) + 3 * len(lengths), "copies": 3 * 3, "put back": 0}
        assert did_apart == {"tokens": decoded + 4 * sum(lengths), "copies": 0, "put back": 0}


def test_a_model_that_is_too_short_is_refused(models: dict[str, str], start: Start) -> None:
    with pytest.raises(ConfigError, match=r"may take 300 tokens, the model's longest sequence is 256"):
        start(models["gpt2"], max_model_len=300)


def test_adapters_that_vllm_has_no_room_for(models: dict[str, str], start: Start) -> None:
    """And an engine that waits for an adapter computes what the base does, as does the next one in its process."""
    for name, wrong, message in (
        ("gpt2", schema.Lora(), r"no adapters for GPT2LMHeadModel; set generator\.engine=hf"),
        ("tied llama", schema.Lora(target_modules=("lm_head",)), r"policy\.lora\.target_modules: got lm_head"),
    ):
        with pytest.raises(ConfigError, match=message):
            start(models[name], lora=wrong)
    probes = [
        start(models["tied llama"], lora=lora).first(Generator.probe).result().logprobs
        for lora in (schema.Lora(rank=9), None)
    ]
    assert (probes[0] - probes[1]).abs().max() < 1e-5
