"""Reads a pipeline file and `key=value` overrides, and says everything that is wrong with them at once.

YAML here is YAML 1.2 in three points where version 1.1 surprises: `off` and `yes` are words, `1e-5` is a number,
dates are text.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rlhf_ray.config import describe
from rlhf_ray.config.describe import METHODS, PIPELINE_KEYS, STAGE_KEYS, Kind
from rlhf_ray.config.effects import without_effect
from rlhf_ray.config.layouts import expand_layout
from rlhf_ray.config.problems import KeyPath, Problem, suggestion
from rlhf_ray.config.rules import check_rules
from rlhf_ray.config.schema import Pipeline, Section
from rlhf_ray.errors import ConfigError

CONFIG_FILE = "config.yaml"
ORIGIN_FILE = "origin.json"

# Stand-ins for missing settings, so that the rules between the others can still be checked.
_STAND_INS: dict[str, object] = {
    "run_dir": "runs/unnamed",
    "iterations": 1,
    "policy": {"model": "unnamed"},
    "model": "unnamed",
    "reward": [{"kind": "function", "function": "unnamed:unnamed"}],
    "data": {"train": "unnamed"},
    "train": "unnamed",
    "path": "unnamed",
    "function": "unnamed:unnamed",
    "label": "unnamed",
    "project": "unnamed",
    "min": 1,
    "max": 1,
}


def load_pipeline(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    pipeline_dir: Path | None = None,
    elsewhere: Sequence[Path] = (),
) -> Pipeline:
    """The pipeline of a file with `key=value` overrides applied, complete and checked.

    `pipeline_dir` is where reward functions are looked up, by default the file's folder. What lies below the folders
    `elsewhere` is on another machine and not looked for here.
    Raises ConfigError with every mistake of the file and the overrides, each with path, got and wanted.
    """
    file = Path(path)
    document = _read(file)
    for override in overrides:
        _override(document, override)
    folder = pipeline_dir if pipeline_dir is not None else file.resolve().parent
    pipeline, problems = _validate(document, folder)
    if pipeline is not None:
        problems = [each for each in problems if not _lies_below(pipeline, each.path, elsewhere)]
    problems = document.problems + problems
    if problems or pipeline is None:
        raise ConfigError(_report(document, problems))
    return pipeline


def _lies_below(pipeline: Pipeline, path: KeyPath, folders: Sequence[Path]) -> bool:
    """True where the setting at the path names something below one of the folders."""
    value: object = pipeline
    for key in path:
        value = value[key] if isinstance(key, int) and isinstance(value, tuple) else getattr(value, str(key), None)
    return isinstance(value, str) and any(Path(value).is_relative_to(folder) for folder in folders)


def dump_pipeline(pipeline: Pipeline) -> str:
    """The pipeline as YAML with every setting that has an effect; it loads again to an equal pipeline."""
    silent = {problem.path for problem in without_effect(pipeline)}
    tree = _plain(pipeline, (), silent)
    header = f"# Resolved by rlhf_ray {version('rlhf_ray')}: every setting that has an effect, defaults included.\n"
    return header + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def run_files(pipeline: Pipeline, *, pipeline_dir: Path) -> dict[str, str]:
    """The files that a run's folder starts with, by name: where the run was started, for `resume`, and its config."""
    origin = {"pipeline_dir": str(pipeline_dir.resolve()), "working_directory": str(Path.cwd())}
    return {ORIGIN_FILE: json.dumps(origin, indent=2) + "\n", CONFIG_FILE: dump_pipeline(pipeline)}


def stages_of_run(run_dir: Path) -> list[str]:
    """The names of a run's stages, in their order; none where the folder has no config.yaml.

    Raises:
        ConfigError: config.yaml cannot be read.
    """
    file = run_dir / CONFIG_FILE
    return _read(file).stage_names() if file.is_file() else []


def has_stages(path: str | Path) -> bool:
    """Whether a pipeline file lists stages, whose names stand in front of their settings in overrides."""
    return not _read(Path(path)).single


def read_origin(run_dir: Path) -> tuple[Path, Path]:
    """A run's pipeline folder and working directory; where nothing is noted, the run's folder and the present one."""
    try:
        origin = json.loads((run_dir / ORIGIN_FILE).read_text(encoding="utf-8"))
        return Path(origin["pipeline_dir"]), Path(origin["working_directory"])
    except (OSError, ValueError, KeyError, TypeError):
        return run_dir, Path.cwd()


def _plain(value: object, path: KeyPath, silent: set[KeyPath]) -> object:
    if isinstance(value, Section):
        tree = {}
        for name, info in type(value).model_fields.items():
            item = getattr(value, name)
            unset = item is None and not info.is_required() and info.default is None
            if not unset and (*path, name) not in silent:
                tree[name] = _plain(item, (*path, name), silent)
        return tree
    if isinstance(value, tuple | list):
        return [_plain(item, (*path, index), silent) for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: _plain(item, (*path, key), silent) for key, item in value.items()}
    return value


# ------------------------------------------------------------------------------------ reading


@dataclass
class _Document:
    """A pipeline file as read: its settings under `stages`, and where each one came from."""

    file: Path
    tree: dict[str, Any]
    single: bool
    """The file has one method at the top, so paths are shown without a stage's name."""
    lines: dict[KeyPath, int]
    overridden: set[KeyPath] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def stage_names(self) -> list[str]:
        """The stages' names; a stage without one has its method's default, else its number."""
        stages = self.tree.get("stages")
        return [_stage_name(stage, index) for index, stage in enumerate(stages if isinstance(stages, list) else [])]

    def show(self, path: KeyPath) -> str:
        """A path as it is written in an override: `ppo.sampling.temperature`."""
        parts = _written(path, self.tree)
        stages = self.tree.get("stages")
        if len(path) > 1 and path[0] == "stages" and isinstance(path[1], int) and isinstance(stages, list):
            name = _stage_name(stages[path[1]], path[1])
            if self.single:
                parts = parts[2:] or [name]
            elif self.stage_names().count(name) > 1:
                parts = [f"stages.{path[1]}", *parts[2:]]
            else:
                parts = [name, *parts[2:]]
        return ".".join(parts)

    def line(self, path: KeyPath) -> int:
        """The line of a path or of the nearest section around it; 0 where there is none."""
        return next((self.lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.lines), 0)

    def origin(self, path: KeyPath) -> str:
        """` (line 12)` or ` (override)` for the nearest place that is known."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.overridden:
                return " (override)"
            if path[:length] in self.lines:
                return f" (line {self.lines[path[:length]]})"
        return ""


def _written(path: KeyPath, tree: object) -> list[str]:
    """A path without the list that a single entry was put in, and without the section that a plain text stands for."""
    parts, value = [], tree
    for position, part in enumerate(path):
        if isinstance(value, str) and part == "path" and position > 0:
            continue
        if isinstance(part, int) and isinstance(value, str | dict):
            continue
        parts.append(str(part))
        value = _child(value, part)
    return parts


def _stage_name(stage: object, index: int) -> str:
    if isinstance(stage, dict):
        name, method = stage.get("name"), stage.get("method")
        if isinstance(name, str) and name:
            return name
        if isinstance(method, str) and method in METHODS and "name" not in stage:
            return str(METHODS[method].model_fields["name"].default)
    return f"stages.{index}"


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's booleans and numbers, and no dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[-1] in ("null", "merge", "value")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _read(file: Path) -> _Document:
    text = _read_text(file)
    loader = _Loader(text)
    lines: dict[KeyPath, int] = {}
    problems: list[Problem] = []
    try:
        node = loader.get_single_node()
        if node is not None:
            _walk(node, (), lines, problems, above=())
        loaded = loader.construct_document(node) if node is not None else None
    except _RecursiveNodeError as error:
        raise ConfigError(f"{file}:{error.line}: an alias (*name) stands inside its own anchor (&name)") from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{file}{_mark(error)}: not valid YAML: {_yaml_words(error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if loaded is None:
        raise ConfigError(f"{file}: the file is empty; wanted run_dir and stages (see `rlhf-ray settings`)")
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file}: got {_got(loaded)}, wanted `key: value` lines such as run_dir and stages")
    return _normalise(file, loaded, lines, problems)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        parent = file.parent
        near = (
            difflib.get_close_matches(file.name, [entry.name for entry in parent.iterdir()], n=1)
            if parent.is_dir()
            else []
        )
        hint = f"; did you mean {parent / near[0]}?" if near else f" (relative paths start at {Path.cwd()})"
        raise ConfigError(f"{file}: there is no such pipeline file{hint}") from None
    except IsADirectoryError:
        hint = f"; to go on with that run: rlhf-ray resume {file}" if (file / CONFIG_FILE).is_file() else ""
        raise ConfigError(f"{file}: got a folder, wanted a pipeline file (YAML){hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not a text file: byte {error.start} is not UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None


class _RecursiveNodeError(Exception):
    """An alias to a node that contains it."""

    def __init__(self, line: int) -> None:
        super().__init__(line)
        self.line = line


def _walk(
    node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], problems: list[Problem], *, above: tuple[int, ...]
) -> None:
    """Notes the line of every key, and the keys that are given twice or are not text."""
    if id(node) in above:
        raise _RecursiveNodeError(node.start_mark.line + 1)
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _walk(item, (*path, index), lines, problems, above=above)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            if key.tag.endswith(":merge"):
                continue
            if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith(":str"):
                problems.append(Problem(path, f"in line {line} a key is not text; put it in quotes"))
                continue
            if key.value in seen:
                lines_given = f"lines {seen[key.value]} and {line}" if line > seen[key.value] else f"line {line}"
                text = f"given twice, in {lines_given}; remove one"
                problems.append(Problem((*path, key.value), text))
            seen.setdefault(key.value, line)
            lines[(*path, key.value)] = line
            _walk(item, (*path, key.value), lines, problems, above=above)


def _mark(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f":{mark.line + 1}:{mark.column + 1}" if mark else ""


def _yaml_words(error: yaml.MarkedYAMLError) -> str:
    words = ", ".join(part for part in (error.context, error.problem) if part)
    if "\\t" in words:
        words += " (indent with spaces, not tabs)"
    return words


def _normalise(file: Path, loaded: dict[Any, Any], lines: dict[KeyPath, int], problems: list[Problem]) -> _Document:
    """One shape for both forms of file: a file with one method gets its settings put under `stages`."""
    if "stages" in loaded:
        return _Document(file, loaded, False, lines, problems=problems)
    stage = {key: value for key, value in loaded.items() if key not in PIPELINE_KEYS}
    tree = {key: value for key, value in loaded.items() if key in PIPELINE_KEYS} | {"stages": [stage]}

    def moved(path: KeyPath) -> KeyPath:
        return path if not path or path[0] in PIPELINE_KEYS else ("stages", 0, *path)

    moved_lines = {moved(path): line for path, line in lines.items()}
    moved_problems = [Problem(moved(problem.path), problem.text) for problem in problems]
    return _Document(file, tree, True, moved_lines, problems=moved_problems)


# ---------------------------------------------------------------------------------- overrides


def _override(document: _Document, override: str) -> None:
    """Puts one `key=value` into the tree; what is wrong with the key or the text goes to the problems."""
    key, equals, text = override.partition("=")
    key = key.strip()
    refusal: str | None = None
    if not equals or not key or not all(key.split(".")):
        refusal = "wanted key=value, such as seed=3 or ppo.sampling.temperature=0.7"
    else:
        try:
            value = _yaml_value(text)
        except (yaml.YAMLError, ValueError) as error:
            words = _yaml_words(error) if isinstance(error, yaml.MarkedYAMLError) else str(error)
            refusal = f"the value is not valid YAML: {words}; put text with special characters in quotes"
        else:
            found = _override_path(document, key.split("."))
            refusal = found if isinstance(found, str) else _put(document, found, value)
    if refusal:
        document.problems.append(Problem((f"override {override!r}",), refusal))


def _yaml_value(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _override_path(document: _Document, parts: list[str]) -> KeyPath | str:
    """Where an override's key points to, or what is wrong with it."""
    first, rest = parts[0], parts[1:]
    names = document.stage_names()
    if first in PIPELINE_KEYS:
        return tuple(parts)
    if document.single:
        if first == names[0] and rest and first not in STAGE_KEYS:
            return f"this file has one method, so no stage's name stands in front: {'.'.join(rest)}"
        return ("stages", 0, *parts)
    if first == "stages" and rest:
        return f"a stage is named, not counted: {' or '.join(f'{name}.KEY' for name in names)}"
    if first in names:
        if names.count(first) > 1:
            return f"two stages have the name {first!r}"
        return ("stages", names.index(first), *rest) if rest else f"wanted a setting of {first}: {first}.KEY=VALUE"
    if first in STAGE_KEYS:
        full = " or ".join(".".join([name, *parts]) for name in names)
        return f"a stage's name stands in front: {full}"
    known = [*names, *PIPELINE_KEYS]
    return f"there is no stage and no setting {first!r}{suggestion(first, known)} (known: {', '.join(known)})"


def _put(document: _Document, path: KeyPath, value: object) -> str | None:
    """Sets the value at a path, with sections that are not there yet; the reason where it cannot be."""
    place: Any = document.tree
    done: KeyPath = ()
    for position, part in enumerate(path):
        last = position == len(path) - 1
        where = document.show(done)
        if isinstance(place, list):
            if not isinstance(part, int):
                if not part.isdigit():
                    return f"{where} is a list; a position comes next, such as {where}.0"
                part = int(part)
            if part >= len(place):
                return f"{where} has {len(place)} entries, counted from 0, so there is no {where}.{part}"
        elif not isinstance(place, dict):
            return f"{where} is {_got(place)}, which has no settings below it; override {where} as a whole"
        done = (*done, part)
        if last:
            place[part] = value
        elif isinstance(place, dict):
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
        else:
            place = place[part]
    # The lines below a replaced value speak of what is no longer there.
    for old in [known for known in document.lines if known[: len(done)] == done]:
        del document.lines[old]
    document.overridden.add(done)
    return None


# ------------------------------------------------------------------------------------- errors


def _validate(document: _Document, pipeline_dir: Path) -> tuple[Pipeline | None, list[Problem]]:
    """The pipeline and all problems; where the schema finds some, the rules run on what is left."""
    if document.single and "method" not in document.tree["stages"][0]:
        methods = ", ".join(METHODS)
        text = f"the file has neither `stages` nor a `method`; give stages, or one method at the top ({methods})"
        return None, [Problem(("method",), text)]
    try:
        pipeline = expand_layout(Pipeline.model_validate(document.tree))
    except ValidationError as error:
        problems = _schema_problems(error, document)
        repaired, broken = _repair(document, [problem.path for problem in problems])
        if repaired is not None:
            for problem in check_rules(repaired, pipeline_dir=pipeline_dir):
                looked_at = (problem.path, *problem.because)
                if not any(_overlap(one, other) for one in looked_at for other in broken):
                    problems.append(problem)
        return None, problems
    return pipeline, check_rules(pipeline, pipeline_dir=pipeline_dir)


def _overlap(one: KeyPath, other: KeyPath) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


@dataclass(frozen=True)
class _Spot:
    """What a pydantic error's location means here."""

    path: KeyPath
    """The path with union tags taken out, and without the list that a single entry was put in."""
    kind: Kind | None
    """What the key takes; None for a key that does not exist."""
    parent: Kind
    """What the section above takes."""
    stage: type[Section] | None
    """The stage's section that the path runs through."""
    stray: bool
    """True for the branch of a union that the value was not meant for."""


_ABSENT = object()


def _locate(location: tuple[str | int, ...], tree: object) -> _Spot:
    kind: Kind | None = Kind(Pipeline)
    parent = Kind(Pipeline)
    value: Any = tree
    path: KeyPath = ()
    stage: type[Section] | None = None
    stray = False
    for component in location:
        if kind is None:
            path = (*path, component)
            continue
        following, is_tag = describe.below(kind, component)
        if is_tag and following is not None:
            stray = stray or (
                isinstance(value, dict) != describe.is_section(following.annotation)
                and any(not describe.is_section(member) for member in describe.union_members(kind.annotation))
            )
            kind = following
            if kind.annotation in METHODS.values():
                stage = kind.annotation
            continue
        parent, kind = kind, following
        if isinstance(component, int) and not isinstance(value, list | tuple):
            continue
        path = (*path, component)
        value = _child(value, component)
    return _Spot(path, kind, parent, stage, stray)


def _child(value: Any, component: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(component, _ABSENT)
    if isinstance(value, list) and isinstance(component, int) and component < len(value):
        return value[component]
    return _ABSENT


def _schema_problems(error: ValidationError, document: _Document) -> list[Problem]:
    problems: list[Problem] = []
    shorts: list[Problem] = []
    reported = {problem.path for problem in document.problems}
    for item in error.errors(include_url=False):
        spot = _locate(item["loc"], document.tree)
        if spot.stray or (item["type"] == "invalid_key" and reported & {spot.path, spot.path[:-1]}):
            continue
        problem = _schema_problem(item["type"], item["input"], spot, document)
        (shorts if item["type"] == "too_short" else problems).append(problem)
    # A list whose entries are all wrong is called too short as well; its entries' own words suffice.
    for short in sorted(shorts, key=lambda short: -len(short.path)):
        told = reported | {problem.path for problem in problems}
        if not any(path[: len(short.path)] == short.path for path in told):
            problems.append(short)
    return list(dict.fromkeys(problems))


def _schema_problem(error_type: str, got: object, spot: _Spot, document: _Document) -> Problem:
    path, kind = spot.path, spot.kind
    if error_type == "extra_forbidden":
        return Problem(path, _unknown_key(spot, document))
    if error_type in ("union_tag_invalid", "union_tag_not_found") and kind is not None:
        key = describe.discriminator(describe.union_members(kind.annotation))
        sections = describe.union_members(kind.annotation)
        tags = [str(tag) for section in sections for tag in describe.literals(section.model_fields[key].annotation)]
        given = got.get(key) if isinstance(got, dict) else None
        choice = f"wanted one of {', '.join(tags)}"
        if given is None:
            return Problem((*path, key), f"missing; {choice}")
        return Problem((*path, key), f"got {_got(given)}, {choice}{suggestion(given, tags)}")
    if error_type == "missing" and isinstance(path[-1], str):
        wanted = f"; wanted {describe.wanted(kind)}" if kind is not None else ""
        return Problem(path, f"missing{wanted}{_meaning(spot)}")
    if error_type in ("missing", "too_long"):
        inner = error_type == "missing"
        return Problem(path[:-1] if inner else path, _got_wanted(got, spot.parent if inner else kind))
    return Problem(path, _got_wanted(got, kind))


def _got_wanted(got: object, kind: Kind | None) -> str:
    if kind is None:
        return f"got {_got(got)}"
    near = suggestion(got, describe.literals(kind.annotation)) if isinstance(got, str) else ""
    words = f"got {_got(got)}, wanted {describe.wanted(kind)}{near}"
    if kind.annotation is str and isinstance(got, int | float) and not isinstance(got, bool):
        words += f" (in quotes: '{got}')"
    return words


def _meaning(spot: _Spot) -> str:
    section = spot.parent.annotation
    info = section.model_fields.get(spot.path[-1]) if describe.is_section(section) else None
    return f" ({info.description.splitlines()[0].rstrip('.')})" if info is not None and info.description else ""


def _unknown_key(spot: _Spot, document: _Document) -> str:
    """`no such setting`, with the nearest that exists: here, elsewhere in the stage, or as the list of all."""
    key = str(spot.path[-1])
    section = spot.parent.annotation
    if len(spot.path) == 1 and key in STAGE_KEYS:
        names = document.stage_names()
        return f"no such setting at the top; it belongs into a stage: {' or '.join(f'{name}.{key}' for name in names)}"
    if not describe.is_section(section):
        return "no such setting"
    fields = list(section.model_fields)
    near = suggestion(key, fields)
    if near:
        return f"no such setting{near}"
    if spot.stage is not None:
        prefix = spot.path[:2]
        places = [document.show((*prefix, *path)) for path in describe.find_key(spot.stage, key)]
        if places:
            return f"no such setting here; did you mean {' or '.join(f'`{place}`' for place in places)}?"
    return f"no such setting; there are {', '.join(fields)}"


def _got(value: object) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    text = text if len(text) <= 60 else text[:57] + "..."
    if isinstance(value, dict):
        return f"a section {text}"
    return f"a list {text}" if isinstance(value, list | tuple) else text


def _repair(document: _Document, broken: list[KeyPath]) -> tuple[Pipeline | None, list[KeyPath]]:
    """The pipeline with wrong settings put back to their defaults, and the paths that this touched.

    None where a whole stage cannot be read.
    """
    tree = copy.deepcopy(document.tree)
    broken = list(broken)
    for _ in range(8):
        try:
            return expand_layout(Pipeline.model_validate(tree)), broken
        except ValidationError as error:
            for path in _wrong_paths(error, tree):
                if len(path) < 3 and path[:1] == ("stages",):
                    return None, broken
                broken.append(path)
                _mend(tree, path)
    return None, broken


def _wrong_paths(error: ValidationError, tree: object) -> list[KeyPath]:
    """The paths of an error, without those of sections and lists around another of them."""
    spots = [_locate(item["loc"], tree) for item in error.errors(include_url=False)]
    paths = [spot.path for spot in spots if not spot.stray]
    return [path for path in paths if not any(path == other[: len(path)] != other for other in paths)]


def _mend(tree: Any, path: KeyPath) -> None:
    """Takes a wrong value away, or puts a stand-in where one is needed; a wrong list entry takes its list along."""
    places = [tree]
    for component in path[:-1]:
        if (place := _child(places[-1], component)) is _ABSENT:
            break
        places.append(place)
    for depth in range(len(places) - 1, -1, -1):
        place, key = places[depth], path[depth]
        if isinstance(place, dict) and isinstance(key, str):
            if key in place:
                del place[key]
            elif key in _STAND_INS:
                place[key] = copy.deepcopy(_STAND_INS[key])
            else:
                continue
            return


def _report(document: _Document, problems: list[Problem]) -> str:
    in_order = sorted(problems, key=lambda problem: document.line(problem.path))
    lines = [f"  {document.show(problem.path)}{document.origin(problem.path)}: {problem.text}" for problem in in_order]
    count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
    return "\n".join([f"{document.file}: {count}", *lines])
