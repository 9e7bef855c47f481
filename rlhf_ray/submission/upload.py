"""What of a pipeline travels to a cluster: the file itself, reward modules, and the data and models that lie here.

The upload is one folder, which becomes the working directory of the job and of its workers:

    pipeline.yaml                     resolved; paths below point into the folder
    rewards.py  my_rewards/           modules of reward functions, and the modules of the user's that they import
    files/1f2e3d4c_train.jsonl        data and models, named by their content
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from rlhf_ray.config.effects import rewards_of
from rlhf_ray.config.load import dump_pipeline
from rlhf_ray.config.schema import STAGE, FunctionReward, Pipeline
from rlhf_ray.errors import ConfigError

PIPELINE_FILE = "pipeline.yaml"
FILES = "files"
LIMIT_BYTES = 100 << 20
"""Ray's dashboard takes no larger request."""
SHOWN = 5
_NAMING = ("path", "model", "tokenizer")
PACKAGE = "rlhf_ray"


@dataclass(frozen=True)
class Item:
    """A file or folder that travels.

    Args:
        source: where it lies here.
        target: where it goes, relative to the upload.
        size: bytes of all its files.
        why: the setting that names it, or the module that it holds.
    """

    source: Path
    target: str
    size: int
    why: str


@dataclass(frozen=True)
class Upload:
    """A pipeline made ready to travel.

    Args:
        pipeline: text of the pipeline file on the cluster.
        items: what goes with it.
        stays: paths that the cluster has itself.
    """

    pipeline: str
    items: tuple[Item, ...]
    stays: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of everything that travels."""
        return len(self.pipeline.encode()) + sum(item.size for item in self.items)


def prepare(config: Pipeline, *, pipeline_dir: Path, shared: Sequence[Path], limit: int = LIMIT_BYTES) -> Upload:
    """What has to travel so that the pipeline runs on a cluster.

    Args:
        config: the pipeline.
        pipeline_dir: folder of its file, where reward functions are looked up first.
        shared: folders that the cluster sees at the same path; what lies below them stays.
        limit: most bytes of an upload.

    Raises:
        ConfigError: it is more than the limit; names the largest parts and the ways out.
    """
    address = config.placement.model_copy(update={"address": None})
    run_dir = remote_run_dir(config.run_dir)
    tree = yaml.safe_load(dump_pipeline(config.model_copy(update={"placement": address, "run_dir": run_dir})))
    named = [(stage["name"], *place) for stage in tree["stages"] for place in _named(stage, ())]
    items, stays = _modules(config, pipeline_dir), []
    found: dict[Path, list[tuple[dict[str, Any], str, str]]] = {}
    for stage, section, key, where in named:
        path = Path(section[key])
        at = Path.cwd() / path
        if any(at.is_relative_to(folder) for folder in shared):
            section[key] = str(at)
            stays.append(str(at))
        elif at.exists():
            found.setdefault(at.resolve(), []).append((section, key, ".".join((stage, *where))))
    sizes = {path: size_of(path) for path in found}
    _refuse_too_large(items, {uses[0][2]: (path, sizes[path]) for path, uses in found.items()}, limit)
    for path, uses in found.items():
        target = f"{FILES}/{_digest(path)[:8]}_{path.name}"
        items.append(Item(path, target, sizes[path], uses[0][2]))
        for section, key, _ in uses:
            # With a dot in front it cannot be taken for a name on the hub.
            section[key] = f"./{target}"
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)
    return Upload(text, tuple(items), tuple(dict.fromkeys(stays)))


def write(upload: Upload, folder: Path) -> None:
    """Writes the upload into an empty folder."""
    (folder / PIPELINE_FILE).write_text(upload.pipeline, encoding="utf-8")
    for item in upload.items:
        target = folder / item.target
        target.parent.mkdir(parents=True, exist_ok=True)
        if item.source.is_dir():
            for file in files_below(item.source):
                copy = target / file.relative_to(item.source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        else:
            shutil.copyfile(item.source, target)


def contents(upload: Upload) -> dict[str, bytes]:
    """The files of the upload by their names in it."""
    found = {PIPELINE_FILE: upload.pipeline.encode()}
    for item in upload.items:
        if item.source.is_dir():
            for file in files_below(item.source):
                found[f"{item.target}/{file.relative_to(item.source).as_posix()}"] = file.read_bytes()
        else:
            found[item.target] = item.source.read_bytes()
    return found


def job_words(secrets: Sequence[str]) -> list[str]:
    """The command that runs in the uploaded folder: it starts the run, or goes on with it."""
    named = [word for name in secrets for word in ("--secret", name)]
    return ["python", "-m", PACKAGE, "run-submitted", PIPELINE_FILE, version(PACKAGE), *named]


def job_metadata(pipeline: Path, run_dir: str) -> dict[str, str]:
    """What is noted with the job, by which `list` and `status` know it."""
    return {PACKAGE: version(PACKAGE), "pipeline": pipeline.name, "run_dir": run_dir}


def remote_run_dir(run_dir: str) -> str:
    """The run's folder on the cluster: a relative one would lie in the upload, which Ray deletes, so it goes home."""
    return run_dir if run_dir.startswith(("/", "~")) else str(PurePosixPath("~", run_dir))


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files that would travel of a folder."""
    return sum(file.stat().st_size for file in files_below(path)) if path.is_dir() else path.stat().st_size


def files_below(folder: Path) -> list[Path]:
    """The files of a folder that travel, sorted: none that is hidden or compiled, no link to a folder."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def in_words(size: int) -> str:
    """A size for people: 31 KiB, 2.4 MiB."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            value = size / factor
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{size} bytes"


def _named(section: Any, where: tuple[str, ...]) -> Iterator[tuple[dict[str, Any], str, tuple[str, ...]]]:
    """The settings that name data, a model or a tokenizer: the section, its key, and the path of both."""
    if isinstance(section, list):
        for index, item in enumerate(section):
            yield from _named(item, where if len(section) == 1 else (*where, str(index)))
    elif isinstance(section, dict):
        for key, value in section.items():
            if key in _NAMING and isinstance(value, str) and not value.startswith((STAGE, "synthetic:")):
                yield section, key, (*where, *(() if key == "path" else (key,)))
            elif key != "arguments":
                yield from _named(value, (*where, key))


def _digest(path: Path) -> str:
    """SHA-256 of a file's content, or of the names and contents of a folder's files."""
    if not path.is_dir():
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    whole = hashlib.sha256()
    for file in files_below(path):
        whole.update(f"{file.relative_to(path).as_posix()}\n{_digest(file)}\n".encode())
    return whole.hexdigest()


def _refuse_too_large(modules: Sequence[Item], files: dict[str, tuple[Path, int]], limit: int) -> None:
    parts = {item.why: (item.source, item.size) for item in modules} | files
    together = sum(size for _, size in parts.values())
    if together <= limit:
        return
    largest = sorted(parts.items(), key=lambda part: part[1][1], reverse=True)
    lines = [f"  {why}: {source}, {in_words(size)}" for why, (source, size) in largest[:SHOWN]]
    if len(largest) > SHOWN:
        lines.append(f"  and {len(largest) - SHOWN} smaller")
    raise ConfigError(
        f"what the pipeline names on this machine is {in_words(together)}, and a cluster takes an upload of "
        f"{in_words(limit)} at most:\n" + "\n".join(lines) + "\n"
        "Put what is large on storage that every node of the cluster sees and name its folder: --shared FOLDER; "
        "or name it as it is called on the Hugging Face hub."
    )


# ------------------------------------------------------------------------------------ modules


def _modules(config: Pipeline, pipeline_dir: Path) -> list[Item]:
    """The user's modules that hold reward functions, and those that these import; not what is installed."""
    functions = [
        reward.function for stage in config.stages for reward in rewards_of(stage) if isinstance(reward, FunctionReward)
    ]
    search = [str(pipeline_dir), *(entry for entry in sys.path if entry)]
    waiting = list(dict.fromkeys(function.partition(":")[0].split(".")[0] for function in functions))
    seen: set[str] = {PACKAGE}
    items = []
    while waiting:
        name = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        source = _own_module(name, search)
        if source is None:
            continue
        items.append(Item(source, source.name, size_of(source), f"module {name}"))
        sources = [file for file in files_below(source) if file.suffix == ".py"] if source.is_dir() else [source]
        waiting += [imported for file in sources for imported in _imports(file)]
    return items


def _own_module(name: str, search: Sequence[str]) -> Path | None:
    """File or folder of a module of the user's; None for one that is installed, built in, or not there."""
    spec = PathFinder.find_spec(name, list(search))
    if spec is None:
        return None
    if spec.submodule_search_locations:
        source = Path(next(iter(spec.submodule_search_locations)))
    elif spec.origin and spec.origin.endswith(".py"):
        source = Path(spec.origin)
    else:
        return None
    installed = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    return None if any(source.is_relative_to(folder) for folder in installed) else source


def _imports(file: Path) -> Iterator[str]:
    """The first names of all modules that a file imports."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]
