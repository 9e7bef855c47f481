"""Two small files in a run's folder: how many generators a person wants, and how many there are.

    <run_dir>/scale.json      the wish; written by `rlhf-ray scale`, and kept, so that a resumed run follows it again
    <run_dir>/workers.json    the truth; written by the run, and there only while a stage follows wishes

A wish has a number of its own, by which its answer is known.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.trainers.durable import write_text

WISH = "scale.json"
STANDING = "workers.json"
ROLE = "generator"


@dataclass(frozen=True)
class Wish:
    """What was asked for.

    Args:
        stage: name of the stage that is to follow it.
        generator: how many workers the role is to have.
        number: tells this wish apart from all others.
    """

    stage: str
    generator: int
    number: str


@dataclass(frozen=True)
class Standing:
    """What is true.

    Args:
        stage: the stage under way.
        generator: how many workers the role has.
        since: the first iteration that they sample.
        wish: number of the wish that this speaks of; empty before the first.
        settled: nothing more is done about that wish.
        note: why there are not as many as wished; empty where there are.
    """

    stage: str
    generator: int
    since: int
    wish: str
    settled: bool
    note: str


def wish_for(folder: Path, *, stage: str, generator: int) -> Wish:
    """Writes a new wish, which takes the place of an earlier one."""
    wish = Wish(stage, generator, secrets.token_hex(8))
    write_text(folder / WISH, json.dumps(asdict(wish)))
    return wish


def read_wish(folder: Path) -> Wish | None:
    """The newest wish; None where there is none, or none that can be read: a run never ends because of it."""
    values = _read(folder / WISH)
    try:
        wish = Wish(**values)
    except TypeError:
        return None
    sound = isinstance(wish.stage, str) and isinstance(wish.number, str) and type(wish.generator) is int
    return wish if sound and wish.generator > 0 else None


def write_standing(folder: Path, standing: Standing) -> None:
    """Replaces the truth."""
    write_text(folder / STANDING, json.dumps(asdict(standing)))


def read_standing(folder: Path) -> Standing | None:
    """The truth; None where no stage follows wishes."""
    try:
        return Standing(**_read(folder / STANDING))
    except TypeError:
        return None


def remove_standing(folder: Path) -> None:
    """From here on nobody follows wishes."""
    (folder / STANDING).unlink(missing_ok=True)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
