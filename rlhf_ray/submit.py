"""`rlhf-ray submit | status | logs | stop | list`: runs on a cluster, through Ray's Jobs API.

The job runs `rlhf-ray run-submitted` on the head node, in the folder that was uploaded. It starts the run, or goes on
with it where its folder holds the same run already.
"""

from __future__ import annotations

import json
import os
import secrets as random
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from rlhf_ray.config.load import CONFIG_FILE, load_pipeline, run_files
from rlhf_ray.config.schema import Pipeline
from rlhf_ray.errors import ConfigError
from rlhf_ray.options import Overrides, PipelineFile, without_effect
from rlhf_ray.submission.order import Order, run_name
from rlhf_ray.terminal import exit_codes, say, show, write

if TYPE_CHECKING:
    from rlhf_ray.distributed.jobs import Job, JobServer
    from rlhf_ray.submission.upload import Upload

SAVE_S = 600
"""Seconds that a stopped run has to save a checkpoint, unless told otherwise."""
KUBERNETES = "KUBERNETES_SERVICE_HOST"
_LEAVE_S = 60.0

Address = Annotated[
    str | None,
    typer.Option(help="Dashboard of the cluster, http://HOST:8265; else RAY_API_SERVER_ADDRESS.", show_default=False),
]
RunOrFolder = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Id of a submitted run, or its run_dir for the newest; without --address also the folder of a run.",
        show_default=False,
    ),
]
Run = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Id of a submitted run, or its run_dir for the newest.", show_default=False),
]


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of submitted runs."""
    app.command("submit")(submit_command)
    app.command("status")(status_command)
    app.command("logs")(logs_command)
    app.command("stop")(stop_command)
    app.command("list")(list_command)
    app.command("run-submitted", hidden=True)(run_submitted_command)


def submit_command(
    pipeline: PipelineFile,
    overrides: Overrides = None,
    address: Address = None,
    run_dir: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Folder of the run on the cluster, on storage that outlives it."),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Print the run's id and leave; else follow its log.")
    ] = False,
    shared: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="A folder that every node sees at the same path: what lies below it stays there. May be given again.",
            show_default=False,
        ),
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Environment variable that must be set on the cluster, such as HF_TOKEN; its value never travels. "
            "May be given again.",
            show_default=False,
        ),
    ] = None,
    save_s: Annotated[
        int, typer.Option(min=1, metavar="SECONDS", help="Time to save a checkpoint when the run is stopped.")
    ] = SAVE_S,
    without_token: Annotated[
        bool, typer.Option("--without-token", help="Accept a cluster that asks for no token.")
    ] = False,
    upload_to: Annotated[
        Path | None,
        typer.Option(
            "--print-command",
            metavar="FOLDER",
            help="Send nothing: write what would be uploaded to a new folder, and print the `ray job submit` line.",
            show_default=False,
        ),
    ] = None,
    kuberay: Annotated[
        bool, typer.Option("--kuberay", help="Send nothing: print a KubeRay RayJob for `kubectl apply`.")
    ] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="Send nothing: print a batch script for `sbatch`.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="NODESxGPUSxNAME-GB[/GB]",
            help="Nodes of --kuberay and --slurm, as for `plan`; else the fewest with a GPU for every worker, which "
            "--kuberay asks for in a group for each role.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        str | None, typer.Option(metavar="NAME", help="Image of --kuberay's pods.", show_default=False)
    ] = None,
    volume_claim: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Volume claim that --kuberay's pods share, rlhf-ray-runs by default.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run a pipeline on a Ray cluster: upload it, follow its log, end with its exit code.

    Submitted again after it was stopped, with the same settings and run_dir, it goes on from its last checkpoint.
    """
    with exit_codes():
        order = Order(pipeline, tuple(overrides or ()), run_dir, tuple(secret or ()), save_s)
        sent = {"address": address, "detach": detach or None, "without-token": without_token or None}
        on_pods = {"image": image, "volume-claim": volume_claim}
        if [kuberay, slurm, upload_to is not None].count(True) > 1:
            raise ConfigError("got several of --kuberay, --slurm and --print-command, wanted one of them")
        if kuberay:
            without_effect({**sent, "shared": shared or None}, "with --kuberay")
            from rlhf_ray.submission.kuberay import render_job

            print(render_job(order, cluster=cluster, image=image, claim=volume_claim), end="")
        elif slurm:
            without_effect({**sent, **on_pods, "shared": shared or None}, "with --slurm")
            from rlhf_ray.submission.slurm import render_script

            print(render_script(order, cluster=cluster), end="")
        else:
            without_effect({**on_pods, "cluster": cluster}, "without --kuberay or --slurm")
            if upload_to is None:
                _submit(order, address, shared or (), detach=detach, without_token=without_token)
            else:
                without_effect({**sent, "address": None}, "with --print-command")
                _print_command(order, address, shared or (), upload_to)


def status_command(run: RunOrFolder, address: Address = None) -> None:
    """Print a run's state, phase, last progress and slowest worker."""
    with exit_codes():
        from rlhf_ray.status import folder_rows, holds_a_run, status_rows
        from rlhf_ray.trainers.status import read_status

        if address is None and holds_a_run(Path(run)):
            rows = folder_rows(Path(run))
        else:
            server, job = _find(run, address)
            status = read_status(server.note(job) or "")
            if status is not None and job.ended_s is not None and status.written_s > job.ended_s + _LEAVE_S:
                status = None  # a later job of the same run wrote it
            lines = server.log(job.id).strip().splitlines()
            rows = {
                "run": job.id,
                "state": job.state if job.exit_code is None else f"{job.state}, exit code {job.exit_code}",
                "started": _time(job.started_s),
                "ended": _time(job.ended_s),
                **{name: job.metadata[name] for name in ("run_dir", "pipeline") if name in job.metadata},
                **({} if status is None else status_rows(status, now=time.time(), running=not job.ended)),
                "last line": lines[-1] if lines else "",
            }
        for name, text in rows.items():
            if text:
                print(f"{name:<10}{text}")


def logs_command(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends, with its code.")] = False,
    address: Address = None,
) -> None:
    """Print what a submitted run has written."""
    with exit_codes():
        server, job = _find(run, address)
        if follow:
            _follow(server, job.id)
        write(server.log(job.id))


def stop_command(run: Run, address: Address = None) -> None:
    """Stop a submitted run; it finishes its iteration and saves a checkpoint first."""
    with exit_codes():
        server, job = _find(run, address)
        if job.ended or not server.stop(job.id):
            print(f"{job.id} has ended before: {job.state}")
            return
        say(
            f"{job.id} got SIGTERM: it finishes its iteration and saves; after {job.stop_wait_s:g} s it is killed. "
            "Ctrl-C ends this wait alone."
        )
        job = server.wait(job.id, timeout_s=job.stop_wait_s + _LEAVE_S)
        if not job.ended:
            say(f"{job.id} is {job.state} {job.stop_wait_s + _LEAVE_S:g} s after it was asked to stop")
            raise SystemExit(1)
        print(f"{job.id}: {job.state}")


def list_command(address: Address = None) -> None:
    """Print the runs that were submitted to a cluster, newest first."""
    with exit_codes():
        from rich.table import Table

        from rlhf_ray.distributed.jobs import connect
        from rlhf_ray.submission.runs import submitted_runs

        table = Table(box=None, pad_edge=False)
        for heading in ("run", "state", "started", "pipeline", "run_dir"):
            table.add_column(heading, overflow="fold")
        runs = submitted_runs(connect(address))
        for job in runs:
            named = [job.metadata.get(name, "") for name in ("pipeline", "run_dir")]
            table.add_row(job.id, job.state, _time(job.started_s), *named)
        show(table if runs else "no run was submitted to this cluster")


def run_submitted_command(
    pipeline: Path,
    submitted_by: str,
    secret: Annotated[list[str] | None, typer.Option()] = None,
    unpack: Annotated[Path | None, typer.Option(help="Folder for what travels packed.")] = None,
    pid_file: Annotated[Path | None, typer.Option(help="Where to note this process's number.")] = None,
) -> None:
    """What the job runs on the cluster: a new run, or the one that its folder holds."""
    with exit_codes():
        if pid_file is not None:
            pid_file.write_text(f"{os.getpid()}\n", encoding="utf-8")
        here = version("rlhf_ray")
        python = ".".join(str(part) for part in sys.version_info[:3])
        say(f"rlhf_ray {here}, Ray {version('ray')}, Python {python} on {socket.gethostname()}")
        if here != submitted_by:
            raise ConfigError(
                f"this cluster has rlhf_ray {here}, and the run was submitted by {submitted_by}; install the same "
                "version on both sides"
            )
        absent = [name for name in secret or () if not os.environ.get(name)]
        if absent:
            raise ConfigError(
                f"{', '.join(absent)}: not set on this cluster. A secret's value is not sent; set it in the "
                "environment in which Ray is started on every node (on Kubernetes: env from a Secret)"
            )
        if unpack is not None:
            from rlhf_ray.submission.kuberay import unpack_into

            unpack_into(unpack)
            os.chdir(unpack)
        config = load_pipeline(pipeline)
        if config.run_dir.startswith("~") and KUBERNETES in os.environ:
            raise ConfigError(
                f"run_dir: got {config.run_dir!r}, which is lost with this container; name a folder on a volume: "
                "submit with --run-dir FOLDER"
            )
        config = config.model_copy(update={"run_dir": str(Path(config.run_dir).expanduser())})
        folder = Path(config.run_dir)
        from rlhf_ray.distributed.jobs import link_note
        from rlhf_ray.trainers.status import FILE as STATUS_FILE

        link_note(folder / STATUS_FILE)
        resume = (folder / CONFIG_FILE).is_file()
        if resume:
            _go_on(folder, config)
        from rlhf_ray.start import start_run

        start_run(config, pipeline_dir=Path.cwd(), resume=resume)


# -------------------------------------------------------------------------------------- shared


def _submit(order: Order, address: str | None, shared: Sequence[Path], *, detach: bool, without_token: bool) -> None:
    from rlhf_ray.distributed.jobs import connect
    from rlhf_ray.submission import upload

    config = order.load(elsewhere=_folders(shared))
    server = connect(address)
    _check_cluster(server, without_token=without_token)
    shipment = _shipment(order, config, shared)
    with tempfile.TemporaryDirectory(prefix="rlhf_ray_upload_") as folder:
        upload.write(shipment.parts, Path(folder))
        server.submit(
            shipment.job_id,
            shlex.join(shipment.command),
            Path(folder),
            variables=shipment.variables,
            metadata=shipment.metadata,
        )
    if detach:
        print(shipment.job_id)
        return
    say(f"submitted as {shipment.job_id}; its run_dir on the cluster is {shipment.metadata['run_dir']}")
    _follow(server, shipment.job_id)


def _print_command(order: Order, address: str | None, shared: Sequence[Path], folder: Path) -> None:
    from rlhf_ray.distributed.jobs import dashboard_url
    from rlhf_ray.submission import upload

    url = dashboard_url(address)
    shipment = _shipment(order, order.load(elsewhere=_folders(shared)), shared)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--print-command: {folder} cannot be made: {error.strerror}; wanted a new folder") from None
    upload.write(shipment.parts, folder)
    options = {
        "address": url,
        "submission-id": shipment.job_id,
        "working-dir": str(folder.resolve()),
        "runtime-env-json": json.dumps({"env_vars": shipment.variables}),
        "metadata-json": json.dumps(shipment.metadata),
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    print(f"RAY_AUTH_MODE=token {shlex.join(['ray', 'job', 'submit', *words, '--', *shipment.command])}")


@dataclass(frozen=True)
class _Shipment:
    """One submission, ready to be sent.

    Args:
        parts: what is uploaded.
        job_id: id of the new job.
        command: what it runs in the uploaded folder.
        variables: its environment.
        metadata: what is noted with it.
    """

    parts: Upload
    job_id: str
    command: list[str]
    variables: dict[str, str]
    metadata: dict[str, str]


def _shipment(order: Order, config: Pipeline, shared: Sequence[Path]) -> _Shipment:
    from rlhf_ray.distributed.jobs import STOP_WAIT
    from rlhf_ray.submission import upload

    parts = upload.prepare(config, pipeline_dir=order.pipeline.resolve().parent, shared=shared)
    _show_upload(parts, config)
    where = upload.remote_run_dir(config.run_dir)
    return _Shipment(
        parts=parts,
        job_id=f"{run_name(where)}-{random.token_hex(4)}",
        command=["exec", *upload.job_words(order.secrets)],
        variables={STOP_WAIT: str(order.save_s)},
        metadata=upload.job_metadata(order.pipeline, where),
    )


def _find(run: str, address: str | None) -> tuple[JobServer, Job]:
    from rlhf_ray.distributed.jobs import connect
    from rlhf_ray.submission.runs import find_run

    server = connect(address)
    return server, find_run(server, run)


def _follow(server: JobServer, job_id: str) -> None:
    """Prints the run's log until it ends, and ends with its exit code."""
    at = f"--address {server.address}"
    try:
        job = server.follow(job_id, write)
    except KeyboardInterrupt:
        say(
            f"\n{job_id} goes on. To come back:  rlhf-ray logs {job_id} --follow {at}\n"
            f"To stop it:  rlhf-ray stop {job_id} {at}"
        )
        raise SystemExit(130) from None
    if job.state == "FAILED" and not job.message.startswith("Job entrypoint command failed"):
        say(job.message)
    if job.state == "FAILED" and "No module named rlhf_ray" in job.message:
        say("rlhf_ray is not installed for the `python` of the cluster's head node; install it on every node")
    say(f"{job_id}: {job.state}, exit code {job.exit_code}")
    raise SystemExit(job.exit_code)


def _check_cluster(server: JobServer, *, without_token: bool) -> None:
    from rlhf_ray.doctor import FLOORS, release

    if not server.authenticated and not without_token:
        raise ConfigError(
            f"{server.address} asks for no token: whoever reaches it can run programs on the cluster. Start Ray with "
            "RAY_AUTH_MODE=token, or accept it by --without-token"
        )
    floor = next(floor for floor in FLOORS if floor.package == "ray")
    if release(server.ray_version) < release(floor.lowest):
        raise ConfigError(f"{server.address} runs Ray {server.ray_version}, wanted {floor.lowest} or newer")
    if server.ray_version != version("ray"):
        say(f"note: the cluster runs Ray {server.ray_version}, this machine has {version('ray')}")


def _show_upload(parts: Upload, config: Pipeline) -> None:
    from rlhf_ray.submission.upload import in_words

    for item in parts.items:
        say(f"uploads {item.why}: {item.source} ({in_words(item.size)})")
    for path in parts.stays:
        say(f"stays on the cluster: {path}")
    if config.placement.address is not None:
        say(f"placement.address: {config.placement.address} is left out; the job joins the cluster that it runs on")
    if not config.run_dir.startswith(("/", "~")):
        say(
            f"run_dir: {config.run_dir} becomes ~/{config.run_dir} on the head node; with several nodes, or where that "
            "does not last, name shared storage by --run-dir"
        )


def _go_on(folder: Path, config: Pipeline) -> None:
    """Takes the submitted settings for the folder's run.

    Raises:
        ConfigError: the folder holds a run whose result other settings decided, or another process works in it.
    """
    from pydantic import ValidationError

    from rlhf_ray.trainers.checkpoints import result_settings
    from rlhf_ray.trainers.durable import write_text
    from rlhf_ray.trainers.run import RunFolder

    try:
        earlier = Pipeline.model_validate(yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    except (OSError, ValidationError, yaml.YAMLError) as error:
        raise ConfigError(f"{folder / CONFIG_FILE} cannot be read: {error}") from None
    before, now = (
        {f"{s.name}.{key}": value for s in each.stages for key, value in result_settings(s, seed=each.seed).items()}
        for each in (earlier, config)
    )
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        lines = [f"  {key}: was {before.get(key)!r}, is {now.get(key)!r}" for key in changed]
        raise ConfigError(
            f"{folder} holds a run with other settings:\n" + "\n".join(lines) + "\n"
            "Set them back to go on with it, or submit with another --run-dir"
        )
    with RunFolder.open(folder):
        for name, text in run_files(config, pipeline_dir=Path.cwd()).items():
            write_text(folder / name, text)
    say(f"{folder} holds this run; going on with it")


def _folders(shared: Sequence[Path]) -> Sequence[Path]:
    for folder in shared:
        if not folder.is_absolute():
            raise ConfigError(f"--shared: got {str(folder)!r}, wanted an absolute path, as the cluster's nodes see it")
    return shared


def _time(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
