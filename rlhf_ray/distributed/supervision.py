"""Waiting for workers: every wait has a deadline, and every failure says who failed, in which call, and why."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from rlhf_ray.errors import RlhfRayError, UserError, WorkerError

_LAST_LINES = 20
_LAST_BYTES = 8192


@dataclass(frozen=True)
class Failure:
    """An exception of a worker, in a form that always travels.

    Args:
        error_class: class of the error where it is one of this package, else WorkerError.
        message: its text; with the name of its class where that is not of this package.
        traceback: the worker's own traceback.
    """

    error_class: type[RlhfRayError]
    message: str
    traceback: str


@dataclass(frozen=True)
class Reply:
    """What a worker's host answers; start and end are Unix seconds of the worker's clock."""

    value: Any
    failure: Failure | None
    start: float
    end: float


@dataclass(frozen=True)
class Call:
    """A call under way on one worker.

    Args:
        reply: reference to its Reply.
        role: the worker's role.
        rank: the worker's rank.
        method: name of the method.
        timeout_s: how long a wait for it may take.
        setting: the setting that timeout_s comes from.
        process: what the worker's host says of its process (`Host.process`); None where it is not asked.
    """

    reply: ray.ObjectRef[Reply]
    role: str
    rank: int
    method: str
    timeout_s: float
    setting: str
    process: ray.ObjectRef[tuple[str, int, str | None]] | None = None

    @property
    def where(self) -> str:
        return f"{self.role} rank {self.rank}, {self.method}"


def capture(error: Exception) -> Failure:
    """The exception in a form that travels, whatever its constructor takes."""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, RlhfRayError):
        return Failure(type(error), str(error), trace)
    return Failure(WorkerError, f"{type(error).__name__}: {error}", trace)


def wait(calls: Sequence[Call]) -> list[Reply]:
    """The replies in the order of the calls; the first failure is raised at once and the other calls are left alone.

    Raises:
        WorkerError: a worker died, raised, or missed its deadline.
        RlhfRayError: the error of this package that a worker raised, its place in front.
    """
    start = time.monotonic()
    replies: dict[int, Reply] = {}
    left = {call.reply: index for index, call in enumerate(calls)}
    while left:
        deadline = start + min(calls[index].timeout_s for index in left.values())
        done, _ = ray.wait(list(left), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            raise _late([calls[index] for index in left.values()], start)
        for reply in done:
            index = left.pop(reply)
            replies[index] = _answer(calls[index])
    return [replies[index] for index in range(len(calls))]


def _answer(call: Call) -> Reply:
    try:
        reply = ray.get(call.reply, timeout=call.timeout_s)
    except GetTimeoutError:
        raise _late([call], time.monotonic() - call.timeout_s) from None
    except RayTaskError as error:
        raise WorkerError(f"{call.where}: {error.cause}\n{error.traceback_str}") from None
    except OutOfMemoryError as error:
        raise WorkerError(f"{call.where}: the machine ran out of memory, and Ray ended the worker\n{error}") from None
    except RayActorError as error:
        raise WorkerError(f"{call.where}: the worker died\n{error}{_last_lines(call)}") from None
    except RayError as error:
        raise WorkerError(f"{call.where}: {type(error).__name__}: {error}") from None
    assert isinstance(reply, Reply), reply
    if reply.failure is not None:
        raise _raised(call.where, reply.failure)
    return reply


def _raised(where: str, failure: Failure) -> RlhfRayError:
    """The worker's error, made without its constructor, whose arguments are not known here."""
    message = f"{where}: {failure.message}"
    if failure.error_class is WorkerError:
        return WorkerError(f"{message}\n{failure.traceback}")
    error = failure.error_class.__new__(failure.error_class)
    error.args = (message,)
    if not isinstance(error, UserError):
        error.add_note(failure.traceback)
    return error


def _late(calls: Sequence[Call], start: float) -> WorkerError:
    late = min(calls, key=lambda call: call.timeout_s)
    others = sorted(call.where for call in calls if call is not late)
    return WorkerError(
        f"{late.where}: no answer within {late.timeout_s:g} s ({late.setting}; waited {time.monotonic() - start:.1f} s)"
        + (f"; also without an answer: {', '.join(others)}" if others else "")
    )


def _last_lines(call: Call) -> str:
    """The end of the dead worker's standard error, where it lies on this machine."""
    if call.process is None:
        return ""
    try:
        address, _, path = ray.get(call.process, timeout=0)
        if path is None or address != ray.util.get_node_ip_address():
            return ""
        lines = Path(path).read_bytes()[-_LAST_BYTES:].decode(errors="replace").splitlines()[-_LAST_LINES:]
    except (RayError, OSError):
        return ""
    return "\nIts last lines:\n" + "\n".join(lines) if lines else ""
