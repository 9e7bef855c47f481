"""The process of one benchmark: `python -m rlhf_ray.bench.child '{"name": ..., "folder": ..., ...}'`.

It answers on standard output, one JSON object a line; what it or a library prints goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import IO, Any

from rlhf_ray.bench.figures import Settings
from rlhf_ray.bench.results import as_object
from rlhf_ray.errors import InstallError


def main(order: str) -> None:
    """Measures what is ordered, and answers."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    values = json.loads(order)

    def say(text: str) -> None:
        _answer(answers, {"say": text})

    try:
        module = importlib.import_module(f"rlhf_ray.bench.{values['name']}")
        settings = Settings(Path(values["folder"]), values["repeats"], values["quick"], say)
        _answer(answers, {"figures": [as_object(figure) for figure in module.measure(settings)]})
    except InstallError as error:
        _answer(answers, {"skipped": str(error)})
    except Exception as error:
        traceback.print_exc()
        _answer(answers, {"failed": f"{type(error).__name__}: {error}"})


def _answer(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message, allow_nan=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
