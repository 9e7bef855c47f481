"""Who shares a GPU: the words of `placement.layout` as plain settings of the roles, and what those cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_ray.config.node_labels import wrong_label
from rlhf_ray.config.problems import KeyPath, Problem, suggestion
from rlhf_ray.config.role_rules import reward_names
from rlhf_ray.config.schema import (
    Collect,
    Critic,
    Dpo,
    FunctionReward,
    Generator,
    Pipeline,
    Ppo,
    Section,
    Stage,
    Workers,
)

_SHARED_MEMORY = 0.5
"""Of a GPU's memory the engine's share beside sleeping learners, awake reference and reward models."""


def roles_of(stage: Stage) -> dict[str, tuple[KeyPath, Workers]]:
    """The roles of a stage that have workers of their own, each with its place in the stage and its settings."""
    found: dict[str, tuple[KeyPath, Workers]] = {}
    if not isinstance(stage, Collect):
        found["policy"] = (("policy",), stage.policy)
    if isinstance(stage, Ppo) and stage.critic_role is not None and stage.critic_role.kind == "network":
        found["critic"] = (("critic",), stage.critic_role)
    if isinstance(stage, Ppo | Dpo):
        needed = stage.kl_place != "off" if isinstance(stage, Ppo) else stage.needs_reference
        if needed and not stage.adapter_is_off_in_reference:
            found["reference"] = (("reference",), stage.reference)
    if isinstance(stage, Ppo | Dpo | Collect):
        for position, (name, reward) in enumerate(zip(reward_names(stage.reward), stage.reward, strict=True)):
            found[f"reward/{name}"] = (("reward", position), reward)
        if stage.generator is not None:
            found["generator"] = (("generator",), stage.generator)
    return found


def possible_gpus(stage: Stage, settings: Workers, *, gpus: float) -> float:
    """The GPUs that a role may use of those of the cluster: none where the role that it shares with has none."""
    host = roles_of(stage).get(settings.colocate_with or "")
    return 0.0 if host is not None and _on_cpu(host[1]) else gpus


def layout_settings(pipeline: Pipeline) -> dict[KeyPath, Any]:
    """What `placement.layout` stands for: settings by their place in the pipeline, without those that a user chose."""
    found: dict[KeyPath, Any] = {}
    for index, stage in enumerate(pipeline.stages):
        roles = roles_of(stage)
        for role, name, value in _wanted(pipeline.placement.layout, stage, roles):
            path, settings = roles[role]
            chosen = getattr(settings, name) if name in settings.model_fields_set else None
            if chosen in (None, value):
                found["stages", index, *path, name] = value
    return found


def expand_layout(pipeline: Pipeline) -> Pipeline:
    """The pipeline with its layout's settings in place; a setting that the user chose stays."""
    for path, value in layout_settings(pipeline).items():
        pipeline = with_setting(pipeline, path, value)
    return pipeline


def with_setting(pipeline: Pipeline, path: KeyPath, value: Any) -> Pipeline:
    """The pipeline with another value of a setting, which is not checked."""
    changed: Pipeline = _with(pipeline, path, value)
    return changed


def sharing_rules(pipeline: Pipeline, index: int) -> Iterator[Problem]:
    """What `colocate_with` and `node_labels` cannot be, and what contradicts the layout."""
    stage, layout = pipeline.stages[index], pipeline.placement.layout
    roles = roles_of(stage)
    if layout == "colocated" and isinstance(stage, Ppo) and stage.staleness > 0:
        yield Problem(
            ("stages", index, "staleness"),
            f"got {stage.staleness}, but with placement.layout colocated the generator sleeps while the learners "
            "train; wanted 0, or another layout",
            because=(("placement", "layout"),),
        )
    hosts = {role: value for role, name, value in _wanted(layout, stage, roles) if name == "colocate_with"}
    for role, (key, settings) in roles.items():
        path: KeyPath = ("stages", index, *key)
        chosen = settings.colocate_with
        word = (("placement", "layout"),)
        for label, value in settings.node_labels.items():
            if (wrong := wrong_label(label, value)) is not None:
                yield Problem((*path, "node_labels", label), wrong)
        if layout == "separate" and chosen is not None:
            yield Problem(
                (*path, "colocate_with"),
                f"got {chosen!r}, but with placement.layout separate each role has GPUs of its own; remove one of them",
                because=word,
            )
        elif layout == "separate" and settings.gpus is not None and settings.gpus % 1:
            yield Problem(
                (*path, "gpus"),
                f"got {settings.gpus:g}, but with placement.layout separate each role has whole GPUs; wanted 1, 0 or "
                "nothing",
                because=word,
            )
        elif layout == "colocated" and role in hosts and chosen not in (None, hosts[role]):
            yield Problem(
                (*path, "colocate_with"),
                f"got {chosen!r}, but with placement.layout colocated it is on the GPUs of {hosts[role]}; remove one "
                "of them",
                because=word,
            )
        elif chosen is not None:
            yield from _sharing(role, path, settings, chosen, roles, index)


def _sharing(
    role: str,
    path: KeyPath,
    settings: Workers,
    chosen: str,
    roles: Mapping[str, tuple[KeyPath, Workers]],
    index: int,
) -> Iterator[Problem]:
    where = (*path, "colocate_with")
    if chosen == role or chosen not in roles:
        others = [other for other in roles if other != role]
        known = f"wanted another role of this stage: {', '.join(others)}" if others else "but there is no other role"
        yield Problem(where, f"got {chosen!r}, {known}{suggestion(chosen, others) if chosen != role else ''}")
        return
    key, host = roles[chosen]
    place: KeyPath = ("stages", index, *key)
    if host.colocate_with is not None:
        yield Problem(
            where,
            f"got {chosen!r}, which is itself on the GPUs of {host.colocate_with}; wanted {host.colocate_with}",
            because=((*place, "colocate_with"),),
        )
    if isinstance(host, FunctionReward) and host.gpus is None and not isinstance(settings, FunctionReward):
        yield Problem(where, f"got {chosen!r}, a function, which has no GPU to share", because=((*place, "gpus"),))
    if settings.workers > host.workers:
        yield Problem(
            (*path, "workers"),
            f"got {settings.workers}, wanted at most {host.workers}, the workers of {chosen}: the i-th one shares the "
            "GPU of the i-th one there (colocate_with)",
            because=((*place, "workers"), where),
        )
    if settings.gpus:
        yield Problem(
            (*path, "gpus"),
            f"got {settings.gpus:g}, wanted nothing, or 0 for a role without a GPU: it has a part of the GPU of "
            f"{chosen} (colocate_with)",
            because=(where,),
        )
    for whose, at, its in ((role, path, settings), (chosen, place, host)):
        if isinstance(its, Generator) and its.tensor_parallel > 1:
            yield Problem(
                (*at, "tensor_parallel"),
                f"got {its.tensor_parallel}, wanted 1: an engine on several GPUs cannot share one with another role "
                f"({role}.colocate_with {chosen})",
                because=(where,),
            )
        elif whose == chosen and its.gpus is not None and its.gpus > 1:
            yield Problem(where, f"got {chosen!r}, whose workers have {its.gpus:g} GPUs each; wanted one with 1")


def _wanted(
    layout: str | None, stage: Stage, roles: Mapping[str, tuple[KeyPath, Workers]]
) -> Iterator[tuple[str, str, Any]]:
    """(role, setting, value) for everything that a layout says; functions need no GPU and stay as they are."""
    networks = {role: settings for role, (_, settings) in roles.items() if not isinstance(settings, FunctionReward)}
    match layout:
        case "separate":
            for role, settings in networks.items():
                if settings.gpus is None:
                    yield role, "whole_gpus", True
        case "colocated":
            host = "policy" if "policy" in roles else "generator"
            yield from _guests(host, [role for role in networks if role != host], networks)
            if isinstance(stage, Ppo | Dpo) and stage.generator is not None and not _on_cpu(stage.generator):
                yield "generator", "sleep", True
                if stage.generator.engine == "vllm":
                    yield "generator", "memory_share", _SHARED_MEMORY
                for role in ("policy", "critic"):
                    if role in roles and not _on_cpu(networks[role]):
                        yield role, "offload", True
        case "shared_scorers":
            scorers = [role for role in networks if role == "reference" or role.startswith("reward/")]
            hosts = [role for role in ("critic", *scorers) if role in networks and not _on_cpu(networks[role])]
            if hosts:
                host = networks[hosts[0]].colocate_with or hosts[0]
                yield from _guests(host, [role for role in scorers if role not in (host, hosts[0])], networks)


def _guests(host: str, guests: list[str], networks: Mapping[str, Workers]) -> Iterator[tuple[str, str, Any]]:
    for role in guests:
        if not _on_cpu(networks[role]):
            yield role, "colocate_with", host
            if host in networks:
                yield role, "workers", networks[host].workers


def _on_cpu(settings: Workers) -> bool:
    """Whether a role has no GPU, whatever the cluster has."""
    return settings.gpus == 0 or (isinstance(settings, FunctionReward) and settings.gpus is None)


def _with(section: Any, path: KeyPath, value: Any) -> Any:
    """A copy with another value at a path; a critic that is left out is the default one."""
    if not path:
        return value
    first, rest = path[0], path[1:]
    if isinstance(section, tuple):
        assert isinstance(first, int), path
        return (*section[:first], _with(section[first], rest, value), *section[first + 1 :])
    assert isinstance(section, Section), path
    below = getattr(section, str(first))
    if below is None and first == "critic":
        below = Critic()
    return section.model_copy(update={str(first): _with(below, rest, value)})
