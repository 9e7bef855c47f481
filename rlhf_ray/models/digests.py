"""What tells a model's weights from any others."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.loading import load_config


def model_digest(name: str, revision: str | None = None) -> str:
    """SHA-256 of what decides the numbers of a model: a directory's weights and config.json, or a hub model's commit.

    Raises:
        ConfigError: as `load_config`; or nothing there says which weights they are.
    """
    folder = Path(name)
    if not folder.is_dir():
        commit = getattr(load_config(name, revision), "_commit_hash", None)
        if commit is None:
            raise ConfigError(f"{name}: the hub does not say which commit this is; set cache to false")
        return hashlib.sha256(f"{name}@{commit}".encode()).hexdigest()
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights:
        raise ConfigError(f"{name}: no weights (*.safetensors or *.bin) in this directory")
    lines = [f"{path.name} {_file_digest(path)}" for path in (folder / "config.json", *weights)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    found = path.stat()
    return _content_digest(str(path.absolute()), found.st_size, found.st_mtime_ns)


@cache
def _content_digest(path: str, size: int, mtime_ns: int) -> str:
    """SHA-256 of the content, read once as long as size and time of change stay what they are."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
