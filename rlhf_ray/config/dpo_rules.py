"""Rules between the settings of a dpo stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlhf_ray.config.problems import KeyPath, Problem
from rlhf_ray.config.schema import Dpo


def dpo_rules(stage: Dpo, path: KeyPath) -> Iterator[Problem]:
    """What a dpo stage cannot be."""
    if stage.cache_dir is not None and not stage.cache_dir.strip():
        yield Problem((*path, "cache_dir"), "got an empty text, wanted a folder")
    elif stage.cache_dir is not None and Path(stage.cache_dir).expanduser().is_file():
        yield Problem((*path, "cache_dir"), f"got {stage.cache_dir!r}, which is a file; wanted a folder")
