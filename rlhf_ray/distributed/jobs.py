"""Ray's Jobs API: what a cluster says of itself, jobs sent to it, their logs and how they ended.

    server = connect("http://head:8265")                # refuses within PROBE_S
    server.submit("hh-1f2e", "python train.py", folder, variables={}, metadata={})
    job = server.follow("hh-1f2e", print)               # job.exit_code

Looking goes over plain HTTP, each request with a deadline; submitting goes through Ray's own client, which uploads.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from rlhf_ray.distributed.background import in_background
from rlhf_ray.errors import ConfigError, RlhfRayError

T = TypeVar("T")

PROBE_S = 1.2
"""Deadline for everything that is asked before a cluster is refused."""
REQUEST_S = 30.0
UPLOAD_S = 900.0
LOST_S = 120.0
"""How long a lost connection is tried again while a log is followed."""
POLL_S = 0.5
SILENCE_S = 10.0
"""A log that says nothing for so long is a reason to ask whether the job still runs."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Seconds that Ray leaves a job between SIGTERM and SIGKILL; read from the job's own variables."""
SIGTERM_EXIT_CODE = 143
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_JOB_LOG = re.compile(r"job-driver-(.+)\.log")
_TOKEN = "RAY_AUTH_TOKEN"
_TOKEN_FILE = "RAY_AUTH_TOKEN_PATH"
_HOME_TOKEN = Path("~/.ray/auth_token")
_HOW_TO_AUTHENTICATE = (
    f"give the cluster's token by {_TOKEN}, by a file that {_TOKEN_FILE} names, or in {_HOME_TOKEN} "
    "(`ray get-auth-token` on the head prints it)"
)


@dataclass(frozen=True)
class Job:
    """One job of a cluster, as Ray keeps it.

    Args:
        id: its submission id.
        state: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        exit_code: of the job's command, 143 where it was stopped; None while it is not known.
        message: Ray's words on the state.
        started_s: seconds since the epoch; None before the start.
        ended_s: seconds since the epoch; None before the end.
        metadata: what was noted when it was submitted.
        stop_wait_s: seconds between SIGTERM and SIGKILL.
        node_id: of the node that its command runs on; None before the start.
    """

    id: str
    state: str
    exit_code: int | None
    message: str
    started_s: float | None
    ended_s: float | None
    metadata: Mapping[str, str]
    stop_wait_s: float
    node_id: str | None

    @property
    def ended(self) -> bool:
        """True once the job's state is final."""
        return self.state in ("STOPPED", "SUCCEEDED", "FAILED")


class LostError(RlhfRayError):
    """A cluster that has answered before does so no more."""


class _Log:
    """Writes a text that may come again from its beginning, each character once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self.position = 0
        self.written = 0

    def take(self, text: str) -> None:
        """The next piece of the text."""
        new = text[max(0, self.written - self.position) :]
        self.position += len(text)
        self.written = max(self.written, self.position)
        if new:
            self._write(new)


class JobServer:
    """The Jobs API of one cluster; made by `connect`."""

    def __init__(self, address: str, *, token: str | None, ray_version: str) -> None:
        self.address = address
        self.authenticated = token is not None
        self.ray_version = ray_version
        self._headers = _headers(token)

    def jobs(self) -> list[Job]:
        """Every submitted job that the cluster knows, newest first."""
        found = [_job(each) for each in self._ask("GET", "/api/jobs/").json() if each.get("submission_id")]
        return sorted(found, key=lambda job: job.started_s or 0, reverse=True)

    def job(self, job_id: str) -> Job:
        """One job; ConfigError where there is none of that id."""
        return _job(self._ask("GET", f"/api/jobs/{job_id}").json())

    def log(self, job_id: str) -> str:
        """What the job has written so far."""
        return str(self._ask("GET", f"/api/jobs/{job_id}/logs").json().get("logs") or "")

    def note(self, job: Job) -> str | None:
        """What the file behind the job's `link_note` says now; None where there is none, or no such node any more."""
        if job.node_id is None:
            return None
        query = httpx.QueryParams({"node_id": job.node_id, "filename": _note_name(job.id), "lines": -1})
        try:
            return self._ask("GET", f"/api/v0/logs/file?{query}").text
        except (LostError, ConfigError):
            return None

    def state(self, path: str) -> Any:
        """What the dashboard tells of the cluster under a path: the `data` of its answer."""
        return self._ask("GET", path).json()["data"]

    def stop(self, job_id: str) -> bool:
        """Asks Ray to send the job a SIGTERM; false where it has ended before."""
        return bool(self._ask("POST", f"/api/jobs/{job_id}/stop").json()["stopped"])

    def submit(
        self, job_id: str, command: str, folder: Path, *, variables: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        """Uploads the folder and starts the command in it, on the head node.

        Args:
            job_id: the job's id, new on this cluster.
            command: shell command.
            folder: becomes the working directory of the command and of all workers.
            variables: environment of both; anybody who reaches the cluster can read them, so never a secret.
            metadata: noted with the job, and as readable.

        Raises:
            ConfigError: the cluster refuses it.
            LostError: it took longer than UPLOAD_S.
        """
        from ray.exceptions import RayError
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
            logging.getLogger(name).setLevel(logging.WARNING)
        environment = {"working_dir": str(folder), "env_vars": dict(variables)}

        def send() -> None:
            client = JobSubmissionClient(self.address, headers=dict(self._headers))
            client.submit_job(
                entrypoint=command, submission_id=job_id, runtime_env=environment, metadata=dict(metadata)
            )

        try:
            _within(UPLOAD_S, send)
        except TimeoutError:
            raise LostError(f"{self.address} did not take the upload within {UPLOAD_S:g} s") from None
        except (RuntimeError, ValueError, OSError, RayError) as error:
            raise ConfigError(f"{self.address} refuses the job: {_first_line(error)}") from None

    def wait(self, job_id: str, *, timeout_s: float) -> Job:
        """The job once it has ended, or as it is when the time is over."""
        deadline = time.monotonic() + timeout_s
        while True:
            job = self.job(job_id)
            if job.ended or time.monotonic() > deadline:
                return job
            time.sleep(POLL_S)

    def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """Hands on the job's log, from its beginning, until it has ended; a broken connection is made anew.

        Raises:
            LostError: no answer for LOST_S; the job itself goes on.
        """
        log, lost_since = _Log(write), None
        while True:
            try:
                asyncio.run(self._tail(job_id, log))
                job = self.job(job_id)
                if job.ended:
                    if not log.written:
                        log.take(self.log(job_id))
                    return job
                lost_since = None
            except LostError:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > LOST_S:
                    raise
            time.sleep(POLL_S)

    async def _tail(self, job_id: str, log: _Log) -> None:
        """Reads the log's stream, which starts at its beginning, to its end."""
        import aiohttp

        log.position = 0
        timeout = aiohttp.ClientTimeout(total=None, connect=REQUEST_S)
        with suppress(aiohttp.ClientError, OSError):
            async with aiohttp.ClientSession(headers=self._headers, timeout=timeout, trust_env=True) as session:
                async with session.ws_connect(f"{self.address}/api/jobs/{job_id}/logs/tail", max_msg_size=0) as socket:
                    while True:
                        try:
                            message = await socket.receive(timeout=SILENCE_S)
                        except TimeoutError:
                            if (await asyncio.to_thread(self.job, job_id)).ended:
                                return
                            continue
                        if message.type is not aiohttp.WSMsgType.TEXT:
                            return
                        log.take(message.data)

    def _ask(self, method: str, path: str) -> httpx.Response:
        try:
            answer = httpx.request(method, self.address + path, headers=self._headers, timeout=REQUEST_S)
        except httpx.HTTPError as error:
            raise LostError(f"{self.address} answers no more: {_first_line(error)}") from None
        if answer.status_code == 404 and path.startswith("/api/jobs/"):
            raise ConfigError(f"{self.address} knows no job {path.split('/')[3]!r}; `rlhf-ray list` shows its jobs")
        if answer.status_code in (401, 403):
            raise ConfigError(f"{self.address} refuses the token (status {answer.status_code})")
        if answer.status_code != 200:
            raise LostError(f"{self.address} answers with status {answer.status_code}: {answer.text[:300]}")
        return answer


def link_note(file: Path) -> None:
    """Called by a job's command: lets `JobServer.note` read the file, through a link among Ray's logs.

    Does nothing where the command's output is not the log of a job.
    """
    with suppress(OSError):
        log = Path(os.readlink("/proc/self/fd/1"))
        job = _JOB_LOG.fullmatch(log.name)
        if job is not None:
            link = log.with_name(_note_name(job[1]))
            link.unlink(missing_ok=True)
            link.symlink_to(file.absolute())


def _note_name(job_id: str) -> str:
    return f"job-driver-{job_id}.note.json"


def connect(address: str | None) -> JobServer:
    """A cluster whose API answers, with the token of this machine where it asks for one.

    Args:
        address: http(s)://HOST:PORT of its dashboard; None: RAY_API_SERVER_ADDRESS or RAY_ADDRESS.

    Raises:
        ConfigError: within PROBE_S: unreachable, no Ray, no token or a wrong one.
    """
    url = dashboard_url(address)
    try:
        return _within(PROBE_S, lambda: _probe(url))
    except TimeoutError:
        raise ConfigError(
            f"{url} does not answer within {PROBE_S:g} s; wanted the dashboard of a Ray cluster. Is the cluster up, "
            "and does a firewall stand between? A cluster behind one is reached by `ssh -L 8265:localhost:8265 HEAD`"
        ) from None


def dashboard_url(address: str | None) -> str:
    """The address of a dashboard as a URL.

    Raises:
        ConfigError: there is none, or it is one that has no Jobs API behind it.
    """
    variable = next((name for name in ADDRESSES if os.environ.get(name)), None)
    where, given = ("--address", address) if address or variable is None else (variable, os.environ[variable])
    if not given:
        raise ConfigError(f"no cluster is named; give --address http://HOST:8265 (or {ADDRESSES[0]})")
    match = re.fullmatch(r"(?:(https?)://)?([^\s/:@]+|\[[0-9a-fA-F:]+\])(?::(\d{1,5}))?/*", given)
    if match is None or given == "auto" or given.startswith("ray://"):
        raise ConfigError(
            f"{where}: got {_without_login(given)!r}, wanted the address of the cluster's dashboard, http://HOST:8265"
        )
    scheme, host, port = match.groups()
    return f"{scheme or 'http'}://{host}" + (f":{port}" if port else "" if scheme else ":8265")


def _without_login(address: str) -> str:
    return re.sub(r"//[^/@]*@", "//...@", address)


def _probe(url: str) -> JobServer:
    token, origin = None, ""
    with httpx.Client(timeout=PROBE_S) as client:
        answer = _version(client, url, None)
        if answer.status_code == 401:
            token, origin = _token()
            if token is None:
                raise ConfigError(f"{url} wants a token, and there is none here; {_HOW_TO_AUTHENTICATE}")
            answer = _version(client, url, token)
    if answer.status_code in (401, 403):
        what = f"the token of {origin}" if token is not None else "access without a token"
        raise ConfigError(f"{url} refuses {what} (status {answer.status_code}); {_HOW_TO_AUTHENTICATE}")
    try:
        ray_version = answer.json()["ray_version"] if answer.status_code == 200 else None
    except (ValueError, KeyError, TypeError):
        ray_version = None
    if not isinstance(ray_version, str):
        raise ConfigError(
            f"{url} answers (status {answer.status_code}), but not as a Ray dashboard does; wanted http://HOST:8265"
        )
    return JobServer(url, token=token, ray_version=ray_version)


def _version(client: httpx.Client, url: str, token: str | None) -> httpx.Response:
    try:
        return client.get(f"{url}/api/version", headers=_headers(token))
    except httpx.TimeoutException:
        raise TimeoutError from None
    except httpx.HTTPError as error:
        raise ConfigError(
            f"{url} cannot be reached: {_first_line(error)}; is the cluster up, its dashboard started, the port right?"
        ) from None


def _token() -> tuple[str | None, str]:
    """The token that Ray would take on this machine, and where it stands."""
    if os.environ.get(_TOKEN):
        return os.environ[_TOKEN].strip(), _TOKEN
    named = os.environ.get(_TOKEN_FILE)
    file = Path(named or _HOME_TOKEN).expanduser()
    try:
        return file.read_text(encoding="utf-8").strip() or None, str(file)
    except (OSError, UnicodeDecodeError) as error:
        if named:
            raise ConfigError(f"{_TOKEN_FILE}: {file} cannot be read: {_first_line(error)}") from None
        return None, ""


def _headers(token: str | None) -> dict[str, str]:
    if token is None:
        return {}
    if not token.isascii() or not token.isprintable():
        raise ConfigError("the token has characters that no header can carry; is it the right file?")
    return {"Authorization": f"Bearer {token}"}


def _job(answer: Mapping[str, Any]) -> Job:
    code = answer.get("driver_exit_code")
    if code is not None and code < 0:
        code = 128 - code
    if code is None:
        # Ray notes no exit code of a job that it stopped, and none where the command could not be started.
        code = {"STOPPED": SIGTERM_EXIT_CODE, "FAILED": 1, "SUCCEEDED": 0}.get(answer["status"])
    variables = (answer.get("runtime_env") or {}).get("env_vars") or {}
    wait = variables.get(STOP_WAIT, "")
    return Job(
        id=str(answer["submission_id"]),
        state=str(answer["status"]),
        exit_code=code,
        message=str(answer.get("message") or ""),
        started_s=_seconds(answer.get("start_time")),
        ended_s=_seconds(answer.get("end_time")),
        metadata=dict(answer.get("metadata") or {}),
        stop_wait_s=float(wait) if wait.isdigit() else 3.0,
        node_id=answer.get("driver_node_id"),
    )


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _within(timeout_s: float, work: Callable[[], T]) -> T:
    """The result of the work, or TimeoutError: not every wait in a library (a name's look-up) takes a deadline."""
    return in_background(work).result(timeout_s)
