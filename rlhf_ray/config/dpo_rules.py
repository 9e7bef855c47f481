"""Rules between the settings of a dpo stage."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_ray.config.problems import KeyPath, Problem
from rlhf_ray.config.schema import Dpo


def dpo_rules(stage: Dpo, path: KeyPath) -> Iterator[Problem]:
    """What a dpo stage cannot be."""
    yield from ()
