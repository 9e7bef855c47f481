"""What the schema cannot say: rules between settings, settings without effect, and paths that do not exist.

Every rule runs, and each has its own message. Nothing here opens a data file, imports torch or reaches the hub.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from rlhf_ray.config.schema import (
    ClassifierReward,
    Critic,
    FunctionReward,
    Generator,
    Learner,
    ModelReward,
    NewModel,
    Pipeline,
    Policy,
    Ppo,
    Sampling,
    Section,
    Sft,
    Source,
)

KeyPath = tuple[str | int, ...]

DATA_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".csv")
SYNTHETIC = ("synthetic:reviews",)
RESERVED_NAMES = ("run_dir", "seed", "placement", "tracking", "stages")
GROUP_ESTIMATORS = ("group_relative", "leave_one_out", "reinforce_baseline")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, and in words what was got and what is wanted."""

    path: KeyPath
    """Where in the pipeline, such as ("stages", 0, "kl", "target")."""
    text: str
    """What was got, what is wanted, what to do."""
    because: tuple[KeyPath, ...] = ()
    """The other settings that the rule looked at."""


def suggestion(got: object, known: Iterable[object]) -> str:
    """`; did you mean ...?` with the nearest of the known words, or nothing."""
    near = difflib.get_close_matches(str(got), [str(word) for word in known], n=1)
    return f"; did you mean `{near[0]}`?" if near else ""


def check_rules(pipeline: Pipeline, *, pipeline_dir: Path) -> list[Problem]:
    """Every broken rule of a pipeline whose sections are valid each by itself.

    `pipeline_dir` is the folder of the pipeline file, beside which reward functions are found.
    """
    problems = [*_stage_names(pipeline), *_run(pipeline)]
    for index, stage in enumerate(pipeline.stages):
        path = ("stages", index)
        problems += _stage(pipeline, index)
        if isinstance(stage, Sft):
            problems += _sft(stage, path)
        else:
            problems += _ppo(stage, path)
            problems += _rewards(stage, path, pipeline_dir)
            problems += _context(pipeline, index, stage)
    for silent in without_effect(pipeline):
        if is_set(pipeline, silent.path):
            problems.append(silent)
    return problems


def warnings(pipeline: Pipeline) -> list[str]:
    """What is allowed but worth a look, one line each, for `rlhf-ray check`."""
    lines = []
    for stage in pipeline.stages:
        if stage.data.evaluation is None:
            lines.append(f"{stage.name}: no data.evaluation, so nothing is measured on held-out data")
        lines += [f"{stage.name}.{line}" for line in _model_warnings(stage)]
        if isinstance(stage, Ppo):
            filters = active_filters(stage.sampling)
            if filters:
                lines.append(
                    f"{stage.name}.sampling: {', '.join(filters)} make the generator's distribution differ from the "
                    "policy's; the correction for it uses the filtered log-probabilities"
                )
            if stage.generator.dtype == "bfloat16" and stage.correction.mode == "off":
                lines.append(
                    f"{stage.name}.correction.mode: off, though the generator runs in bfloat16; its rounding goes "
                    "uncorrected"
                )
            if stage.generator.workers > stage.prompts_per_iteration:
                lines.append(
                    f"{stage.name}.generator.workers: {stage.generator.workers} engines for "
                    f"{stage.prompts_per_iteration} prompts; some stay idle"
                )
    return lines


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


def is_set(section: Section, path: KeyPath) -> bool:
    """True where the pipeline file or an override gives this key a value."""
    value: object = section
    for component in path:
        if isinstance(value, Section):
            if component not in value.model_fields_set:
                return False
            value = getattr(value, str(component))
        elif isinstance(value, tuple) and isinstance(component, int):
            value = value[component]
        else:
            return False
    return value is not None


# ------------------------------------------------------------------------------------- pipeline


def _stage_names(pipeline: Pipeline) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, stage in enumerate(pipeline.stages):
        path = ("stages", index, "name")
        if not _NAME.fullmatch(stage.name):
            yield Problem(path, f"got {stage.name!r}, wanted letters, digits, `_` and `-` only: it names a folder")
        elif stage.name in RESERVED_NAMES:
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
            if not isinstance(stage, Ppo):
                continue
            for role, workers in (("policy", stage.policy), ("generator", stage.generator)):
                if workers.gpus == 0:
                    yield Problem(
                        ("placement", "transport"),
                        f"got {transport}, which moves weights between GPUs, but {stage.name}.{role}.gpus is 0; "
                        "wanted auto, shared_memory or gloo",
                        because=(("stages", index, role, "gpus"),),
                    )


# --------------------------------------------------------------------------- every kind of stage


def _stage(pipeline: Pipeline, index: int) -> Iterator[Problem]:
    stage, path = pipeline.stages[index], ("stages", index)
    for key, section in _models(stage):
        yield from _model(pipeline, index, (*path, *key), section)
    for key, learner in _learners(stage):
        yield from _learner(learner, (*path, *key))
    for split in ("train", "evaluation"):
        for position, source in enumerate(getattr(stage.data, split) or ()):
            yield from _source(source, (*path, "data", split, position))
    best = stage.checkpoints.best
    if best is not None:
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


def reward_names(stage: Ppo) -> list[str]:
    """The scorers' names in the metrics, in order."""
    return [reward.name or reward.kind for reward in stage.reward]


def _evaluation_metrics(stage: Sft | Ppo) -> list[str]:
    if isinstance(stage, Sft):
        return ["evaluation/loss", "evaluation/perplexity"]
    names = ["reward_mean", "reward_std", "length_mean", "finished_share", "distinct_bigram_share"]
    if len(stage.reward) > 1:
        names += [f"{name}_mean" for name in reward_names(stage)]
    return [f"evaluation/{name}" for name in names]


def _learners(stage: Sft | Ppo) -> list[tuple[KeyPath, Learner]]:
    learners: list[tuple[KeyPath, Learner]] = [(("policy",), stage.policy)]
    if isinstance(stage, Ppo) and stage.critic is not None:
        learners.append((("critic",), stage.critic))
    return learners


def _learner(learner: Learner, path: KeyPath) -> Iterator[Problem]:
    if learner.gpus is not None and learner.gpus > 1:
        yield Problem(
            (*path, "gpus"),
            f"got {learner.gpus:g}, wanted at most 1: a learner's worker uses one GPU; more of them are `workers`",
        )


def _models(stage: Sft | Ppo) -> list[tuple[KeyPath, Section]]:
    """The sections of a stage that name a model."""
    found: list[tuple[KeyPath, Section]] = [(("policy",), stage.policy)]
    if isinstance(stage, Ppo):
        if stage.critic is not None:
            found.append((("critic",), stage.critic))
        found.append((("reference",), stage.reference))
        found += [
            (("reward", position), reward)
            for position, reward in enumerate(stage.reward)
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
            yield from _model_path(model, where)
    if isinstance(section, Policy) and section.tokenizer is not None:
        if isinstance(model, NewModel):
            yield Problem(
                (*path, "tokenizer"),
                f"got {section.tokenizer!r}, but a fresh model comes with a tokenizer trained on the data; "
                "remove `tokenizer`",
                because=(where,),
            )
        else:
            yield from _model_path(section.tokenizer, (*path, "tokenizer"), needs=())


def _new_model(pipeline: Pipeline, index: int, path: KeyPath, section: Section) -> Iterator[Problem]:
    stage = pipeline.stages[index]
    if isinstance(stage, Ppo):
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
    elif isinstance(section, ModelReward):
        yield Problem(
            where,
            f"got 'stage:{name}', which makes a language model; wanted a sequence-classification model with one logit",
            because=others,
        )


def _model_path(model: str, where: KeyPath, *, needs: Sequence[str] = ("config.json",)) -> Iterator[Problem]:
    """What is certainly wrong with a model's name; `org/name` may be on the hub and is left to the stage's start."""
    if not model.strip():
        yield Problem(where, "got an empty text, wanted a directory or a hub name")
        return
    path = Path(model)
    if model.startswith("~"):
        yield Problem(where, f"got {model!r}, wanted a path without `~`: {path.expanduser()}")
    elif path.is_dir():
        missing = [name for name in needs if not (path / name).is_file()]
        if missing:
            yield Problem(
                where, f"got {model!r}, a directory without {missing[0]}; wanted a Hugging Face model directory"
            )
    elif path.exists():
        yield Problem(where, f"got {model!r}, a file; wanted a Hugging Face model directory")
    elif _is_local(model):
        yield Problem(where, f"got {model!r}, but there is no such directory{_nearest(path)}")


def _is_local(name: str) -> bool:
    """True where a name can only be a path: hub names are `name` or `org/name`."""
    return name.startswith((".", "/")) or name.count("/") > 1 or name.endswith("/") or "\\" in name


def _nearest(path: Path) -> str:
    """The nearest name beside a path that does not exist, or the first of its parents that is missing."""
    parent = path.parent
    if not parent.is_dir():
        while not parent.parent.is_dir() and parent != parent.parent:
            parent = parent.parent
        return f" (there is no {parent}; relative paths start at {Path.cwd()})"
    near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
    if near:
        return f"; did you mean `{parent / near[0]}`?"
    return "" if path.is_absolute() else f" (relative paths start at {Path.cwd()})"


def _source(source: Source, path: KeyPath) -> Iterator[Problem]:
    where, name = (*path, "path"), source.path
    if not name.strip():
        yield Problem(where, "got an empty text, wanted a data file, a directory, or a hub name")
        return
    if name.startswith("synthetic:"):
        if name not in SYNTHETIC:
            yield Problem(where, f"got {name!r}, wanted {' or '.join(SYNTHETIC)}{suggestion(name, SYNTHETIC)}")
        return
    file = Path(name)
    if name.startswith("~"):
        yield Problem(where, f"got {name!r}, wanted a path without `~`: {file.expanduser()}")
    elif file.is_file():
        if not name.endswith(DATA_ENDINGS):
            yield Problem(where, f"got {name!r}, wanted a file that ends in {', '.join(DATA_ENDINGS)}")
    elif not file.exists() and (_is_local(name) or name.endswith(DATA_ENDINGS)):
        yield Problem(where, f"got {name!r}, but there is no such file{_nearest(file)}")


def _model_warnings(stage: Sft | Ppo) -> Iterator[str]:
    for key, section in _models(stage):
        model = getattr(section, "model", None)
        if not isinstance(model, str) or model.count("/") != 1 or _is_local(model) or Path(model).exists():
            continue
        if Path(model).parent.is_dir():
            where = ".".join(map(str, key))
            yield (
                f"{where}.model: there is a folder {Path(model).parent}/ here but no {model}, so it is taken for a hub "
                f"name; write ./{model} for the folder"
            )


# ------------------------------------------------------------------------------------------ sft


def _sft(stage: Sft, path: KeyPath) -> Iterator[Problem]:
    if stage.epochs is not None and stage.steps is not None:
        yield Problem(
            (*path, "steps"),
            f"got steps {stage.steps} and epochs {stage.epochs:g}; wanted one of them",
            because=((*path, "epochs"),),
        )
    if stage.batch_size < stage.policy.workers:
        yield Problem(
            (*path, "batch_size"),
            f"got {stage.batch_size}, wanted at least one sequence for each of {stage.policy.workers} policy workers",
            because=((*path, "policy", "workers"),),
        )


# ------------------------------------------------------------------------------------------ ppo


def _ppo(stage: Ppo, path: KeyPath) -> Iterator[Problem]:
    yield from _estimator(stage, path)
    yield from _kl(stage, path)
    yield from _sampling(stage, path)
    yield from _batches(stage, path)
    yield from _generator(stage, path)
    lengths = stage.data.prompt_length
    if lengths is not None:
        where = (*path, "data", "prompt_length")
        if lengths.min > lengths.max:
            yield Problem(
                (*where, "min"), f"got {lengths.min}, wanted at most `max`, {lengths.max}", ((*where, "max"),)
            )
        elif lengths.max > stage.data.max_prompt_tokens:
            yield Problem(
                (*where, "max"),
                f"got {lengths.max}, wanted at most data.max_prompt_tokens, {stage.data.max_prompt_tokens}",
                because=((*path, "data", "max_prompt_tokens"),),
            )
        if stage.data.chat_template:
            yield Problem(
                where,
                "cuts plain text, so it cannot go with chat_template: true; remove one of them",
                because=((*path, "data", "chat_template"),),
            )


def _estimator(stage: Ppo, path: KeyPath) -> Iterator[Problem]:
    estimator = stage.advantages.estimator
    if estimator not in GROUP_ESTIMATORS:
        return
    cause = (*path, "advantages", "estimator")
    if stage.critic is not None:
        yield Problem(
            (*path, "critic"),
            f"got a critic, but {estimator} has none; remove it, or set advantages.estimator to gae",
            because=(cause,),
        )
    if stage.sampling.samples_per_prompt < 2:
        yield Problem(
            (*path, "sampling", "samples_per_prompt"),
            f"got {stage.sampling.samples_per_prompt}, wanted at least 2: {estimator} compares a prompt's samples",
            because=(cause,),
        )


def _kl(stage: Ppo, path: KeyPath) -> Iterator[Problem]:
    kl, where = stage.kl, (*path, "kl")
    place = stage.kl_place
    if place == "loss" and kl.estimator == "k1":
        yield Problem(
            (*where, "estimator"),
            "got k1, wanted k2 or k3: as a loss k1 has no expected gradient",
            because=((*where, "place"), (*path, "advantages", "estimator")),
        )
    if place == "off" or kl.controller != "adaptive":
        return
    if kl.target is None:
        yield Problem(
            (*where, "target"),
            "missing; the adaptive controller needs a target in nats per sequence, such as 6",
            because=((*where, "controller"), (*where, "place")),
        )
    if kl.coefficient == 0:
        yield Problem(
            (*where, "coefficient"),
            "got 0, wanted above 0: the adaptive controller multiplies it, so it would stay 0",
            because=((*where, "controller"), (*where, "place")),
        )


def _sampling(stage: Ppo, path: KeyPath) -> Iterator[Problem]:
    sampling, where = stage.sampling, (*path, "sampling")
    if sampling.temperature == 0:
        yield Problem(
            (*where, "temperature"), "got 0, wanted above 0: greedy sampling is for evaluation (evaluation.temperature)"
        )
    if sampling.min_new_tokens > sampling.max_new_tokens:
        yield Problem(
            (*where, "min_new_tokens"),
            f"got {sampling.min_new_tokens}, wanted at most max_new_tokens, {sampling.max_new_tokens}",
            because=((*where, "max_new_tokens"),),
        )
    longest = stage.evaluation.max_new_tokens
    if longest is not None and sampling.min_new_tokens > longest:
        yield Problem(
            (*path, "evaluation", "max_new_tokens"),
            f"got {longest}, wanted at least sampling.min_new_tokens, {sampling.min_new_tokens}",
            because=((*where, "min_new_tokens"),),
        )
    if "" in sampling.stop:
        yield Problem(
            (*where, "stop", sampling.stop.index("")), "got an empty text, wanted a string that ends responses"
        )
    filters = active_filters(sampling)
    if stage.old_logprobs == "generator" and filters:
        yield Problem(
            (*path, "old_logprobs"),
            f"got generator, wanted learner: with {', '.join(filters)} the generator's log-probabilities are not the "
            "policy's",
            because=tuple((*where, name) for name in filters),
        )


def _batches(stage: Ppo, path: KeyPath) -> Iterator[Problem]:
    samples = stage.prompts_per_iteration * stage.sampling.samples_per_prompt
    sizes = ((*path, "prompts_per_iteration"), (*path, "sampling", "samples_per_prompt"))
    product = f"{stage.prompts_per_iteration} prompts x {stage.sampling.samples_per_prompt} samples"
    if stage.mini_batches > samples:
        yield Problem(
            (*path, "mini_batches"),
            f"got {stage.mini_batches}, wanted at most the samples of an iteration, {samples} ({product})",
            because=sizes,
        )
        return
    for role, learner in _learners(stage):
        if isinstance(learner, Critic) and learner.kind == "value_head":
            continue
        if learner.workers > samples // stage.mini_batches:
            yield Problem(
                (*path, *role, "workers"),
                f"got {learner.workers}, but a mini-batch has only {samples // stage.mini_batches} samples "
                f"({product} / {stage.mini_batches} mini-batches); wanted at least one for each worker",
                because=(*sizes, (*path, "mini_batches")),
            )


def _generator(stage: Ppo, path: KeyPath) -> Iterator[Problem]:
    generator, where = stage.generator, (*path, "generator")
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


def _context(pipeline: Pipeline, index: int, stage: Ppo) -> Iterator[Problem]:
    """Prompt and response must fit into a fresh model of an earlier stage."""
    model, path = stage.policy.model, ("stages", index)
    maker: int = index
    seen: list[KeyPath] = [(*path, "policy", "model")]
    while isinstance(model, str) and model.startswith("stage:"):
        names = [earlier.name for earlier in pipeline.stages[:maker]]
        if model.removeprefix("stage:") not in names:
            return
        maker = names.index(model.removeprefix("stage:"))
        seen.append(("stages", maker, "policy", "model"))
        model = pipeline.stages[maker].policy.model
    if not isinstance(model, NewModel):
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


# -------------------------------------------------------------------------------------- rewards


def _rewards(stage: Ppo, path: KeyPath, pipeline_dir: Path) -> Iterator[Problem]:
    names = reward_names(stage)
    for position, reward in enumerate(stage.reward):
        where = (*path, "reward", position)
        if names[position] in names[:position]:
            yield Problem(
                (*where, "name"),
                f"got {names[position]!r}, the name of another reward too; give each a `name` of its own",
                because=((*path, "reward"),),
            )
        if reward.name is not None and not _NAME.fullmatch(reward.name):
            yield Problem(
                (*where, "name"), f"got {reward.name!r}, wanted letters, digits, `_` and `-`: it names metrics"
            )
        if reward.weight == 0:
            yield Problem((*where, "weight"), "got 0, so this reward has no effect; remove it or give it a weight")
        if isinstance(reward, FunctionReward):
            yield from _function(reward, where, pipeline_dir)


def _function(reward: FunctionReward, where: KeyPath, pipeline_dir: Path) -> Iterator[Problem]:
    own = [key for key in ("prompts", "responses", "answers") if key in reward.arguments]
    if own:
        yield Problem(
            (*where, "arguments", own[0]),
            f"{own[0]} is what every reward function gets; give the argument another name",
        )
    at = (*where, "function")
    if not _FUNCTION.fullmatch(reward.function):
        yield Problem(at, f"got {reward.function!r}, wanted `module:function`, such as `rewards:score`")
        return
    module, _, function = reward.function.partition(":")
    file = find_module(module, pipeline_dir)
    if file is None:
        beside = [entry.stem for entry in pipeline_dir.glob("*.py")] if pipeline_dir.is_dir() else []
        yield Problem(
            at,
            f"got {reward.function!r}, but there is no module {module!r} beside the pipeline file ({pipeline_dir}) "
            f"or on the Python path{suggestion(module, beside)}",
        )
    elif file.suffix == ".py":
        yield from _function_in(file, function, at)


def find_module(module: str, pipeline_dir: Path) -> Path | None:
    """The file of a module, looked up beside the pipeline file and then on the Python path, without importing it.

    For a package or a built-in module without a file, the folder where it was looked up.
    """
    first, *rest = module.split(".")
    spec = PathFinder.find_spec(first, [str(pipeline_dir), *sys.path])
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    if spec is None:
        return pipeline_dir if module in sys.builtin_module_names else None
    return Path(spec.origin) if spec.origin else pipeline_dir


def _function_in(file: Path, function: str, at: KeyPath) -> Iterator[Problem]:
    try:
        body = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        yield Problem(at, f"{file}{line} is not valid Python: {getattr(error, 'msg', error)}")
        return
    names: set[str] = set()
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(statement.name)
        elif not isinstance(statement, ast.Expr | ast.Pass):
            # A class, an assignment, an import, an `if`: whatever it binds may be called.
            if any(isinstance(node, ast.alias) and node.name == "*" for node in ast.walk(statement)):
                return
            names |= {name for node in ast.walk(statement) for name in _bound(node)}
    if function not in names and "__getattr__" not in names:
        yield Problem(at, f"there is no function {function!r} in {file}{suggestion(function, sorted(names))}")


def _bound(node: ast.AST) -> list[str]:
    if isinstance(node, ast.alias):
        return [(node.asname or node.name).split(".")[0]]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    return [node.name] if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else []


# ----------------------------------------------------------------------- settings without effect


def without_effect(pipeline: Pipeline) -> list[Problem]:
    """Every setting that this pipeline never reads, whether it is given or not."""
    found: list[Problem] = []
    for index, stage in enumerate(pipeline.stages):
        for keys, reason, causes in _silent(stage):
            path: KeyPath = ("stages", index)
            text = f"has no effect {reason}; remove it"
            because = tuple((*path, *_split(cause)) for cause in causes)
            found += [Problem((*path, *_split(key)), text, because) for key in keys]
    return found


def _split(key: str) -> KeyPath:
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


_Silent = tuple[Sequence[str], str, Sequence[str]]


def _silent(stage: Sft | Ppo) -> Iterator[_Silent]:
    """Keys without effect, why, and the keys that make it so."""
    if stage.data.evaluation is None:
        yield ["evaluation"], "without data.evaluation", ["data.evaluation"]
    for role, learner in _learners(stage):
        if isinstance(learner, Critic) and learner.kind == "value_head":
            continue
        yield from _silent_learner(str(role[0]), learner)
    for split in ("train", "evaluation"):
        yield from _silent_sources(getattr(stage.data, split) or (), f"data.{split}")
    if isinstance(stage, Ppo):
        yield from _silent_ppo(stage)


def _silent_learner(role: str, learner: Learner) -> Iterator[_Silent]:
    if learner.zero == 0:
        yield [f"{role}.cpu_offload"], f"with {role}.zero 0 (it needs ZeRO 1, 2 or 3)", [f"{role}.zero"]
    if learner.optimizer.schedule == "constant":
        cause = f"{role}.optimizer.schedule"
        yield [f"{role}.optimizer.final_ratio"], f"while {cause} is constant", [cause]
    yield from _silent_revision(role, learner.model)


def _silent_revision(role: str, model: str | NewModel | None) -> Iterator[_Silent]:
    causes = [f"{role}.model"]
    if model is None:
        yield [f"{role}.revision"], f"without {role}.model", causes
    elif isinstance(model, NewModel):
        yield [f"{role}.revision"], "on a fresh model", causes
    elif model.startswith("stage:"):
        yield [f"{role}.revision"], "on the result of a stage", causes
    elif _is_local(model) or Path(model).is_dir():
        yield [f"{role}.revision"], f"on a local directory ({model})", causes


def _silent_sources(sources: Sequence[Source], key: str) -> Iterator[_Silent]:
    if len(sources) == 1:
        yield [f"{key}.0.weight"], "on a single source", [key]
    for position, source in enumerate(sources):
        name = f"{key}.{position}"
        if source.path.startswith("synthetic:"):
            yield [f"{name}.subset", f"{name}.revision"], "on a synthetic corpus", [f"{name}.path"]
        elif source.path.endswith(DATA_ENDINGS):
            keys = [f"{name}.split", f"{name}.subset", f"{name}.revision"]
            yield keys, f"on a file ({source.path})", [f"{name}.path"]
        elif _is_local(source.path) or Path(source.path).is_dir():
            yield [f"{name}.subset", f"{name}.revision"], f"on a directory ({source.path})", [f"{name}.path"]


def _silent_ppo(stage: Ppo) -> Iterator[_Silent]:
    estimator = stage.advantages.estimator
    cause = ["advantages.estimator"]
    if estimator != "gae":
        keys = ["advantages.gamma", "advantages.lam", "advantages.bootstrap_truncated"]
        yield keys, f"with {estimator} (gae only)", cause
        yield ["value_loss"], f"with {estimator}: there is no critic", cause
    if estimator != "group_relative":
        yield ["advantages.divide_by_std"], f"with {estimator} (group_relative only)", cause
    yield from _silent_critic(stage)
    yield from _silent_kl(stage)
    yield from _silent_revision("reference", stage.reference.model)
    for position, reward in enumerate(stage.reward):
        if not isinstance(reward, FunctionReward):
            yield from _silent_revision(f"reward.{position}", reward.model)
    yield from _silent_generator(stage.generator)
    if stage.old_logprobs == "generator":
        reason = "with old_logprobs: generator, where there is no difference to correct"
        yield ["correction"], reason, ["old_logprobs"]
    elif stage.correction.mode == "off":
        yield ["correction.cap"], "while correction.mode is off", ["correction.mode"]
    elif stage.correction.mode == "auto" and stage.generator.dtype == "float32":
        reason = "while correction.mode is auto and the generator runs in float32 (set the mode to on to use it)"
        yield ["correction.cap"], reason, ["correction.mode", "generator.dtype"]
    if stage.data.prompt_length is not None:
        reason = "with data.prompt_length, which cuts every prompt"
        yield ["data.too_long"], reason, ["data.prompt_length"]
    if stage.evaluation.temperature == 0 and stage.data.evaluation is not None:
        reason = "while evaluation.temperature is 0: greedy samples of a prompt are all the same"
        yield ["evaluation.samples_per_prompt"], reason, ["evaluation.temperature"]


def _silent_critic(stage: Ppo) -> Iterator[_Silent]:
    critic = stage.critic
    if critic is not None and critic.kind == "value_head":
        own = [key for key in Critic.model_fields if key != "kind"]
        reason = "on a value head, which shares the policy's network (set it under policy)"
        yield [f"critic.{key}" for key in own], reason, ["critic.kind"]
    elif stage.advantages.estimator == "gae":
        reason = "unless critic.kind is value_head: a critic of its own has its own learning rate"
        yield ["value_loss.coefficient"], reason, ["critic"]


def _silent_kl(stage: Ppo) -> Iterator[_Silent]:
    if stage.kl_place == "off":
        own = [f"kl.{key}" for key in type(stage.kl).model_fields if key != "place"]
        yield ["reference", *own], "while kl.place is off", ["kl.place"]
    elif stage.kl.controller == "fixed":
        yield ["kl.target", "kl.horizon"], "while kl.controller is fixed", ["kl.controller"]


def _silent_generator(generator: Generator) -> Iterator[_Silent]:
    if generator.engine == "hf":
        keys = ["kv_cache_gib", "memory_share", "prefix_caching", "compile"]
        yield [f"generator.{key}" for key in keys], "with the hf engine (vllm only)", ["generator.engine"]
    elif generator.gpus == 0:
        yield ["generator.memory_share"], "with generator.gpus 0", ["generator.gpus"]
