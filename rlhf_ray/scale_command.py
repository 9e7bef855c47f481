"""`rlhf-ray scale RUN generator=4`: more or fewer generators for a run that is under way.

The wish is a file in the run's folder, which the run reads before its next iteration. For a submitted run a job on the
cluster writes it, so that no folder has to be shared.
"""

from __future__ import annotations

import secrets
import shlex
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.config.load import CONFIG_FILE
from rlhf_ray.config.problems import suggestion
from rlhf_ray.errors import ConfigError
from rlhf_ray.terminal import exit_codes, say, write

TIMEOUT_S = 3600
"""Seconds that the command waits for the run; an iteration may be long."""
_POLL_S = 0.2
_ROLES = ("generator", "policy", "critic", "reference", "reward")


def add_scale(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("scale")(scale_command)


def scale_command(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Folder of a run, or with --address a submitted run.", show_default=False),
    ],
    wanted: Annotated[str, typer.Argument(metavar="generator=NUMBER", help="How many workers the role is to have.")],
    address: Annotated[
        str | None,
        typer.Option(help="Dashboard of the cluster that RUN was submitted to: http://HOST:8265.", show_default=False),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Leave the wish to the run, and do not wait.")] = False,
    timeout_s: Annotated[
        int, typer.Option(min=1, metavar="SECONDS", help="How long to wait; the wish stands after that.")
    ] = TIMEOUT_S,
) -> None:
    """Change the number of generators of a run that is under way; its result stays the same.

    New ones serve from the next iteration on, once they hold the weights. Exit code 1 where there is no room for them:
    the run then goes on with those that it has.
    """
    with exit_codes():
        generators = _number(wanted)
        if address is not None:
            _ask_cluster(run, generators, address, detach=detach, timeout_s=timeout_s)
        else:
            _ask_folder(run, generators, detach=detach, timeout_s=timeout_s)


def _number(wanted: str) -> int:
    role, found, text = wanted.partition("=")
    if not found or role not in _ROLES:
        raise ConfigError(f"got {wanted!r}, wanted generator=NUMBER{suggestion(role, ['generator'])}")
    if role != "generator":
        raise ConfigError(
            f"{role}: got {text}, but only the number of generators can change while a run goes on; "
            f"set {role}.workers before its start"
        )
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ConfigError(f"generator: got {text!r}, wanted a whole number above 0")
    return int(text)


def _ask_folder(run: str, generators: int, *, detach: bool, timeout_s: float) -> None:
    folder = Path(run).expanduser().absolute()
    if not (folder / CONFIG_FILE).is_file():
        what = "holds no run (there is no config.yaml)" if folder.is_dir() else "is not a folder"
        raise ConfigError(f"{run} {what}; wanted the run_dir of a run, or with --address a submitted run's id")
    from rlhf_ray.trainers.lock import owner_of
    from rlhf_ray.trainers.scale_file import read_standing, read_wish, wish_for

    if owner_of(folder) is None:
        raise ConfigError(
            f"{run}: no run is under way in it; only one that is can be scaled (rlhf-ray resume goes on with one)"
        )
    now = read_standing(folder)
    if now is None:
        raise ConfigError(f"{run}: its stage has no generators that can be scaled; a PPO stage has, once it iterates")
    wish = wish_for(folder, stage=now.stage, generator=generators)
    say(f"{now.stage}: {now.generator} generators; {generators} are asked for, from the next iteration on")
    if detach:
        return
    deadline = time.monotonic() + timeout_s
    while now.wish != wish.number or not now.settled:
        if time.monotonic() > deadline:
            say(f"not done after {timeout_s:g} s; the wish stands")
            raise SystemExit(1)
        time.sleep(_POLL_S)
        before, later = now, read_standing(folder)
        if later is None or owner_of(folder) is None:
            say(f"{now.stage} has ended before")
            raise SystemExit(1)
        if read_wish(folder) != wish:
            say("another wish has taken the place of this one")
            raise SystemExit(1)
        now = later
        if now.wish == wish.number and not now.settled and now.note != before.note:
            say(now.note)
    print(f"{now.stage}: {now.generator} generators from iteration {now.since}")
    if now.note:
        say(now.note)
        raise SystemExit(1)


def _ask_cluster(run: str, generators: int, address: str, *, detach: bool, timeout_s: int) -> None:
    """Lets a job on the cluster's head node, where the run's folder lies, do the same; ends with its exit code."""
    from rlhf_ray.distributed.jobs import connect
    from rlhf_ray.submission.runs import find_run

    server = connect(address)
    found = find_run(server, run)
    if found.ended:
        raise ConfigError(f"{found.id} has ended: {found.state}")
    words = ["python", "-m", "rlhf_ray", "scale", found.metadata["run_dir"], f"generator={generators}"]
    words += ["--timeout-s", str(timeout_s), *(["--detach"] if detach else [])]
    job_id = f"scale-{found.id[:40]}-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="rlhf_ray_scale_") as folder:
        server.submit(job_id, f"exec {shlex.join(words)}", Path(folder), variables={}, metadata={})
    job = server.follow(job_id, write)
    raise SystemExit(job.exit_code)
