"""Checkpoints that are complete or not there, and checked before anything of them is read.

A checkpoint is the folder `iteration_000010/` with

    state.json       the run's own state (`RunState`), plain JSON
    ...              what the trainer's workers wrote
    manifest.json    every other file's size and SHA-256; written last

It is built as `iteration_000010.partial` and renamed when every file is on disk, so that a kill at
any moment leaves the newest complete checkpoint readable.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rlhf_ray.config import schema
from rlhf_ray.errors import CheckpointError
from rlhf_ray.trainers.durable import (
    PARTIAL,
    REPLACED,
    recover_folder,
    remove_folder,
    sync_path,
    sync_tree,
    write_folder,
    write_text,
)

Json = Any
MANIFEST = "manifest.json"
STATE = "state.json"

_log = logging.getLogger(__name__)
_FOLDER = re.compile(r"iteration_(\d{6,})")

# Settings that change where and how fast things run, or what is kept, but not what is learnt. Learners' worker counts
# are not among them: their shards in a checkpoint fit one number of workers only.
_MAY_CHANGE = (
    "*.cpus",
    "*.gpus",
    "*.colocate_with",
    "*.whole_gpus",
    "*.strategy",
    "*.node_labels*",
    "*.micro_batch_tokens",
    "*.micro_batch_sequences",
    "generator.workers",
    "generator.tensor_parallel",
    "generator.kv_cache_gib",
    "generator.memory_share",
    "generator.sleep",
    "*.offload",
    "generator.max_sequences",
    "generator.compile",
    "reference.workers",
    "reward.*.workers",
    "reward.*.timeout_s",
    "reward.*.batch_size",
    "chunk_samples",
    "cache",
    "cache_dir",
    "evaluation.every",
    "checkpoints.*",
)


@dataclass(frozen=True)
class RunState:
    """What a stage needs, beside its workers' own files, to go on as if it had never stopped.

    Args:
        stage: name of the stage.
        iteration: completed iterations. It is also the policy version and the position in the data, because batches are
            pure functions of (seed, iteration).
        settings: the settings that decide the result, flat (`policy.optimizer.learning_rate`), see `result_settings`.
        trainer: the trainer's own state as JSON, such as the KL controller's.
        elapsed_s: seconds spent in this stage, over all sessions.
        first_evaluation: metrics of the evaluation before the first iteration; empty where there was none.
        last_evaluation: metrics of the newest evaluation; empty where there was none.
    """

    stage: str
    iteration: int
    settings: dict[str, Json]
    trainer: dict[str, Json] = field(default_factory=dict)
    elapsed_s: float = 0.0
    first_evaluation: dict[str, float] = field(default_factory=dict)
    last_evaluation: dict[str, float] = field(default_factory=dict)

    @property
    def policy_version(self) -> int:
        """Completed iterations behind the policy's weights."""
        return self.iteration

    def to_json(self) -> dict[str, Json]:
        """As a JSON object."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Json], *, source: Path) -> RunState:
        """The state in a JSON object; CheckpointError where a field is missing or unknown."""
        try:
            return RunState(**values)
        except TypeError as error:
            raise CheckpointError(f"{source}: not the state of a run of this version: {error}") from error


@dataclass(frozen=True)
class CheckpointHandle:
    """A complete checkpoint whose files have been checked.

    Args:
        iteration: completed iterations.
        folder: where the workers' files lie.
        state: the run's state.
    """

    iteration: int
    folder: Path
    state: RunState


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage.

    Args:
        folder: where they lie, such as `runs/hh/ppo/checkpoints`.
        keep: newest checkpoints that are kept.
    """

    folder: Path
    keep: int

    def clean(self) -> None:
        """Removes what an interrupted write left behind; called once, before the first write."""
        for path in sorted(self.folder.glob("iteration_*")):
            if path.suffix in (PARTIAL, REPLACED):
                recover_folder(path.with_suffix(""))

    def write(self, state: RunState, save_parts: Callable[[Path], None]) -> CheckpointHandle:
        """Writes the checkpoint of `state.iteration` and removes the ones that are no longer kept.

        `save_parts` gets the temporary folder and returns when all workers (of any process or node that shares the file
        system) have written their files. An exception in it leaves the earlier checkpoints as they were.
        """
        target = self.folder / folder_name(state.iteration)

        def write(partial: Path) -> None:
            save_parts(partial)
            (partial / STATE).write_text(_dump(state.to_json()), encoding="utf-8")
            sync_tree(partial)
            manifest = {"format": 1, "stage": state.stage, "iteration": state.iteration, "files": _digests(partial)}
            write_text(partial / MANIFEST, _dump(manifest))

        write_folder(target, write)
        self._remove_all_but_newest(state.iteration)
        return CheckpointHandle(state.iteration, target, state)

    def newest(self) -> CheckpointHandle | None:
        """The newest complete checkpoint, every file checked; None where there is none at all.

        A broken one is skipped with a warning and the one before it is taken. CheckpointError where all are broken: a
        run never starts from scratch without a word.
        """
        problems = []
        for iteration in sorted(self._iterations(), reverse=True):
            path = self.folder / folder_name(iteration)
            try:
                return self.verify(path)
            except CheckpointError as error:
                _log.warning("skipping a broken checkpoint: %s", error)
                problems.append(str(error))
        if problems:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is intact:\n  " + "\n  ".join(problems) + "\n"
                "Put an intact copy there, or delete that folder to start this stage from its beginning."
            )
        return None

    def verify(self, path: Path) -> CheckpointHandle:
        """The checkpoint in `path`, every size and SHA-256 checked; CheckpointError names the first wrong file."""
        manifest = _read_json(path / MANIFEST)
        files = manifest.get("files")
        if manifest.get("format") != 1 or not isinstance(files, dict) or STATE not in files:
            raise CheckpointError(f"{path / MANIFEST}: not a manifest that this version can read")
        for name, expected in files.items():
            size = (path / name).stat().st_size if (path / name).is_file() else None
            if size != expected["size"]:
                got = "missing" if size is None else f"{size} bytes"
                raise CheckpointError(f"{path / name}: {got}, the manifest says {expected['size']} bytes")
        unknown = set(_files(path)) - set(files) - {MANIFEST}
        if unknown:
            raise CheckpointError(f"{path / min(unknown)}: not in the manifest")
        for name, found in _digests(path).items():
            if found != files[name]:
                raise CheckpointError(
                    f"{path / name}: its SHA-256 is not the one in the manifest; the file was changed"
                )
        state = RunState.from_json(_read_json(path / STATE), source=path / STATE)
        if path.name != folder_name(state.iteration):
            raise CheckpointError(f"{path}: holds iteration {state.iteration}; the folder was renamed")
        return CheckpointHandle(state.iteration, path, state)

    def _iterations(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        matches = (_FOLDER.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return [int(match[1]) for match in matches if match]

    def _remove_all_but_newest(self, newest: int) -> None:
        """Keeps `newest` and the ones before it; later ones are of a course of events that was given up."""
        iterations = sorted(i for i in self._iterations() if i <= newest)
        for iteration in set(self._iterations()) - set(iterations[-self.keep :]):
            path = self.folder / folder_name(iteration)
            # Renamed first: a kill while files are being deleted must not leave a folder that looks like a checkpoint.
            leaving = path.rename(path.with_name(path.name + PARTIAL))
            remove_folder(leaving)
        sync_path(self.folder)


def folder_name(iteration: int) -> str:
    """`iteration_000010` for 10."""
    return f"iteration_{iteration:06d}"


def result_settings(stage: schema.Section, *, seed: int) -> dict[str, Json]:
    """The settings of a stage that decide its result, flat: all but those of placement, speed and keeping.

    The number of iterations is left out where the learning rate does not depend on it, so that a finished stage can be
    prolonged.
    """
    flat: dict[str, Json] = {"seed": seed, **flatten(stage.model_dump(mode="json"))}
    settled = {
        name: value for name, value in flat.items() if not any(fnmatch(name, pattern) for pattern in _MAY_CHANGE)
    }
    schedules = {value for name, value in settled.items() if name.endswith("optimizer.schedule")}
    if schedules <= {"constant"}:
        length = ("iterations",) if "iterations" in settled else ("steps", "epochs")
        settled = {name: value for name, value in settled.items() if name not in length}
    return settled


def flatten(values: Json, prefix: str = "") -> dict[str, Json]:
    """Nested dicts and lists -> one dict of dotted names: {"a": {"b": [1]}} -> {"a.b.0": 1}."""
    if not isinstance(values, dict | list) or not values:
        return {prefix: values}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    nested = (flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in items)
    return {name: value for part in nested for name, value in part.items()}


def check_settings(handle: CheckpointHandle, settings: Mapping[str, Json]) -> None:
    """CheckpointError where the checkpoint was written under settings that give another result, naming each of them."""
    before = handle.state.settings
    changed = sorted(name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name))
    if not changed:
        return
    lines = [f"  {name}: was {_shown(before, name)}, is {_shown(settings, name)}" for name in changed]
    raise CheckpointError(
        f"{handle.folder} was written with other settings:\n" + "\n".join(lines) + "\n"
        "Set them back to resume, or start a new run in another run_dir."
    )


def _shown(settings: Mapping[str, Json], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "not set"


def _files(folder: Path) -> list[str]:
    """Names of all files below the folder, relative to it; a link or a device is no part of a checkpoint."""
    found = []
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(root, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise CheckpointError(f"{path}: neither a plain file nor a folder")
            if path.is_file():
                found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def _digests(folder: Path) -> dict[str, dict[str, Json]]:
    """Size and SHA-256 of every file but the manifest, read in chunks, several files at a time."""
    names = [name for name in _files(folder) if name != MANIFEST]

    def digest(name: str) -> dict[str, Json]:
        with (folder / name).open("rb") as file:
            return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _dump(values: Json) -> str:
    return json.dumps(values, indent=1, sort_keys=True, allow_nan=False)


def _read_json(path: Path) -> dict[str, Json]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; the checkpoint was never completed") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: a JSON object is wanted")
    return values
