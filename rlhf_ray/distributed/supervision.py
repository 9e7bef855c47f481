"""Waiting for workers: every wait has a deadline, and every failure says who failed, in which call, and why."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from rlhf_ray.distributed.work import Work
from rlhf_ray.errors import RlhfRayError, UserError, WorkerError

_LAST_LINES = 20
_NOTICE_S = 1.0
_LAST_BYTES = 8192
_STACK_S = 0.3
STACK_SIGNAL = signal.SIGUSR2


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
    """What a worker's host answers.

    Args:
        value: the result; None where the call failed.
        failure: what it failed of.
        start: Unix seconds of the worker's clock.
        end: likewise.
        cpu_s: CPU seconds of the worker's process meanwhile.
        work: how much there was to do.
    """

    value: Any
    failure: Failure | None
    start: float
    end: float
    cpu_s: float
    work: Work


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


class _Clock:
    """Seconds that this process has spent in nothing but waiting for workers."""

    waited_s = 0.0


def waited_seconds() -> float:
    """Seconds so far in which this process did nothing but wait for workers, like `time.process_time` of CPU time."""
    return _Clock.waited_s


def wait(calls: Sequence[Call]) -> list[Reply]:
    """The replies in the order of the calls; the first failure is raised at once and the other calls are left alone.

    Raises:
        WorkerError: a worker died, raised, or missed its deadline.
        RlhfRayError: the error of this package that a worker raised, its place in front.
    """
    replies = dict(_answers(calls, anew=False))
    return [replies[index] for index in range(len(calls))]


def as_they_come(calls: Sequence[Call]) -> Iterator[tuple[int, Reply]]:
    """(number of the call, its reply) in the order of arrival; deadlines count from one arrival to the next.

    Raises:
        WorkerError, RlhfRayError: as `wait`.
    """
    return _answers(calls, anew=True)


def _answers(calls: Sequence[Call], *, anew: bool) -> Iterator[tuple[int, Reply]]:
    start = time.monotonic()
    left = {call.reply: index for index, call in enumerate(calls)}
    while left:
        deadline = start + min(calls[index].timeout_s for index in left.values())
        done = _first_answered(list(left), deadline)
        if not done:
            raise _late([calls[index] for index in left.values()], start)
        fetched = _fetched(done)
        for reference in done:
            index = left.pop(reference)
            try:
                reply = _answer(calls[index], fetched.get(reference))
            except WorkerError:
                _raise_a_death([calls[other] for other in left.values()])
                raise
            yield index, reply
            if anew:
                start = time.monotonic()


def _first_answered(replies: list[ray.ObjectRef[Reply]], deadline: float) -> list[ray.ObjectRef[Reply]]:
    """Those that are there as soon as one is, in order; none at the deadline."""
    before = time.monotonic()
    done, _ = ray.wait(replies, num_returns=1, timeout=max(0.0, deadline - before))
    _Clock.waited_s += time.monotonic() - before
    if not done or len(replies) == 1:
        return list(done)
    # One wait for all that have come meanwhile, since each looks at every reference.
    done, _ = ray.wait(replies, num_returns=len(replies), timeout=0)
    return list(done)


def _fetched(replies: list[ray.ObjectRef[Reply]]) -> dict[ray.ObjectRef[Reply], Reply]:
    """Replies that are there, got at once; none where one of them is an error, which `_answer` finds out."""
    try:
        return dict(zip(replies, ray.get(replies, timeout=_NOTICE_S), strict=True))
    except RayError:
        return {}


def _raise_a_death(calls: Sequence[Call]) -> None:
    """WorkerError for a worker that died: its neighbours, who lost the connection, may complain before Ray notices."""
    if not calls:
        return
    done, _ = ray.wait([call.reply for call in calls], num_returns=len(calls), timeout=_NOTICE_S)
    for call in calls:
        if call.reply in done:
            try:
                ray.get(call.reply, timeout=0)
            except RayActorError as error:
                raise _death(call, error) from None
            except RayError:
                continue


def _death(call: Call, error: RayActorError) -> WorkerError:
    return WorkerError(f"{call.where}: the worker died: {_cause(error)}{_last_lines(call)}")


def _answer(call: Call, fetched: Reply | None) -> Reply:
    try:
        reply = fetched or ray.get(call.reply, timeout=call.timeout_s)
    except GetTimeoutError:
        raise _late([call], time.monotonic() - call.timeout_s) from None
    except RayTaskError as error:
        trace = str(error).strip()
        raise WorkerError(f"{call.where}: {trace.splitlines()[-1]}\n{trace}") from None
    except OutOfMemoryError as error:
        raise WorkerError(f"{call.where}: the machine ran out of memory, and Ray ended the worker\n{error}") from None
    except RayActorError as error:
        raise _death(call, error) from None
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
        + _stack(late)
    )


def _stack(call: Call) -> str:
    """Where the late worker is, as its process writes it on request; for one on this machine."""
    process = _local_process(call)
    if process is None:
        return ""
    pid, log = process
    try:
        before = log.stat().st_size
        os.kill(pid, STACK_SIGNAL)
        time.sleep(_STACK_S)
        text = log.read_bytes()[before:].decode(errors="replace").strip()
    except OSError:
        return ""
    return f"\nIt is here. {text}" if text else ""


def _cause(error: RayActorError) -> str:
    """Ray's sentence on why the process ended, without the ids before it and the guesses after it."""
    text = str(error)
    _, found, reason = text.partition("The actor is dead because ")
    return (reason if found else text).partition(" Some common causes include")[0].strip()


def _last_lines(call: Call) -> str:
    """The end of the dead worker's standard error, where it lies on this machine."""
    process = _local_process(call)
    if process is None:
        return ""
    try:
        text = process[1].read_bytes()[-_LAST_BYTES:].decode(errors="replace")
    except OSError:
        return ""
    # Ray begins each log with lines of its own, such as `:job_id:01000000`.
    lines = [line for line in text.splitlines() if not line.startswith(":")][-_LAST_LINES:]
    return "\nIts last lines:\n" + "\n".join(lines) if lines else ""


def _local_process(call: Call) -> tuple[int, Path] | None:
    """The worker's process id and the file of its standard error; None where it runs elsewhere, or never started."""
    if call.process is None:
        return None
    try:
        address, pid, log = ray.get(call.process, timeout=0)
    except RayError:
        return None
    if log is None or address != ray.util.get_node_ip_address():
        return None
    return pid, Path(log)
