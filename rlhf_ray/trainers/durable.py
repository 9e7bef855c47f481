"""Files and folders that are whole or absent, whenever the process or the machine dies.

Everything is written beside its target under another name, synced to disk, and renamed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PARTIAL = ".partial"
REPLACED = ".replaced"


def sync_path(path: Path) -> None:
    """Waits until the file's content, or the folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Waits until every file and folder below (and including) `folder` is on disk."""
    for path in folder.rglob("*"):
        sync_path(path)
    sync_path(folder)


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a Parquet file."""
    write_file(path, lambda partial: pq.write_table(table, partial, compression="zstd"))


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` write a temporary file, which then replaces `path` in one step."""
    partial = path.with_name(path.name + PARTIAL)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(partial)
    sync_path(partial)
    partial.replace(path)
    sync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces the file's content in one step."""

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")

    write_file(path, write)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary folder, which then replaces `folder`.

    Where `folder` exists it is moved aside first; `recover_folder` brings it back if the process dies between the two
    renames.
    """
    partial, replaced = folder.with_name(folder.name + PARTIAL), folder.with_name(folder.name + REPLACED)
    recover_folder(folder)
    partial.mkdir(parents=True)
    write(partial)
    sync_tree(partial)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    sync_path(folder.parent)
    remove_folder(replaced)


def recover_folder(folder: Path) -> None:
    """Undoes what an interrupted `write_folder` left: `folder` is then whole or absent, and nothing lies beside it."""
    replaced = folder.with_name(folder.name + REPLACED)
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    remove_folder(replaced)
    remove_folder(folder.with_name(folder.name + PARTIAL))


def remove_folder(folder: Path) -> None:
    """Removes a folder and all below; none is fine."""
    if folder.exists():
        shutil.rmtree(folder)
