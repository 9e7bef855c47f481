"""The lock of a run's folder: one process works in it, and others can ask which."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

from rlhf_ray.errors import ConfigError

_LOCK = ".lock"
_HELD = (errno.EWOULDBLOCK, errno.EACCES)


def take_lock(path: Path) -> int:
    """A descriptor that holds the folder's lock until it is closed or the process ends, however it ends."""
    try:
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"run_dir: {path} cannot be written to: {error.strerror}; choose another") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            owner = _owner(descriptor)
            os.close(descriptor)
            raise ConfigError(f"run_dir: {owner} is working in {path}; wait for it or stop it") from error
        # A file system without locks: two processes in one folder are then the user's to avoid.
        return descriptor
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


def owner_of(path: Path) -> str | None:
    """The process that works in a run's folder, as it calls itself; None where there is none.

    Where the file system has no locks, there may be one.
    """
    try:
        descriptor = os.open(path / _LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _owner(descriptor) if error.errno in _HELD else "perhaps another process"
    finally:
        os.close(descriptor)
    return None


def _owner(descriptor: int) -> str:
    return os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
