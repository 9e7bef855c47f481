"""A model without training: a reward model's agreement with preferences, and responses to prompts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from rlhf_ray.config import schema
from rlhf_ray.config.paths import check_model_path
from rlhf_ray.data.batches import Prompts, Rollouts
from rlhf_ray.data.pair_scores import answer_rollouts
from rlhf_ray.data.preferences import load_preferences
from rlhf_ray.data.prompts import encode_prompts, load_prompts
from rlhf_ray.distributed.groups import RayGroup, WorkerGroup
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.loading import load_config, load_tokenizer, quiet_transformers
from rlhf_ray.models.merging import ADAPTER, merge_adapter
from rlhf_ray.shapes import SequenceFloat
from rlhf_ray.stages.actors import generator_request, own_part, scorer_requests
from rlhf_ray.stages.site import absolute
from rlhf_ray.trainers.preference_report import PreferenceReport, report_pairs
from rlhf_ray.trainers.responses import Responses
from rlhf_ray.workers.generator import Generator
from rlhf_ray.workers.scorers import FunctionScorer, ModelScorer, RewardScorer

_ROWS_AT_A_TIME = 256
"""Rows that one worker gets in one call; between calls the progress moves on."""


@dataclass(frozen=True)
class Generation:
    """What is asked of one model, or of two on the same prompts.

    Args:
        models: directories of a model, a stage or a run, or hub names.
        prompts: data of prompts (its `train` is read), or texts.
        chat: put texts into the tokenizer's chat template.
        sampling: how responses are sampled; under beam search its length and number alone are read.
        beams: responses that beam search follows; None samples.
        length_penalty: under beam search a response's log-probability is divided by its length to this power.
        seed: root of the seeds, the same for each model.
        generator: the engines.
        reward: what scores the responses, if anything does.
    """

    models: tuple[str, ...]
    prompts: schema.PromptData | tuple[str, ...]
    chat: bool
    sampling: schema.Sampling
    beams: int | None
    length_penalty: float
    seed: int
    generator: schema.Generator
    reward: schema.ModelReward | schema.FunctionReward | None


def evaluate(
    model: str, data: schema.PreferenceData, *, scorer: schema.ModelReward, address: str | None
) -> PreferenceReport:
    """How well a reward model agrees with preferences.

    Args:
        model: directory of a reward model, a reward_model stage or a run with one, or a hub name.
        data: the pairs; `train` is read.
        scorer: the workers; its model is not read.
        address: a Ray cluster; None: as `placement.address`.

    Raises:
        UserError: model or data is wrong; before the model is loaded.
    """
    quiet_transformers()
    found = find_model(model, scores=True)
    longest = _check_reward_model(found)
    tokenizer = load_tokenizer(found)
    if longest is not None and longest < data.max_length:
        data = data.model_copy(update={"max_length": longest})
    pairs = load_preferences(data, tokenizer, seed=0, sources="train")
    _say(f"{found}: {len(pairs)} pairs of {pairs.report['rows']} rows{_left_out(pairs.report)}")
    both = Rollouts.concat(answer_rollouts(pairs, range(len(pairs)), tokenizer))
    with _cluster(address) as cluster, _scorer(cluster, scorer, found, policy=found) as group:
        chosen, rejected = _score(group, both).chunk(2)
    return report_pairs(chosen, rejected, pairs.all())


def generate(asked: Generation, *, address: str | None) -> list[Responses]:
    """Responses of each model, with their scores.

    Raises:
        UserError: a model, the prompts or the reward is wrong; before a model is loaded.
    """
    quiet_transformers()
    with tempfile.TemporaryDirectory(prefix="rlhf_ray_") as folder:
        found = [find_model(name, scores=False) for name in asked.models]
        for name in found:
            _check_language_model(name)
        if isinstance(asked.reward, schema.ModelReward):
            asked = _with_reward_model(asked, asked.reward)
        models = [
            merge_adapter(name, Path(folder) / str(i)) if _is_adapter(name) else name for i, name in enumerate(found)
        ]
        prompts = [_prompts(asked, name) for name in models]
        _say(f"{len(prompts[0].ids)} prompts, {asked.sampling.samples_per_prompt} responses each")
        with _cluster(address) as cluster:
            rollouts = [_generate(cluster, asked, *each) for each in zip(models, prompts, strict=True)]
            scores = _scores(cluster, asked.reward, models, rollouts)
    return [
        Responses(name, asked.seed, rollouts=each, scores=score)
        for name, each, score in zip(asked.models, rollouts, scores, strict=True)
    ]


# Models


def find_model(name: str, *, scores: bool) -> str:
    """The model behind the directory of a model, of a stage or of a run (its last model of the kind), or a hub name.

    Args:
        scores: a reward model is wanted, not a language model.

    Raises:
        ConfigError: no such directory, or no such model in it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        for problem in check_model_path(name, ()):
            raise ConfigError(f"MODEL: {problem.text}")
        return name
    for each in (folder, folder / "model"):
        if _is_model(each):
            return str(each)
    kind = "reward model" if scores else "language model"
    found = [each for each in folder.glob("*/model") if _is_model(each) and _gives_scores(each) == scores]
    if not found:
        raise ConfigError(
            f"{name}: got a directory without a {kind}; wanted a Hugging Face model directory, the folder of a stage "
            "or of a run, or a hub name"
        )
    return str(max(found, key=lambda each: each.stat().st_mtime))


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or _is_adapter(str(folder))


def _is_adapter(name: str) -> bool:
    return (Path(name) / ADAPTER).is_file() and not (Path(name) / "config.json").is_file()


def _gives_scores(folder: Path) -> bool:
    if _is_adapter(str(folder)):
        return bool(json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS")
    return _is_classifier(load_config(str(folder)).architectures)


def _is_classifier(architectures: Sequence[str] | None) -> bool:
    return any("ForSequenceClassification" in architecture for architecture in architectures or ())


def _check_reward_model(name: str) -> int | None:
    """Raises ConfigError where the model is no reward model; else the longest text that it reads, where it says so."""
    if _is_adapter(name):
        raise ConfigError(
            f"{name}: got a peft adapter, wanted a whole reward model; set lora.result: merged in its stage, or merge "
            "it with peft's merge_and_unload"
        )
    config = load_config(name)
    if not _is_classifier(config.architectures) or config.num_labels != 1:
        architecture = ", ".join(config.architectures or ["an unknown architecture"])
        raise ConfigError(
            f"{name}: got {architecture} with {config.num_labels} outputs, wanted a reward model: a "
            "sequence-classification model with one output"
        )
    longest: int | None = getattr(config, "max_position_embeddings", None)
    return longest


def _check_language_model(name: str) -> None:
    if not _is_adapter(name) and _is_classifier(load_config(name).architectures):
        raise ConfigError(f"{name}: got a reward model or classifier, wanted a language model, which writes")


def _with_reward_model(asked: Generation, reward: schema.ModelReward) -> Generation:
    found = find_model(reward.model, scores=True)
    _check_reward_model(found)
    reward = reward.model_copy(update={"model": absolute(found)})
    return Generation(**{**vars(asked), "reward": reward})


# Prompts and pairs


def _prompts(asked: Generation, model: str) -> Prompts:
    """The prompts in the tokens of this model, all short enough for it."""
    tokenizer = load_tokenizer(model)
    longest = getattr(load_config(model), "max_position_embeddings", None)
    new_tokens = asked.sampling.max_new_tokens
    if longest is not None and new_tokens >= longest:
        raise ConfigError(
            f"--max-new-tokens: got {new_tokens}, wanted less than {longest}, the longest text of {model}"
        )
    if isinstance(asked.prompts, tuple):
        prompts = encode_prompts(asked.prompts, tokenizer, chat=asked.chat)
    else:
        data = asked.prompts
        if longest is not None:
            data = data.model_copy(update={"max_prompt_tokens": min(data.max_prompt_tokens, longest - new_tokens)})
        loaded = load_prompts(data, tokenizer, seed=asked.seed, sources="train")
        if _left_out(loaded.report):
            _say(f"{model}: {loaded.report['rows']} prompts{_left_out(loaded.report)}")
        prompts = loaded.all()
    for number, tokens in enumerate(prompts.token_ids, 1):
        if longest is not None and len(tokens) + new_tokens > longest:
            raise ConfigError(
                f"prompt {number}: got {len(tokens)} tokens, wanted at most {longest - new_tokens}: {model} takes "
                f"{longest}, and the response may take {new_tokens}; shorten it, or lower --max-new-tokens"
            )
    if not asked.chat and isinstance(asked.prompts, tuple) and tokenizer.chat_template:
        _say(f"{model}: the tokenizer has a chat template, which the prompts are not put into; --chat does that")
    return prompts


def _left_out(report: dict[str, int]) -> str:
    return "".join(f", {report[name]} {name}" for name in ("dropped", "cut") if report[name])


# Workers


@contextmanager
def _cluster(address: str | None) -> Iterator[Cluster]:
    settings = schema.Placement()
    _say("starting the workers")
    with Cluster(address, start_timeout_s=settings.start_timeout_s, call_timeout_s=settings.call_timeout_s) as cluster:
        yield cluster


def _generate(cluster: Cluster, asked: Generation, model: str, prompts: Prompts) -> Rollouts:
    settings, sampling = asked.generator, asked.sampling
    with cluster.reserve([generator_request("generate", settings, gpus=cluster.gpus)]) as placement:
        group = placement.start(
            "generator",
            Generator,
            config=own_part(settings, placement),
            model=absolute(model),
            revision=None,
            tokenizer=absolute(model),
            max_model_len=max(map(len, prompts.token_ids)) + sampling.max_new_tokens,
            seed=asked.seed,
        )
        group.ready.result()

        def answer(rows: Sequence[int]) -> Rollouts:
            part = prompts.select(rows)
            if asked.beams is None:
                return group.split(Generator.generate, part, sampling, iteration=0).result()
            return group.split(
                Generator.beam_search,
                part,
                beams=asked.beams,
                samples_per_prompt=sampling.samples_per_prompt,
                max_new_tokens=sampling.max_new_tokens,
                length_penalty=asked.length_penalty,
            ).result()

        per_call = max(1, _ROWS_AT_A_TIME * group.size // (asked.beams or sampling.samples_per_prompt))
        return Rollouts.concat(_in_parts(answer, len(prompts.ids), per_call, f"{model}: writing"))


@contextmanager
def _scorer(
    cluster: Cluster, reward: schema.ModelReward | schema.FunctionReward, model: str, *, policy: str
) -> Iterator[WorkerGroup[RewardScorer]]:
    (request,) = scorer_requests([reward])
    with cluster.reserve([request]) as placement:
        group: RayGroup[Any]
        if isinstance(reward, schema.FunctionReward):
            group = placement.start(request.role, FunctionScorer, config=reward, search_path=Path.cwd())
        else:
            group = placement.start(
                request.role, ModelScorer, config=reward, model=absolute(model), policy_tokenizer=absolute(policy)
            )
        group.ready.result()
        yield group


def _score(group: WorkerGroup[RewardScorer], rollouts: Rollouts) -> SequenceFloat:
    def score(rows: Sequence[int]) -> SequenceFloat:
        return group.split(RewardScorer.score, rollouts.select(rows)).result()

    return torch.cat(_in_parts(score, len(rollouts), _ROWS_AT_A_TIME * group.size, "scoring"))


def _scores(
    cluster: Cluster,
    reward: schema.ModelReward | schema.FunctionReward | None,
    models: Sequence[str],
    rollouts: Sequence[Rollouts],
) -> Sequence[SequenceFloat | None]:
    """The scores of each model's responses."""
    if reward is None:
        return [None] * len(models)
    vocabularies = [load_tokenizer(model).get_vocab() for model in models]
    if isinstance(reward, schema.FunctionReward) or all(each == vocabularies[0] for each in vocabularies):
        with _scorer(cluster, reward, getattr(reward, "model", ""), policy=models[0]) as group:
            together = _score(group, Rollouts.concat(rollouts))
        return torch.split(together, [len(each) for each in rollouts])
    scores: list[SequenceFloat] = []
    for model, each in zip(models, rollouts, strict=True):
        with _scorer(cluster, reward, reward.model, policy=model) as group:
            scores.append(_score(group, each))
    return scores


def _in_parts(call: Callable[[Sequence[int]], Any], rows: int, per_call: int, what: str) -> list[Any]:
    """The results of a call for `per_call` rows at a time; a terminal shows how far it is."""
    console = Console(stderr=True)
    starts = range(0, rows, per_call)
    shown = track(starts, what, console=console, transient=True, disable=not console.is_terminal)
    return [call(range(start, min(start + per_call, rows))) for start in shown]


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, markup=False).print(text)
