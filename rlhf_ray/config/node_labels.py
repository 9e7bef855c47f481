"""Labels of nodes, and how a role asks for nodes by them: the label selectors of Ray.

https://docs.ray.io/en/latest/ray-core/scheduling/label-based-scheduling.html
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_KEY = re.compile(rf"(?:{_WORD}/)?{_WORD}")
_VALUE = re.compile(rf"(?P<no>!?)(?:(?P<one>{_WORD})|in\((?P<some>{_WORD}(?:, ?{_WORD})*)\))")


def wrong_label(key: str, value: str) -> str | None:
    """What is wrong with one label of a selector; None where nothing is."""
    if not _KEY.fullmatch(key):
        return f"got the label {key!r}, wanted a name as Kubernetes takes it, such as pool or example.org/pool"
    if not _VALUE.fullmatch(value):
        return f"got {value!r}, wanted VALUE, !VALUE, in(VALUE, VALUE) or !in(VALUE, VALUE)"
    return None


def matches(labels: Mapping[str, str] | None, selector: Mapping[str, str]) -> bool:
    """Whether a node is one that a selector asks for; None: a node whose labels nobody has named, which is."""
    return labels is None or all(_holds(labels.get(key), value) for key, value in selector.items())


def in_words(selector: Mapping[str, str]) -> str:
    """`pool=large, market=!spot`."""
    return ", ".join(f"{key}={value}" for key, value in selector.items())


def _holds(label: str | None, value: str) -> bool:
    found = _VALUE.fullmatch(value)
    assert found is not None, f"{value} is no selector"
    wanted = re.split(", ?", found["some"]) if found["some"] else [found["one"]]
    return (label in wanted) != bool(found["no"])
