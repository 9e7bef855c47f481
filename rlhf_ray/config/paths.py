"""What a pipeline file names outside itself: models, data files, reward functions.

Only what is certainly wrong is a problem: `org/name` may be on the hub, which nothing here asks.
"""

from __future__ import annotations

import ast
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from rlhf_ray.config.problems import KeyPath, Problem, suggestion
from rlhf_ray.config.schema import FunctionReward, Source

DATA_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".csv")
ADAPTER_CONFIG = "adapter_config.json"
"""The file that makes a directory one of a peft adapter."""
SYNTHETIC = ("synthetic:reviews", "synthetic:preferences")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def check_model_path(model: str, where: KeyPath, *, needs: Sequence[str] = ("config.json",)) -> Iterator[Problem]:
    """What is certainly wrong with a model's name; `org/name` may be on the hub and is left to the stage's start."""
    if not model.strip():
        yield Problem(where, "got an empty text, wanted a directory or a hub name")
        return
    path = Path(model)
    if model.startswith("~"):
        yield Problem(where, f"got {model!r}, wanted a path without `~`: {path.expanduser()}")
    elif path.is_dir():
        missing = [name for name in needs if not (path / name).is_file()]
        if needs and (path / ADAPTER_CONFIG).is_file():
            yield Problem(
                where, f"got {model!r}, a peft adapter directory; wanted a whole model: merge it into its base first"
            )
        elif missing:
            yield Problem(
                where, f"got {model!r}, a directory without {missing[0]}; wanted a Hugging Face model directory"
            )
    elif path.exists():
        yield Problem(where, f"got {model!r}, a file; wanted a Hugging Face model directory")
    elif is_local(model):
        yield Problem(where, f"got {model!r}, but there is no such directory{_nearest(path)}")


def is_local(name: str) -> bool:
    """True where a name can only be a path: hub names are `name` or `org/name`."""
    return name.startswith((".", "/")) or name.count("/") > 1 or name.endswith("/") or "\\" in name


def _nearest(path: Path) -> str:
    """The nearest name beside a path that does not exist, or the first of its parents that is missing."""
    parent = path.parent
    if not parent.is_dir():
        while not parent.parent.is_dir() and parent != parent.parent:
            parent = parent.parent
        return f" (there is no {parent}; relative paths start at {Path.cwd()})"
    near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
    if near:
        return f"; did you mean `{parent / near[0]}`?"
    return "" if path.is_absolute() else f" (relative paths start at {Path.cwd()})"


def check_source(source: Source, path: KeyPath) -> Iterator[Problem]:
    where, name = (*path, "path"), source.path
    if not name.strip():
        yield Problem(where, "got an empty text, wanted a data file, a directory, or a hub name")
        return
    if name.startswith("synthetic:"):
        if name not in SYNTHETIC:
            yield Problem(where, f"got {name!r}, wanted {' or '.join(SYNTHETIC)}{suggestion(name, SYNTHETIC)}")
        return
    file = Path(name)
    if name.startswith("~"):
        yield Problem(where, f"got {name!r}, wanted a path without `~`: {file.expanduser()}")
    elif file.is_file():
        if not name.endswith(DATA_ENDINGS):
            yield Problem(where, f"got {name!r}, wanted a file that ends in {', '.join(DATA_ENDINGS)}")
    elif not file.exists() and (is_local(name) or name.endswith(DATA_ENDINGS)):
        yield Problem(where, f"got {name!r}, but there is no such file{_nearest(file)}")


def check_function(reward: FunctionReward, where: KeyPath, pipeline_dir: Path) -> Iterator[Problem]:
    own = [key for key in ("prompts", "responses", "answers") if key in reward.arguments]
    if own:
        yield Problem(
            (*where, "arguments", own[0]),
            f"{own[0]} is what every reward function gets; give the argument another name",
        )
    at = (*where, "function")
    if not _FUNCTION.fullmatch(reward.function):
        yield Problem(at, f"got {reward.function!r}, wanted `module:function`, such as `rewards:score`")
        return
    module, _, function = reward.function.partition(":")
    file = find_module(module, pipeline_dir)
    if file is None:
        beside = [entry.stem for entry in pipeline_dir.glob("*.py")] if pipeline_dir.is_dir() else []
        yield Problem(
            at,
            f"got {reward.function!r}, but there is no module {module!r} beside the pipeline file ({pipeline_dir}) "
            f"or on the Python path{suggestion(module, beside)}",
        )
    elif file.suffix == ".py":
        yield from _function_in(file, function, at)


def find_module(module: str, pipeline_dir: Path) -> Path | None:
    """The file of a module, looked up beside the pipeline file and then on the Python path, without importing it.

    For a package or a built-in module without a file, the folder where it was looked up.
    """
    first, *rest = module.split(".")
    spec = PathFinder.find_spec(first, [str(pipeline_dir), *sys.path])
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    if spec is None:
        return pipeline_dir if module in sys.builtin_module_names else None
    return Path(spec.origin) if spec.origin else pipeline_dir


def _function_in(file: Path, function: str, at: KeyPath) -> Iterator[Problem]:
    try:
        body = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        yield Problem(at, f"{file}{line} is not valid Python: {getattr(error, 'msg', error)}")
        return
    names: set[str] = set()
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(statement.name)
        elif not isinstance(statement, ast.Expr | ast.Pass):
            # A class, an assignment, an import, an `if`: whatever it binds may be called.
            if any(isinstance(node, ast.alias) and node.name == "*" for node in ast.walk(statement)):
                return
            names |= {name for node in ast.walk(statement) for name in _bound(node)}
    if function not in names and "__getattr__" not in names:
        yield Problem(at, f"there is no function {function!r} in {file}{suggestion(function, sorted(names))}")


def _bound(node: ast.AST) -> list[str]:
    if isinstance(node, ast.alias):
        return [(node.asname or node.name).split(".")[0]]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    return [node.name] if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else []
