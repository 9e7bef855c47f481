"""Starting a Ray of our own on this machine, and joining one that runs."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import tempfile
from pathlib import Path

import psutil
import ray
from ray.exceptions import RayError

from rlhf_ray.errors import ConfigError

_SMALL_MACHINE = 32 << 30
_SMALL_OBJECT_STORE = 1 << 30
_CONNECT_S = 5.0


def join_ray(address: str, timeout_s: float) -> None:
    """Connects to a running Ray."""
    where = f"placement.address: got {address!r}"
    if address.startswith("ray://"):
        raise ConfigError(f"{where}, wanted HOST:PORT of the cluster's head; a ray:// client cannot hold the workers")
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"{where}, wanted HOST:PORT, `auto`, or nothing for a Ray of this machine's own")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=min(_CONNECT_S, timeout_s)).close()
        except OSError as error:
            raise ConfigError(
                f"{where}, but nothing answers there ({error}); is the cluster up, and the port open?"
            ) from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, RayError) as error:
        raise ConfigError(
            f"{where}, but no connection came about: {error}\nIs a Ray cluster running there? "
            "With token authentication, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) must be set"
        ) from None


def start_ray(num_cpus: int | None, num_gpus: int | None) -> str:
    """Starts a Ray of our own on this machine; gives its temporary folder."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Our actors run in processes with an environment of their own; those started ahead would stay idle.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    _provide_token()
    # It only says that authentication is on.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    # Sockets lie in this folder, and their paths may have 107 characters.
    folder = tempfile.mkdtemp(prefix="rlhf_ray_", dir="/tmp")
    small = psutil.virtual_memory().total < _SMALL_MACHINE
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            include_dashboard=False,
            object_store_memory=_SMALL_OBJECT_STORE if small else None,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=folder,
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _provide_token() -> None:
    """Gives Ray a token for this session, where it would otherwise write one into the home folder."""
    if any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    if not (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
