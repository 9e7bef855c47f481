"""What a user asks for who submits a pipeline, however it then gets to its cluster."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rlhf_ray.config.load import load_pipeline
from rlhf_ray.config.schema import Pipeline
from rlhf_ray.errors import ConfigError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Order:
    """A pipeline to be submitted.

    Args:
        pipeline: its file.
        overrides: `key=value` settings to change.
        run_dir: the run's folder in place of the file's; None: that one.
        secrets: names of environment variables that must be set where it runs.
        save_s: seconds to save a checkpoint when the run is stopped.

    Raises:
        ConfigError: a secret is more than a name.
    """

    pipeline: Path
    overrides: tuple[str, ...]
    run_dir: str | None
    secrets: tuple[str, ...]
    save_s: int

    def __post_init__(self) -> None:
        for name in self.secrets:
            _check_name(name)

    def load(self, *, elsewhere: Sequence[Path]) -> Pipeline:
        """The pipeline with its changes; what lies below the folders `elsewhere` is not looked for here."""
        run_dir = [] if self.run_dir is None else [f"run_dir={self.run_dir}"]
        return load_pipeline(self.pipeline, [*self.overrides, *run_dir], elsewhere=elsewhere)


def run_name(run_dir: str) -> str:
    """The last part of a run's folder as part of a name: letters, digits, `-` and `_`."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", PurePosixPath(run_dir).name).strip("_-")[:40] or "run"


def _check_name(name: str) -> None:
    """Says nothing of what follows a `=`: it may be the secret."""
    if "=" in name:
        raise ConfigError(
            f"--secret: got {name.partition('=')[0]}=..., wanted the name alone: a value would be kept in the job's "
            "record, where everybody who reaches the cluster can read it. Set it on the cluster's nodes"
        )
    if not _NAME.fullmatch(name):
        raise ConfigError("--secret: wanted the name of an environment variable, such as HF_TOKEN")
