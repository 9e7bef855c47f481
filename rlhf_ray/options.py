"""What commands have in common: arguments, sections of the settings out of options, messages that speak of options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from pydantic import ValidationError

from rlhf_ray.config.paths import check_source
from rlhf_ray.config.problems import suggestion
from rlhf_ray.config.schema import Section, Source
from rlhf_ray.errors import ConfigError, UserError

S = TypeVar("S", bound=Section)

PipelineFile = Annotated[Path, typer.Argument(metavar="PIPELINE", help="Pipeline file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings to change, a stage's name in front, such as ppo.sampling.temperature=0.7 or seed=3.",
        show_default=False,
    ),
]


@contextmanager
def as_options() -> Iterator[None]:
    """Lets messages speak of a command's options, `--max-length`, where they name a pipeline's `data.max_length`."""
    try:
        yield
    except UserError as error:
        raise type(error)(_DATA_KEY.sub(lambda key: "--" + _option(key[1]), str(error))) from error


_KEYS = ("answer_marker", "chat_template", "columns", "max_length", "max_prompt_tokens", "too_long", "unusable")
_DATA_KEY = re.compile(rf"\bdata\.({'|'.join(_KEYS)})\b")


def _option(key: str) -> str:
    return {"chat_template": "chat", "samples_per_prompt": "samples"}.get(key, key).replace("_", "-")


def section(kind: type[S], /, **values: object) -> S:
    """A section of the settings out of a command's options, those that are not None.

    Raises:
        ConfigError: names the options that are wrong.
    """
    try:
        return kind.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        problems = [f"--{_option(str(e['loc'][-1]))}: got {e['input']!r}; {e['msg'].lower()}" for e in error.errors()]
        raise ConfigError("\n".join(problems)) from None


def source(path: str, *, rows: int | None, split: str | None) -> tuple[Source]:
    """One source of data, whose path can be right.

    Raises:
        ConfigError: there is no such file.
    """
    found = section(Source, path=path, rows=rows, split=split)
    for problem in check_source(found, ()):
        raise ConfigError(f"data: {problem.text}")
    return (found,)


def columns_of(kind: type[S], text: str | None) -> S:
    """`prompt=question,chosen=better` -> the names of the columns.

    Raises:
        ConfigError: not of that form, or no such name.
    """
    pairs = [part.partition("=") for part in (text or "").split(",") if part.strip()]
    for name, _, column in pairs:
        known = list(kind.model_fields)
        if name.strip() not in known or not column.strip():
            raise ConfigError(
                f"--columns: got {text!r}, wanted NAME=COLUMN,... with the names {', '.join(known)}"
                f"{suggestion(name, known)}"
            )
    return kind.model_validate({name.strip(): column.strip() for name, _, column in pairs})


def without_effect(options: Mapping[str, object], why: str) -> None:
    """Raises ConfigError for the first option that is given: it has no effect."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name}: has no effect {why}; leave it out")


def check_target(option: str, path: Path | None, ending: str = "") -> None:
    """Finds before the work that its result could not be written."""
    if path is None:
        return
    if not path.name.endswith(ending):
        raise ConfigError(f"{option}: got {str(path)!r}, wanted a file that ends in {ending}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise ConfigError(f"{option}: got {str(path)!r}, which {what}; wanted a file to write")
