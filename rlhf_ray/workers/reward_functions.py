"""Reward functions of the user's: `module:function`, found beside the pipeline file or on the Python path.

This module imports neither torch nor Ray, so that `rlhf-ray check` can try a function at once.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_ray.errors import ConfigError

RewardFunction = Callable[..., Any]


def check_function(function: str, search_path: str | Path, arguments: Mapping[str, Any]) -> None:
    """Loads the function as a worker will, and says nothing where that works.

    Raises:
        ConfigError: as `load_function`.
    """
    load_function(function, search_path, arguments)


def load_function(function: str, search_path: str | Path, arguments: Mapping[str, Any]) -> RewardFunction:
    """The function named `module:function`, called later as function(prompts=, responses=, answers=, **arguments).

    Args:
        function: `module:function`; `module` is `<search_path>/module.py` where that exists, else an importable name.
        search_path: folder of the pipeline file.
        arguments: the further keyword arguments that it must take.

    Raises:
        ConfigError: no such module or function, the module cannot be imported, or the arguments do not fit.
    """
    where = f"reward function {function!r}"
    module_name, colon, name = function.partition(":")
    if not colon or not module_name or not name.isidentifier():
        raise ConfigError(f"{where}: wanted `module:function`, such as `rewards:exact_answer`")
    module = _import(module_name, Path(search_path).expanduser().resolve(), where)
    found = getattr(module, name, None)
    if not callable(found):
        defined = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        close = get_close_matches(name, defined, n=1)
        there = ", ".join(sorted(defined)) or "no function"
        hint = f"; did you mean {close[0]!r}?" if close else f"; it defines {there}"
        raise ConfigError(f"{where}: {module.__file__} has no function {name!r}{hint}")
    function_found: RewardFunction = found
    _check_signature(function_found, arguments, where)
    return function_found


def _import(name: str, folder: Path, where: str) -> ModuleType:
    path = folder.joinpath(*name.split(".")).with_suffix(".py")
    try:
        return _import_file(name, path, folder) if path.is_file() else importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0] and error.name != name:
            raise ConfigError(f"{where}: importing {name!r} failed: {error}; install what it needs") from error
        raise ConfigError(f"{where}: no module {name!r}; looked for {path}, then on the Python path") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where}: importing {name!r} failed: {type(error).__name__}: {error}") from error


def _import_file(name: str, path: Path, folder: Path) -> ModuleType:
    # Last on the path: the module may import its neighbours, and they shadow nothing that is installed.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    present = sys.modules.get(name)
    if present is not None and getattr(present, "__file__", None) != str(path):
        name = f"{name}@{path}"
        present = sys.modules.get(name)
    if present is not None:
        return present
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _check_signature(function: RewardFunction, arguments: Mapping[str, Any], where: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:
        return
    try:
        signature.bind(prompts=[], responses=[], answers=[], **arguments)
    except TypeError as error:
        given = "".join(f", {name}" for name in arguments)
        raise ConfigError(
            f"{where}: it is called with the keywords prompts, responses, answers{given}; "
            f"its signature is {signature}: {error}"
        ) from error
