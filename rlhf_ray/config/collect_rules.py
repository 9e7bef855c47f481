"""Rules between the settings of a collect stage."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_ray.config.problems import KeyPath, Problem
from rlhf_ray.config.schema import Collect


def collect_rules(stage: Collect, path: KeyPath) -> Iterator[Problem]:
    """What a collect stage cannot be."""
    yield from ()
