"""Rows of a data source, whatever its format, each with the place to name when it is wrong.

No loading scripts are run. `datasets` and `pyarrow` are imported only for the formats that need them.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_ray.config.schema import Source
from rlhf_ray.data import synthetic
from rlhf_ray.errors import DataError

PARTS = "part_*.parquet"
"""The files of a folder that are the parts of one table, in the order of their names."""
EXTENSIONS = (".jsonl", ".jsonl.gz", ".parquet", ".csv", ".csv.gz")
_OTHER_FILES = re.compile(
    r"\.(json|txt|tsv|xlsx?|arrow|feather|zip|tar|bz2|xz|zst|gz|pkl|npy|npz|ya?ml|xml|html|py)$", re.I
)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PROBE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Table:
    """The rows of one source, in the source's order, cut to its `rows`.

    Args:
        name: the source as messages name it.
        unit: separates name and number in a place: ":" for lines of a text file, ": row " elsewhere.
        columns: the columns that are there (of JSON lines: those of the first row).
        read: gives (number, row) with at least the wanted columns; only in JSON lines may a row lack one.
    """

    name: str
    unit: str
    columns: tuple[str, ...]
    read: Callable[[Sequence[str]], Iterator[tuple[int, dict[str, Any]]]]

    def place(self, number: int) -> str:
        """Where a row is: `file.jsonl:12`, `file.parquet: row 12`; both count from 1."""
        return f"{self.name}{self.unit}{number}"

    def rows(self, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and values of each row; DataError for a missing column, a broken file, and where there is no row."""
        for column in wanted:
            if column not in self.columns:
                raise DataError(self.missing(column, self.name))
        empty = True
        for number, row in self.read(wanted):
            empty = False
            for column in wanted:
                if column not in row:
                    raise DataError(self.missing(column, self.place(number), row))
            yield number, row
        if empty:
            raise DataError(f"{self.name}: there are no rows; at least one is wanted")

    def missing(self, column: str, place: str, row: Sequence[str] | dict[str, Any] | None = None) -> str:
        """The words for a column that is not there."""
        there = list(self.columns if row is None else row)
        return (
            f"{place}: there is no column {column!r}; got {_listed(there)}{did_you_mean(column, there)} "
            "Name the column under `data.columns`, or repair the file."
        )


def did_you_mean(got: str, known: Sequence[str]) -> str:
    """A sentence end that offers the closest known name, or a full stop."""
    close = get_close_matches(got.lower(), [name.lower() for name in known], n=1, cutoff=0.5)
    match = next((name for name in known if close and name.lower() == close[0]), None)
    return f"; did you mean {match!r}?" if match is not None else "."


def _listed(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "none"


def open_table(source: Source) -> Table:
    """The table behind a source. Raises DataError where there is none or its head cannot be read."""
    path = Path(source.path).expanduser()
    if source.path.startswith("synthetic:"):
        table = _synthetic(source)
    elif path.is_dir():
        parts = sorted(path.glob(PARTS))
        table = _parquet(source.path, parts) if parts else _saved_dataset(source, path)
    elif path.exists():
        table = _file(source, path)
    elif _looks_like_a_file(source.path):
        raise DataError(f"{source.path}: no such file or directory{_neighbours(path)}")
    else:
        table = _hub_dataset(source)
    return _first_rows(table, source.rows)


def _first_rows(table: Table, rows: int | None) -> Table:
    return (
        table
        if rows is None
        else Table(table.name, table.unit, table.columns, lambda wanted: islice(table.read(wanted), rows))
    )


def _looks_like_a_file(path: str) -> bool:
    is_path = path.startswith(("/", "./", "../", "~")) or path.count("/") > 1 or "\\" in path
    return (
        is_path or path.lower().endswith(EXTENSIONS) or bool(_OTHER_FILES.search(path)) or not _HUB_NAME.fullmatch(path)
    )


def _neighbours(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (nor the folder {folder})."
    return did_you_mean(path.name, sorted(entry.name for entry in islice(folder.iterdir(), 1000)))


def _file(source: Source, path: Path) -> Table:
    name = source.path
    if not os.access(path, os.R_OK):
        raise DataError(f"{name}: no permission to read this file.")
    lower = path.name.lower()
    if not lower.endswith(EXTENSIONS):
        raise DataError(
            f"{name}: unknown kind of file {path.suffix!r}; wanted one of {', '.join(EXTENSIONS)}, "
            "a folder written by `datasets`' save_to_disk, or a hub name."
        )
    if path.stat().st_size == 0:
        raise DataError(f"{name}: the file is empty; at least one row is wanted.")
    if lower.endswith(".parquet"):
        return _parquet(name, [path])
    return _csv(name, path) if lower.endswith((".csv", ".csv.gz")) else _json_lines(name, path)


def _lines(name: str, path: Path) -> Iterator[str]:
    """Lines of a text file, unpacked, with broken bytes named by line."""
    number = 0
    unpack: Callable[..., Any] = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with unpack(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}:{number}: not UTF-8 (byte 0x{error.object[error.start]:02x}, the line's {error.start + 1}th); "
            "save the file as UTF-8."
        ) from error
    except gzip.BadGzipFile as error:
        raise DataError(
            f"{name}: not a gzip file though its name says so ({error}); compress it, or drop `.gz` from its name."
        ) from error
    except (EOFError, zlib.error) as error:
        raise DataError(
            f"{name}:{number + 1}: the gzip stream is broken or cut here ({error}); copy or download the file again."
        ) from error


def _json_lines(name: str, path: Path) -> Table:
    def read(wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(_lines(name, path), 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(
                    f"{name}:{number}: not valid JSON: {error}; wanted one object per line, got {_short(line)}"
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{name}:{number}: wanted one JSON object per line, got {describe(row)}.")
            yield number, row

    first = next(read(()), None)
    if first is None:
        raise DataError(f"{name}: there are no rows; at least one is wanted.")
    return Table(name, ":", tuple(first[1]), read)


def _csv(name: str, path: Path) -> Table:
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(_lines(name, path), strict=True)
    header = next(lines, [])
    if not any(header):
        raise DataError(f"{name}:1: the first line is blank; wanted the names of the columns.")
    twice = next((column for column in header if header.count(column) > 1), None)
    if twice is not None:
        raise DataError(f"{name}:1: the column {twice!r} is there twice; give every column its own name.")

    def read(wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        reader = csv.reader(_lines(name, path), strict=True)
        next(reader)
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(
                    f"{name}:{line}: not valid CSV: {error}; put fields with quotes or line ends in double quotes, "
                    "and double the quotes inside."
                ) from error
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{name}:{line}: got {len(fields)} fields, wanted {len(header)} as in the first line "
                    f"({_listed(header)}); put fields with commas in double quotes."
                )
            values = dict(zip(header, fields, strict=True))
            yield line, {column: values[column] for column in wanted}

    return Table(name, ":", tuple(header), read)


def _parquet(name: str, parts: Sequence[Path]) -> Table:
    """A table over one file, or over the parts of a folder in their order."""
    import pyarrow
    import pyarrow.parquet

    def broken(error: Exception) -> DataError:
        return DataError(f"{name}: cannot be read as Parquet: {_one_line(error)}; write or download the file again.")

    try:
        columns = tuple(pyarrow.parquet.read_schema(parts[0]).names)
    except (pyarrow.ArrowException, OSError) as error:
        raise broken(error) from error

    def read(wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        try:
            for part in parts:
                with pyarrow.parquet.ParquetFile(part) as file:
                    for batch in file.iter_batches(batch_size=1024, columns=list(wanted)):
                        for row in batch.to_pylist():
                            number += 1
                            yield number, row
        except (pyarrow.ArrowException, OSError) as error:
            raise broken(error) from error

    return Table(name, ": row ", columns, read)


def _saved_dataset(source: Source, path: Path) -> Table:
    name = source.path
    if not any((path / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        inside = sorted(entry.name for entry in islice(path.iterdir(), 1000))
        raise DataError(
            f"{name}: this folder was not written by `datasets`' save_to_disk (it holds {_listed(inside)}); "
            "name a file in it, or a folder of that kind."
        )
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds for a damaged folder
        raise DataError(
            f"{name}: cannot be read as a `datasets` folder: {_one_line(error)}; write it again with save_to_disk."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            raise DataError(_no_split(source, list(loaded)))
        return _arrow_table(f"{name} ({source.split})", loaded[source.split])
    if source.split not in ("train", str(loaded.split)):
        raise DataError(
            f"{name}: this folder holds one data set (split {loaded.split}), so `split: {source.split}` has nothing to "
            "choose from; leave it out."
        )
    return _arrow_table(name, loaded)


def _arrow_table(name: str, dataset: Any) -> Table:
    """A table over a memory-mapped data set: rows are taken a thousand at a time."""

    def read(wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        chosen = dataset.select_columns(list(wanted))
        number = 0
        for block in chosen.iter(batch_size=1024):
            for values in zip(*(block[column] for column in wanted), strict=True):
                number += 1
                yield number, dict(zip(wanted, values, strict=True))

    return Table(name, ": row ", tuple(dataset.column_names), read)


def _hub_dataset(source: Source) -> Table:
    """A data set of the Hugging Face hub, or the copy of it in the local cache where the hub is out of reach."""
    import datasets
    import huggingface_hub.constants as hub

    label = f"{source.path} ({source.split})"
    unreachable = _hub_problem(source)
    offline = hub.HF_HUB_OFFLINE
    try:
        # Without this the library repeats each request for 23 s before it looks into its cache.
        hub.HF_HUB_OFFLINE = offline or unreachable is not None
        dataset = datasets.load_dataset(source.path, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # the library raises many kinds; all of them are about this source
        if unreachable is not None:
            raise DataError(
                f"{source.path}: there is no file of this name, and the Hugging Face hub cannot be reached "
                f"({unreachable}); nor is it in the local cache. "
                "Check the name and the network, or give a local file."
            ) from error
        raise DataError(f"{label}: the hub's data set cannot be loaded: {_one_line(error)}") from error
    finally:
        hub.HF_HUB_OFFLINE = offline
    return _arrow_table(label, dataset)


def _hub_problem(source: Source) -> str | None:
    """Why the hub cannot be asked, or None; raises DataError where it answers that the data set is not to be had."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().dataset_info(source.path, revision=source.revision, timeout=_PROBE_TIMEOUT_S)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # A thread, because the timeout of a request does not cover the look-up of the host's name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_TIMEOUT_S)
    problem = outcome[0] if outcome else TimeoutError(f"no answer within {_PROBE_TIMEOUT_S:g} s")
    match problem:
        case None:
            return None
        case GatedRepoError():
            raise DataError(
                f"{source.path}: this data set of the hub is gated; accept its terms on its page, "
                "and set HF_TOKEN to a token of that account."
            ) from problem
        case RevisionNotFoundError():
            raise DataError(
                f"{source.path}: the hub has no revision {source.revision!r} of this data set."
            ) from problem
        case RepositoryNotFoundError():
            raise DataError(
                f"{source.path}: neither a file here nor a data set on the hub; check the name (hub names read "
                "`owner/name`), and set HF_TOKEN if it is private."
            ) from problem
        case HFValidationError():
            raise DataError(
                f"{source.path}: neither a file here nor a valid hub name ({_one_line(problem)})."
            ) from problem
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set"
        case _:
            return f"{type(problem).__name__}: {_one_line(problem)}"


def _synthetic(source: Source) -> Table:
    corpus = source.path.removeprefix("synthetic:")
    if corpus not in ("reviews", "preferences"):
        raise DataError(
            f"{source.path}: there is no synthetic corpus {corpus!r}; wanted `synthetic:reviews` or "
            "`synthetic:preferences`."
        )
    if source.split not in synthetic.SPLITS:
        raise DataError(_no_split(source, list(synthetic.SPLITS)))
    count = source.rows or synthetic.SPLITS[source.split]
    write = synthetic.reviews if corpus == "reviews" else synthetic.preferences
    rows: list[dict[str, Any]] = [{**row} for row in write(source.split, count)]

    def read(wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in enumerate(rows, 1):
            yield number, {column: row[column] for column in wanted}

    return Table(f"{source.path} ({source.split})", ": row ", tuple(rows[0]), read)


def _no_split(source: Source, there: Sequence[str]) -> str:
    return f"{source.path}: there is no split {source.split!r}; got {_listed(there)}{did_you_mean(source.split, there)}"


def describe(value: object) -> str:
    """A value as messages show it: its JSON type and a short piece of it."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else f"{kinds.get(type(value), type(value).__name__)} ({_short(repr(value))})"


def _short(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + "..."


def _one_line(error: Exception) -> str:
    return _short(str(error), 240) or type(error).__name__
