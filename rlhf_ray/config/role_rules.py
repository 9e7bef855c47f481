"""Rules of the roles that several methods have: learners, generators, scorers, and how they sample."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_ray.config.paths import check_function
from rlhf_ray.config.problems import KeyPath, Problem
from rlhf_ray.config.schema import (
    Dpo,
    FunctionReward,
    Generator,
    Learner,
    Lora,
    Policy,
    Ppo,
    PromptData,
    Reward,
    Sampling,
)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""What names a folder or a metric."""

ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for; an adapter of another rank gets the next one."""


def reward_names(rewards: Sequence[Reward]) -> list[str]:
    """The scorers' names in the metrics, in order."""
    return [reward.name or reward.kind for reward in rewards]


def active_filters(sampling: Sampling) -> list[str]:
    """The sampling settings in use under which a token's probability is not the policy's own."""
    active = {
        "top_k": sampling.top_k > 0,
        "top_p": sampling.top_p < 1,
        "min_p": sampling.min_p > 0,
        "repetition_penalty": sampling.repetition_penalty != 1,
        "min_new_tokens": sampling.min_new_tokens > 0,
    }
    return [name for name, on in active.items() if on]


def sampling_rules(sampling: Sampling, where: KeyPath, *, greedy: str) -> Iterator[Problem]:
    """What the sampling of a stage cannot be; `greedy` says why it is not temperature 0."""
    if sampling.temperature == 0:
        yield Problem((*where, "temperature"), f"got 0, wanted above 0: {greedy}")
    if sampling.min_new_tokens > sampling.max_new_tokens:
        yield Problem(
            (*where, "min_new_tokens"),
            f"got {sampling.min_new_tokens}, wanted at most max_new_tokens, {sampling.max_new_tokens}",
            because=((*where, "max_new_tokens"),),
        )
    if "" in sampling.stop:
        yield Problem(
            (*where, "stop", sampling.stop.index("")), "got an empty text, wanted a string that ends responses"
        )


def prompt_rules(data: PromptData, path: KeyPath) -> Iterator[Problem]:
    """What the lengths of prompts cannot be."""
    lengths = data.prompt_length
    if lengths is None:
        return
    where = (*path, "prompt_length")
    if lengths.min > lengths.max:
        yield Problem((*where, "min"), f"got {lengths.min}, wanted at most `max`, {lengths.max}", ((*where, "max"),))
    elif lengths.max > data.max_prompt_tokens:
        yield Problem(
            (*where, "max"),
            f"got {lengths.max}, wanted at most data.max_prompt_tokens, {data.max_prompt_tokens}",
            because=((*path, "max_prompt_tokens"),),
        )
    if data.chat_template:
        yield Problem(
            where,
            "cuts plain text, so it cannot go with chat_template: true; remove one of them",
            because=((*path, "chat_template"),),
        )


def learner_rules(learner: Learner, path: KeyPath) -> Iterator[Problem]:
    """What a learner cannot be."""
    if learner.gpus is not None and learner.gpus > 1:
        yield Problem(
            (*path, "gpus"),
            f"got {learner.gpus:g}, wanted at most 1: a learner's worker uses one GPU; more of them are `workers`",
        )
    if learner.lora is not None and learner.lora.quantise == "nf4":
        yield from _four_bits(learner, learner.lora, path)


def _four_bits(learner: Learner, lora: Lora, path: KeyPath) -> Iterator[Problem]:
    where = (*path, "lora", "quantise")
    if importlib.util.find_spec("bitsandbytes") is None:
        yield Problem(where, "got nf4, but the bitsandbytes package is not installed; pip install bitsandbytes")
    if learner.gpus == 0:
        yield Problem(where, "got nf4, which needs a GPU, but gpus is 0", because=((*path, "gpus"),))
    if learner.zero == 3:
        yield Problem(
            where, "got nf4, wanted none, or zero 0 to 2: ZeRO 3 cannot share 4-bit weights", because=((*path, "zero"),)
        )
    if isinstance(learner, Policy) and lora.result == "merged":
        yield Problem(
            (*path, "lora", "result"),
            "got merged, wanted adapter: it is trained on weights in 4 bits, which no whole model has",
            because=(where,),
        )


def generator_rules(generator: Generator, where: KeyPath) -> Iterator[Problem]:
    """What an engine cannot be."""
    if generator.tensor_parallel == 1:
        if generator.gpus is not None and generator.gpus > 1:
            yield Problem(
                (*where, "gpus"),
                f"got {generator.gpus:g}, wanted at most 1 unless tensor_parallel shares the model among them",
                because=((*where, "tensor_parallel"),),
            )
    elif generator.engine == "hf":
        yield Problem(
            (*where, "tensor_parallel"),
            f"got {generator.tensor_parallel}, wanted 1: the hf engine uses one device",
            because=((*where, "engine"),),
        )
    elif generator.gpus is not None and generator.gpus != generator.tensor_parallel:
        yield Problem(
            (*where, "tensor_parallel"),
            f"got {generator.tensor_parallel}, but each worker has gpus: {generator.gpus:g}; wanted the same number",
            because=((*where, "gpus"),),
        )


def adapter_rules(stage: Ppo | Dpo, path: KeyPath) -> Iterator[Problem]:
    """What an adapter cannot be for the engines and the reference beside it."""
    lora = stage.policy.lora
    if lora is None:
        return
    if stage.reference.adapter_off and stage.reference.model is not None:
        yield Problem(
            (*path, "reference", "adapter_off"),
            f"got true, but reference.model is a network of its own ({stage.reference.model}); remove one of them",
            because=((*path, "reference", "model"),),
        )
    generator = stage.generator
    if generator is not None and lora.quantise == "nf4":
        yield Problem(
            (*path, "policy", "lora", "quantise"),
            "got nf4, wanted none: the generator's weights are not in 4 bits, so it would sample from another network",
            because=((*path, "generator"),),
        )
    if generator is not None and generator.engine == "vllm" and lora.rank > ADAPTER_RANKS[-1]:
        yield Problem(
            (*path, "policy", "lora", "rank"),
            f"got {lora.rank}, wanted at most {ADAPTER_RANKS[-1]}, which is all that vLLM takes",
            because=((*path, "generator", "engine"),),
        )


def scorer_rules(rewards: Sequence[Reward], path: KeyPath, *, pipeline_dir: Path) -> Iterator[Problem]:
    """What scorers cannot be; `path` is that of their list."""
    names = reward_names(rewards)
    for position, reward in enumerate(rewards):
        where = (*path, position)
        if names[position] in names[:position]:
            yield Problem(
                (*where, "name"),
                f"got {names[position]!r}, the name of another reward too; give each a `name` of its own",
                because=(path,),
            )
        if reward.name is not None and not NAME.fullmatch(reward.name):
            yield Problem(
                (*where, "name"), f"got {reward.name!r}, wanted letters, digits, `_` and `-`: it names metrics"
            )
        if isinstance(reward, FunctionReward):
            yield from check_function(reward, where, pipeline_dir)
    if rewards and all(reward.weight == 0 for reward in rewards):
        yield Problem(
            (*path, 0, "weight"), "got 0 for every reward, so there is none; wanted a weight for one at least"
        )
