"""A problem of a pipeline file: where it is, and what is wrong, in words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from rlhf_ray.config.schema import Section

KeyPath = tuple[str | int, ...]


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
