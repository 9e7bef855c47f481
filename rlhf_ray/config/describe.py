"""What the settings are, in words: what a key takes, what lies below it, and the list behind `rlhf-ray settings`."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rlhf_ray.config.schema import Collect, Dpo, Pipeline, Ppo, RewardModel, Section, Sft, Source

METHODS: dict[str, type[Section]] = {
    "sft": Sft,
    "reward_model": RewardModel,
    "ppo": Ppo,
    "dpo": Dpo,
    "collect": Collect,
}
STAGE_KEYS = frozenset(key for section in METHODS.values() for key in section.model_fields)
PIPELINE_KEYS = tuple(key for key in Pipeline.model_fields if key != "stages")


@dataclass(frozen=True)
class Kind:
    """The type behind a key, with its bounds."""

    annotation: Any
    bounds: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Setting:
    """One line of `rlhf-ray settings`."""

    key: str
    """Key as in a pipeline file, such as `sampling.temperature`; `*` stands for a position in a list."""
    wanted: str
    """What the key takes, in words."""
    default: str
    """The default as YAML would have it, or `required`."""
    meaning: str
    """The setting's docstring."""
    is_section: bool
    """True for a heading with settings of its own below."""


def field_kind(field: FieldInfo) -> Kind:
    """The kind of a section's field."""
    return _bare(Kind(field.annotation, tuple(field.metadata)))


def _bare(kind: Kind) -> Kind:
    """The kind without Annotated and without `| None`, its bounds collected."""
    annotation, bounds = kind.annotation, kind.bounds
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *extra = get_args(annotation)
            for item in extra:
                bounds += tuple(item.metadata) if isinstance(item, FieldInfo) else (item,)
            continue
        members = union_members(annotation)
        if len(members) == 1:
            annotation = members[0]
            continue
        return Kind(annotation, bounds)


def union_members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union but for None, else nothing."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()
    return tuple(member for member in members if member is not type(None))


def is_section(annotation: Any) -> bool:
    """True for a class of the schema."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def below(kind: Kind, component: str | int) -> tuple[Kind | None, bool]:
    """What lies at one component of a pydantic error path, and whether that component is only a union's tag."""
    annotation = kind.annotation
    if is_section(annotation):
        field = annotation.model_fields.get(component)
        return (field_kind(field) if field else None), False
    members = union_members(annotation)
    for member in members:
        bare = _bare(Kind(member)).annotation
        tags = {getattr(bare, "__name__", None)}
        if is_section(bare):
            tags |= {tag for field in bare.model_fields.values() for tag in literals(field.annotation)}
        if component in tags:
            return Kind(bare), True
    if get_origin(annotation) is tuple and isinstance(component, int):
        items = get_args(annotation)
        position = 0 if items[-1] is Ellipsis else component
        return (_bare(Kind(items[position])) if position < len(items) else None), False
    if get_origin(annotation) is dict:
        return _bare(Kind(get_args(annotation)[1])), False
    return None, False


def literals(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal, else nothing."""
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def wanted(kind: Kind) -> str:
    """What a key takes, in words: `a number, at least 0`."""
    annotation, bounds = kind.annotation, _bounds(kind.bounds)
    if values := literals(annotation):
        words = [str(value) for value in values]
        return words[0] if len(words) == 1 else "one of " + ", ".join(words)
    if annotation is Any:
        return "anything"
    simple = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    if annotation in simple:
        return simple[annotation] + bounds
    if members := union_members(annotation):
        return _wanted_union(members)
    if is_section(annotation):
        return f"a section ({_names(annotation)})"
    items = get_args(annotation)
    if get_origin(annotation) is tuple and items[-1] is Ellipsis:
        if _bare(Kind(items[0])).annotation is Source:
            return f"a path, a section ({_names(Source)}), or a list of them"
        return f"a list, each {wanted(_bare(Kind(items[0])))}"
    if get_origin(annotation) is tuple:
        return f"a list of {len(items)}, each {wanted(_bare(Kind(items[0])))}"
    return "a mapping"


def _wanted_union(members: tuple[Any, ...]) -> str:
    sections = [member for member in members if is_section(member)]
    if len(sections) == len(members):
        key = discriminator(members)
        tags = [str(tag) for section in sections for tag in literals(section.model_fields[key].annotation)]
        return f"a section with {key}: {' or '.join(tags)}"
    return " or ".join(wanted(_bare(Kind(member))) for member in members)


def discriminator(members: Sequence[Any]) -> str:
    """The key that tells the sections of a union apart: `kind` or `method`."""
    keys: Iterator[str] = (
        key for key, field in members[0].model_fields.items() if field.is_required() and literals(field.annotation)
    )
    return next(keys)


def _names(section: type[Section]) -> str:
    return ", ".join(section.model_fields)


def _bounds(bounds: tuple[Any, ...]) -> str:
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    parts = [
        f"{word} {getattr(bound, name)}" for name, word in words.items() for bound in bounds if hasattr(bound, name)
    ]
    return (", " + " and ".join(parts)) if parts else ""


def find_key(section: type[Section], key: str, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every path below a section whose last component is the key."""
    found: list[tuple[str, ...]] = []
    for name, field in section.model_fields.items():
        path = (*prefix, name)
        if name == key:
            found.append(path)
        annotation = field_kind(field).annotation
        if is_section(annotation):
            found += find_key(annotation, key, path)
    return found


def list_settings(section: type[Section], *, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a section in the order of the schema, subsections after their heading."""
    for name, field in section.model_fields.items():
        kind = field_kind(field)
        key = prefix + name
        nested = _nested(kind.annotation)
        yield Setting(key, wanted(kind), _default(field), field.description or "", is_section(kind.annotation))
        inside = f"{key}.*" if get_origin(kind.annotation) is tuple else key
        for member in nested:
            if len(nested) > 1:
                tag = discriminator(nested)
                chosen = literals(member.model_fields[tag].annotation)[0]
                yield Setting(f"{inside} with {tag}: {chosen}", wanted(Kind(member)), "", member.__doc__ or "", True)
            yield from list_settings(member, prefix=f"{inside}.")


def _nested(annotation: Any) -> list[type[Section]]:
    if get_origin(annotation) is tuple:
        annotation = _bare(Kind(get_args(annotation)[0])).annotation
    candidates = union_members(annotation) or (annotation,)
    return [candidate for candidate in candidates if is_section(candidate)]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    if isinstance(value, Section):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    text = str(value)
    return text if text.isprintable() else json.dumps(text)
