"""What the schema cannot say: rules between settings, and `check`'s warnings.

Every rule runs, and each has its own message. Nothing here opens a data file, imports torch or reaches the hub.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_ray.config.collect_rules import collect_rules, collected_source_rules
from rlhf_ray.config.dpo_rules import dpo_rules
from rlhf_ray.config.effects import generator_of, learners, rewards_of, without_effect
from rlhf_ray.config.layouts import sharing_rules
from rlhf_ray.config.paths import check_model_path, check_source, is_local
from rlhf_ray.config.ppo_rules import ppo_rules
from rlhf_ray.config.problems import KeyPath, Problem, is_set, suggestion
from rlhf_ray.config.role_rules import (
    NAME,
    active_filters,
    adapter_rules,
    generator_rules,
    learner_rules,
    reward_names,
    scorer_rules,
)
from rlhf_ray.config.schema import (
    ClassifierReward,
    Collect,
    Dpo,
    FunctionReward,
    ModelReward,
    NewModel,
    Pipeline,
    Policy,
    Ppo,
    Reward,
    RewardModel,
    SampledPolicy,
    Section,
    Sft,
    Stage,
)

PREFERENCE_METRICS = (
    "accuracy",
    "loss",
    "margin",
    "accuracy_chosen_longer",
    "accuracy_chosen_shorter",
    "calibration_error",
)
DPO_METRICS = (*PREFERENCE_METRICS, "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob")
SAMPLE_METRICS = ("length_mean", "finished_share", "distinct_bigram_share")


def check_rules(pipeline: Pipeline, *, pipeline_dir: Path) -> list[Problem]:
    """Every broken rule of a pipeline whose sections are valid each by itself.

    `pipeline_dir` is the folder of the pipeline file, beside which reward functions are found.
    """
    problems = [*_stage_names(pipeline), *_run(pipeline)]
    for index, stage in enumerate(pipeline.stages):
        path = ("stages", index)
        problems += _stage(pipeline, index)
        problems += scorer_rules(rewards_of(stage), (*path, "reward"), pipeline_dir=pipeline_dir)
        generator = generator_of(stage)
        if generator is not None:
            problems += generator_rules(generator, (*path, "generator"))
        if isinstance(stage, Ppo | Dpo):
            problems += adapter_rules(stage, path)
        match stage:
            case Ppo():
                problems += ppo_rules(stage, path)
            case Collect():
                problems += collect_rules(stage, path)
            case Dpo():
                problems += [*_steps(stage, path), *dpo_rules(stage, path)]
            case _:
                problems += _steps(stage, path)
        problems += _context(pipeline, index)
        problems += sharing_rules(pipeline, index)
    for silent in without_effect(pipeline):
        if is_set(pipeline, silent.path):
            problems.append(silent)
    return problems


def warnings(pipeline: Pipeline) -> list[str]:
    """What is allowed but worth a look, one line each, for `rlhf-ray check`."""
    lines = []
    for stage in pipeline.stages:
        if stage.data.evaluation is None and not isinstance(stage, Collect):
            lines.append(f"{stage.name}: no data.evaluation, so nothing is measured on held-out data")
        lines += [f"{stage.name}.{line}" for line in _model_warnings(stage)]
        if isinstance(stage, Ppo):
            filters = active_filters(stage.sampling)
            if filters:
                lines.append(
                    f"{stage.name}.sampling: with {', '.join(filters)} the generator's distribution is not the "
                    "policy's; its log-probabilities are those after the filter"
                )
            if stage.generator.dtype == "bfloat16" and stage.correction.mode == "off":
                lines.append(
                    f"{stage.name}.correction.mode: off, though the generator runs in bfloat16; its rounding goes "
                    "uncorrected"
                )
        if isinstance(stage, Ppo | Collect):
            at_once = stage.prompts_per_iteration if isinstance(stage, Ppo) else stage.prompts_per_batch
            if stage.generator.workers > at_once:
                lines.append(
                    f"{stage.name}.generator.workers: {stage.generator.workers} engines for {at_once} prompts; some "
                    "stay idle"
                )
    return lines


def _stage_names(pipeline: Pipeline) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, stage in enumerate(pipeline.stages):
        path = ("stages", index, "name")
        if not NAME.fullmatch(stage.name):
            yield Problem(path, f"got {stage.name!r}, wanted letters, digits, `_` and `-` only: it names a folder")
        elif stage.name in Pipeline.model_fields:
            yield Problem(path, f"got {stage.name!r}, which is a setting of the pipeline; choose another name")
        if stage.name in first:
            yield Problem(
                path,
                f"got {stage.name!r}, the name of stage {first[stage.name] + 1} too; wanted a `name` for each stage",
                because=(("stages", first[stage.name], "name"),),
            )
        first.setdefault(stage.name, index)


def _run(pipeline: Pipeline) -> Iterator[Problem]:
    if not pipeline.run_dir.strip():
        yield Problem(("run_dir",), "got nothing, wanted the folder of this run")
    elif Path(pipeline.run_dir).is_file():
        yield Problem(("run_dir",), f"got {pipeline.run_dir!r}, which is a file; wanted a folder, new or empty")
    if pipeline.tracking.wandb is not None and importlib.util.find_spec("wandb") is None:
        yield Problem(
            ("tracking", "wandb"), "the wandb package is not installed; install it: pip install 'rlhf_ray[wandb]'"
        )
    transport = pipeline.placement.transport
    if transport in ("nccl", "cuda_ipc"):
        for index, stage in enumerate(pipeline.stages):
            generator = generator_of(stage)
            if generator is None or isinstance(stage, Collect):
                continue
            if isinstance(stage.policy, Policy) and stage.policy.lora is not None:
                yield Problem(
                    ("placement", "transport"),
                    f"got {transport}, wanted auto, shared_memory or gloo: {stage.name} sends adapters, which vLLM "
                    "reads from files",
                    because=(("stages", index, "policy", "lora"),),
                )
            for role, workers in (("policy", stage.policy), ("generator", generator)):
                if workers.gpus == 0:
                    yield Problem(
                        ("placement", "transport"),
                        f"got {transport}, which moves weights between GPUs, but {stage.name}.{role}.gpus is 0; "
                        "wanted auto, shared_memory or gloo",
                        because=(("stages", index, role, "gpus"),),
                    )


def _stage(pipeline: Pipeline, index: int) -> Iterator[Problem]:
    stage, path = pipeline.stages[index], ("stages", index)
    for key, section in _models(stage):
        yield from _model(pipeline, index, (*path, *key), section)
    for key, learner in learners(stage):
        yield from learner_rules(learner, (*path, *key))
        if isinstance(stage, RewardModel) and learner.lora is not None and learner.lora.quantise == "nf4":
            yield Problem(
                (*path, *key, "lora", "quantise"),
                "got nf4, wanted none: what it leaves is an adapter, and scorers take whole models only",
            )
    for split in ("train", "evaluation"):
        for position, source in enumerate(getattr(stage.data, split) or ()):
            where = (*path, "data", split, position)
            if source.stage is None:
                yield from check_source(source, where)
            else:
                yield from collected_source_rules(pipeline, index, source, where)
    best = stage.checkpoints.best
    if best is not None and not isinstance(stage, Collect):
        known = _evaluation_metrics(stage)
        if stage.data.evaluation is None:
            yield Problem(
                (*path, "checkpoints", "best"),
                f"got {best!r}, but nothing is evaluated; give data.evaluation",
                because=((*path, "data", "evaluation"),),
            )
        elif best not in known:
            yield Problem(
                (*path, "checkpoints", "best"),
                f"got {best!r}, wanted a metric of the evaluation: {', '.join(known)}{suggestion(best, known)}",
                because=((*path, "reward"),),
            )


def _evaluation_metrics(stage: Stage) -> list[str]:
    names: list[str] = []
    match stage:
        case RewardModel():
            names = [*PREFERENCE_METRICS]
        case Sft():
            names = ["loss", "perplexity"]
        case Ppo():
            names = _sample_metrics(stage.reward)
        case Dpo():
            names = [*DPO_METRICS]
            if stage.generator is not None:
                names += [*_sample_metrics(stage.reward), *(("kl_k1", "kl_k3") if stage.needs_reference else ())]
    return [f"evaluation/{name}" for name in names]


def _sample_metrics(rewards: Sequence[Reward]) -> list[str]:
    parts = [f"{name}_mean" for name in reward_names(rewards)] if len(rewards) > 1 else []
    return [*(("reward_mean", "reward_std") if rewards else ()), *SAMPLE_METRICS, *parts]


def _models(stage: Stage) -> list[tuple[KeyPath, Section]]:
    """The sections of a stage that name a model."""
    found: list[tuple[KeyPath, Section]] = [(("policy",), stage.policy)]
    if isinstance(stage, Ppo) and stage.critic is not None:
        found.append((("critic",), stage.critic))
    if isinstance(stage, Ppo | Dpo):
        found.append((("reference",), stage.reference))
    found += [
        (("reward", position), reward)
        for position, reward in enumerate(rewards_of(stage))
        if not isinstance(reward, FunctionReward)
    ]
    return found


def _model(pipeline: Pipeline, index: int, path: KeyPath, section: Section) -> Iterator[Problem]:
    model = getattr(section, "model", None)
    where = (*path, "model")
    if isinstance(model, NewModel):
        yield from _new_model(pipeline, index, path, section)
    elif isinstance(model, str):
        if model.startswith("stage:"):
            yield from _stage_reference(pipeline, index, where, section, model.removeprefix("stage:"))
        else:
            yield from check_model_path(model, where)
    if isinstance(section, Policy | SampledPolicy) and section.tokenizer is not None:
        if isinstance(model, NewModel):
            yield Problem(
                (*path, "tokenizer"),
                f"got {section.tokenizer!r}, but a fresh model comes with a tokenizer trained on the data; "
                "remove `tokenizer`",
                because=(where,),
            )
        else:
            yield from check_model_path(section.tokenizer, (*path, "tokenizer"), needs=())


def _new_model(pipeline: Pipeline, index: int, path: KeyPath, section: Section) -> Iterator[Problem]:
    stage = pipeline.stages[index]
    if not isinstance(stage, Sft):
        advice = (
            "put an sft stage with it first and name that here (`stage:NAME`)"
            if isinstance(section, Policy)
            else "leave `model` out, and the critic starts from the policy's"
        )
        yield Problem((*path, "model"), f"got a fresh model, wanted a trained one; {advice}")
    else:
        assert isinstance(stage.policy.model, NewModel)
        if stage.data.max_length > stage.policy.model.max_length:
            yield Problem(
                (*path[:2], "data", "max_length"),
                f"got {stage.data.max_length}, wanted at most the fresh model's max_length, "
                f"{stage.policy.model.max_length}",
                because=((*path, "model", "max_length"),),
            )


def _stage_reference(pipeline: Pipeline, index: int, where: KeyPath, section: Section, name: str) -> Iterator[Problem]:
    names = [stage.name for stage in pipeline.stages]
    others = tuple(("stages", other, "name") for other in range(len(names)))
    if isinstance(section, ClassifierReward):
        yield Problem(
            where, f"got 'stage:{name}', wanted a Hugging Face directory or hub name: no stage makes a classifier"
        )
    elif name not in names[:index]:
        if name == names[index]:
            text = "which is this stage itself"
        elif name in names:
            text = "which comes later; a stage can use the results of earlier ones only"
        elif not names[:index]:
            text = "but this is the first stage; wanted a Hugging Face directory or a hub name"
        else:
            text = f"wanted an earlier stage: {', '.join(names[:index])}{suggestion(name, names[:index])}"
        yield Problem(where, f"got 'stage:{name}', {text}", because=others)
    else:
        made_by = pipeline.stages[names.index(name)]
        if isinstance(made_by, Collect):
            yield Problem(where, f"got 'stage:{name}', which makes data and no model", because=others)
            return
        lora = made_by.policy.lora
        if lora is not None and lora.result == "adapter":
            yield Problem(
                where,
                f"got 'stage:{name}', which leaves an adapter, not a whole model; set {name}.policy.lora.result to "
                "merged",
                because=(("stages", names.index(name), "policy", "lora", "result"),),
            )
        scores = isinstance(made_by, RewardModel)
        may_score = isinstance(section, ModelReward) or isinstance(pipeline.stages[index], RewardModel)
        if isinstance(section, ModelReward) and not scores:
            yield Problem(
                where,
                f"got 'stage:{name}', which makes a language model; wanted a reward_model stage or a "
                "sequence-classification model with one logit",
                because=others,
            )
        elif scores and not may_score:
            yield Problem(
                where, f"got 'stage:{name}', which makes a reward model; wanted a language model", because=others
            )


def _model_warnings(stage: Stage) -> Iterator[str]:
    for key, section in _models(stage):
        model = getattr(section, "model", None)
        if not isinstance(model, str) or model.count("/") != 1 or is_local(model) or Path(model).exists():
            continue
        if Path(model).parent.is_dir():
            where = ".".join(map(str, key))
            yield (
                f"{where}.model: there is a folder {Path(model).parent}/ here but no {model}, so it is taken for a hub "
                f"name; write ./{model} for the folder"
            )


def _steps(stage: Sft | RewardModel | Dpo, path: KeyPath) -> Iterator[Problem]:
    if stage.epochs is not None and stage.steps is not None:
        yield Problem(
            (*path, "steps"),
            f"got steps {stage.steps} and epochs {stage.epochs:g}; wanted one of them",
            because=((*path, "epochs"),),
        )
    if stage.batch_size < stage.policy.workers:
        yield Problem(
            (*path, "batch_size"),
            f"got {stage.batch_size}, wanted at least one for each of {stage.policy.workers} policy workers",
            because=((*path, "policy", "workers"),),
        )


def _context(pipeline: Pipeline, index: int) -> Iterator[Problem]:
    """Prompt and response must fit into a fresh model of an earlier stage."""
    stage, path = pipeline.stages[index], ("stages", index)
    model = stage.policy.model
    maker: int = index
    seen: list[KeyPath] = [(*path, "policy", "model")]
    while isinstance(model, str) and model.startswith("stage:"):
        names = [earlier.name for earlier in pipeline.stages[:maker]]
        if model.removeprefix("stage:") not in names:
            return
        maker = names.index(model.removeprefix("stage:"))
        seen.append(("stages", maker, "policy", "model"))
        model = pipeline.stages[maker].policy.model
    if not isinstance(model, NewModel) or maker == index:
        return
    if not isinstance(stage, Ppo | Collect):
        if stage.data.max_length > model.max_length:
            yield Problem(
                (*path, "data", "max_length"),
                f"got {stage.data.max_length}, but the model holds {model.max_length} (max_length in its stage)",
                because=(*seen, (*seen[-1], "max_length")),
            )
        return
    lengths = stage.data.prompt_length
    prompt = lengths.max if lengths is not None else stage.data.max_prompt_tokens
    name = "data.prompt_length.max" if lengths is not None else "data.max_prompt_tokens"
    total = prompt + stage.sampling.max_new_tokens
    if total > model.max_length:
        yield Problem(
            (*path, "sampling", "max_new_tokens"),
            f"got {stage.sampling.max_new_tokens}, but with {name} {prompt} that makes {total} tokens, and the model "
            f"holds {model.max_length} (max_length in its stage); lower one of them",
            because=((*path, *name.split(".")), *seen, (*seen[-1], "max_length")),
        )
