"""The reference's log-probabilities of whole answers, kept on disk under what they are made of.

    <folder>/<key of the reference>/<SHA-256 of the rows>.parquet      columns: answer (32 bytes), logprob (float32)

The key says which weights answered, and how; an answer is found by the SHA-256 of its tokens and of which of them
count. So another pass, run or beta finds what is there, and nothing that was computed otherwise. An answer's last bits
may depend on what it was computed beside (the other answer of its pair on a CPU, other rows on a GPU): they are those
of the first time. Files are written beside their name and renamed, and never change: any number of runs may share a
folder.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rlhf_ray.data.batches import Sequences
from rlhf_ray.errors import ConfigError
from rlhf_ray.shapes import SequenceFloat

VARIABLE = "RLHF_RAY_CACHE"
ROWS_PER_FILE = 4096
"""New answers after which a file is written."""
_FORMAT = "2"
_SCHEMA = pa.schema([("answer", pa.binary(32)), ("logprob", pa.float32())])


def cache_folder(setting: str | None) -> Path:
    """The folder of the caches: the setting, else $RLHF_RAY_CACHE, else ~/.cache/rlhf_ray."""
    return Path(setting or os.environ.get(VARIABLE) or "~/.cache/rlhf_ray").expanduser().absolute()


def reference_key(parts: Mapping[str, str]) -> str:
    """SHA-256 of what decides a reference's log-probabilities: the parts, and the libraries that compute them.

    Args:
        parts: the digest of its weights, their type, the kind of device.
    """
    libraries = {name: version(name) for name in ("torch", "transformers")}
    lines = [f"format: {_FORMAT}", *(f"{name}: {value}" for name, value in sorted((libraries | dict(parts)).items()))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def answer_digests(sequences: Sequences) -> list[bytes]:
    """SHA-256 of each row's tokens and of which of them are the answer's; padding does not count."""
    tokens = sequences.tokens.numpy().astype("<i8")
    mask = sequences.response_mask.numpy()
    lengths = sequences.lengths().tolist()
    return [
        hashlib.sha256(row[:length].tobytes() + np.packbits(counts[:length]).tobytes()).digest()
        for row, counts, length in zip(tokens, mask, lengths, strict=True)
    ]


def make_folder(folder: Path) -> None:
    """Makes a cache's folder where it is not there; ConfigError where that cannot be, or it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("it cannot be written to")
    except OSError as error:
        raise ConfigError(
            f"cache_dir: the folder {folder} cannot be used: {error.strerror or error}; choose another, or set cache "
            "to false"
        ) from error


class ReferenceCache:
    """What one reference has said so far; a context manager that writes the rest at the end.

    Args:
        folder: see `cache_folder`; made where it is not there.
        key: see `reference_key`.
        message: where a file that cannot be used, or written, is reported.

    Raises:
        ConfigError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, key: str, message: Callable[[str], None]) -> None:
        self.folder = folder / key
        self._message = message
        self._known: dict[bytes, float] = {}
        self._new: dict[bytes, float] = {}
        make_folder(self.folder)
        for path in sorted(self.folder.glob("*.parquet")):
            self._read(path)

    def __enter__(self) -> ReferenceCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()

    def __len__(self) -> int:
        """Answers that are known."""
        return len(self._known)

    def missing(self, digests: Sequence[bytes]) -> list[int]:
        """Positions of the answers that are not known."""
        return [position for position, digest in enumerate(digests) if digest not in self._known]

    def find(self, digests: Sequence[bytes]) -> SequenceFloat:
        """[B] the log-probabilities of answers that are all known."""
        return torch.tensor([self._known[digest] for digest in digests], dtype=torch.float32)

    def add(self, digests: Sequence[bytes], logprobs: SequenceFloat) -> None:
        """Takes what the reference said of answers that are not known yet; written now and then, and at the end."""
        said = zip(digests, logprobs.tolist(), strict=True)
        found = {digest: logprob for digest, logprob in said if digest not in self._known}
        self._known |= found
        self._new |= {answer: logprob for answer, logprob in found.items() if math.isfinite(logprob)}
        if len(self._new) >= ROWS_PER_FILE:
            self.write()

    def write(self) -> None:
        """Writes what is new as one more file."""
        if not self._new:
            return
        table = pa.table([list(self._new), list(self._new.values())], schema=_SCHEMA)
        self._new = {}
        path = self.folder / f"{_digest(table)}.parquet"
        partial = path.with_name(f".{path.stem}.{uuid4().hex}.partial")
        try:
            pq.write_table(table, partial, compression="zstd")
            partial.replace(path)
        except OSError as error:
            self._message(f"the reference cache cannot write {path}: {error}; {table.num_rows} answers are not kept")
            partial.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        try:
            table = pq.read_table(path, partitioning=None)
            if table.schema != _SCHEMA or _digest(table) != path.stem:
                raise ValueError("its content is not what its name says")
        except (OSError, ValueError, pa.ArrowException) as error:
            problem = str(error).partition("\n")[0]
            self._message(f"the reference cache ignores {path}, which is damaged ({problem}); remove it")
            return
        self._known |= zip(table["answer"].to_pylist(), table["logprob"].to_pylist(), strict=True)


def _digest(table: pa.Table) -> str:
    logprobs = table["logprob"].to_numpy().astype("<f4").tobytes()
    return hashlib.sha256(b"".join(table["answer"].to_pylist()) + logprobs).hexdigest()
