"""Rules between the settings of a collect stage, and of the stages that read its data."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_ray.config.problems import KeyPath, Problem, suggestion
from rlhf_ray.config.role_rules import prompt_rules, sampling_rules
from rlhf_ray.config.schema import Collect, Pipeline, PreferenceData, Source, Stage, TextData

_FORMS = {"pairs": "best_worst or threshold", "texts": "best_of_n or resample"}


def collect_rules(stage: Collect, path: KeyPath) -> Iterator[Problem]:
    """What a collect stage cannot be."""
    where = (*path, "sampling")
    yield from sampling_rules(stage.sampling, where, greedy="greedy samples of a prompt are all the same")
    yield from prompt_rules(stage.data, (*path, "data"))
    if stage.sampling.samples_per_prompt < 2:
        yield Problem(
            (*where, "samples_per_prompt"),
            f"got {stage.sampling.samples_per_prompt}, wanted at least 2: {stage.keep} chooses among a prompt's "
            "samples",
            because=((*path, "keep"),),
        )


def collected_source_rules(pipeline: Pipeline, index: int, source: Source, path: KeyPath) -> Iterator[Problem]:
    """What is wrong with a source that is the data of a stage (`stage:NAME`)."""
    stage, where, got = pipeline.stages[index], (*path, "path"), f"got {source.path!r}"
    collects = [other.name for other in pipeline.stages[:index] if isinstance(other, Collect)]
    others = tuple(("stages", number, "name") for number in range(len(pipeline.stages)))
    made_by = next((other for other in pipeline.stages if other.name == source.stage), None)
    if source.stage not in collects:
        if made_by is stage:
            text = "which is this stage itself"
        elif isinstance(made_by, Collect):
            text = "which comes later; a stage can use the data of earlier ones only"
        elif made_by is not None:
            text = f"which makes a model and no data (its method is {made_by.method})"
        elif collects:
            text = f"wanted an earlier collect stage: {', '.join(collects)}{suggestion(source.stage, collects)}"
        else:
            text = "but no collect stage comes before this one"
        yield Problem(where, f"{got}, {text}", because=others)
        return
    assert isinstance(made_by, Collect), "the names of stages differ"
    keep = ("stages", pipeline.stages.index(made_by), "keep")
    wanted = _wanted(stage)
    if wanted is None:
        yield Problem(where, f"{got}, which holds responses; a {stage.method} stage samples its own to prompts")
    elif wanted != made_by.writes:
        yield Problem(
            where,
            f"{got}, which writes {made_by.writes} (keep: {made_by.keep}), but {stage.method} wants {wanted}; set "
            f"{made_by.name}.keep to {_FORMS[wanted]}",
            because=(keep,),
        )
    else:
        yield from _columns(stage, made_by, path[:-2])


def _wanted(stage: Stage) -> str | None:
    match stage.data:
        case TextData():
            return "texts"
        case PreferenceData():
            return "pairs"
        case _:
            return None


def _columns(stage: Stage, made_by: Collect, path: KeyPath) -> Iterator[Problem]:
    """A collect stage names its columns as the settings do by default; the margin is optional."""
    for name, value in stage.data.columns:
        default = type(stage.data.columns).model_fields[name].default
        if value != default and (name, value) != ("margin", "margin"):
            yield Problem(
                (*path, "columns", name),
                f"got {value!r}, but {made_by.name} writes it as {default or 'margin'!r}; remove it, or give the other "
                "sources' columns that name",
            )
