"""The one actor class: a process that holds a worker of any class, and can hold another one later."""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import cloudpickle

from rlhf_ray.distributed.labels import label_output
from rlhf_ray.distributed.place import Place
from rlhf_ray.distributed.rendezvous import Meeting, environment
from rlhf_ray.distributed.seats import Found
from rlhf_ray.distributed.supervision import STACK_SIGNAL, Failure, Reply, capture
from rlhf_ray.distributed.work import Work, work_of


class Host:
    """Holds one worker; single-threaded, so calls run in the order in which they were sent."""

    def __init__(self) -> None:
        faulthandler.register(STACK_SIGNAL, all_threads=False)
        self._worker: Any = None
        self._failure: Failure | None = None
        self._meeting: Meeting | None = None
        self._variables: dict[str, str] = {}

    def process(self) -> tuple[str, int, str | None]:
        """This machine's address, the process id, and the file that standard error goes to."""
        try:
            log: str | None = os.readlink("/proc/self/fd/2")
        except OSError:
            log = None
        return ray.util.get_node_ip_address(), os.getpid(), log

    def where(self) -> Reply:
        """Where this process is and which GPUs it has, as a Found."""
        return _timed(_found)

    def meet(self) -> tuple[str, int]:
        """An address on this machine that the group's workers can meet at."""
        self._meeting = Meeting(ray.util.get_node_ip_address())
        return self._meeting.address

    def build(
        self,
        place: Place,
        recipe: bytes,
        address: tuple[str, int] | None,
        local: tuple[int, int],
        import_path: list[str],
    ) -> Reply:
        """Makes the worker.

        Args:
            place: its role and rank.
            recipe: pickled (class, args, kwargs).
            address: where the group meets; None for a group that does not.
            local: number of the worker among those of its group on this node, and how many they are.
            import_path: the driver's, so that modules beside a pipeline file are found here too.
        """
        # Before any library is imported that keeps the streams as they are then.
        label_output(f"[{place.role} {place.rank}]")
        sys.path.extend(entry for entry in import_path if entry not in sys.path)
        if address is not None:
            node = ray.util.get_node_ip_address()
            self._variables = environment(
                address,
                rank=place.rank,
                size=place.size,
                local=(0, 1) if ray.get_gpu_ids() else local,
                node=node,
            )
            os.environ.update(self._variables)

        def make() -> None:
            worker_class, args, kwargs = cloudpickle.loads(recipe)
            self._worker = worker_class(place, *args, **kwargs)

        reply = _timed(make)
        self._failure = reply.failure
        if self._meeting is not None:
            self._meeting.release()
        return reply

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> Reply:
        """Runs a method of the worker; after a failed `build`, its failure again."""
        if self._failure is not None:
            now = time.time()
            return Reply(None, self._failure, now, now, 0.0, Work())
        return _timed(lambda: getattr(self._worker, name)(*args, **kwargs), args)

    def drop(self) -> None:
        """Closes the worker (its own close(), if it has one) and forgets it."""
        worker, self._worker, self._failure, self._meeting = self._worker, None, None, None
        close = getattr(worker, "close", None)
        if callable(close):
            close()
        del worker, close
        gc.collect()
        for name in self._variables:
            os.environ.pop(name, None)
        self._variables = {}


def _found() -> Found:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("HIP_VISIBLE_DEVICES"))
    return Found(
        node=ray.get_runtime_context().get_node_id(),
        address=ray.util.get_node_ip_address(),
        gpus=tuple(map(str, ray.get_gpu_ids())),
        visible=None if visible is None else tuple(part.strip() for part in visible.split(",") if part.strip()),
    )


def _timed(work: Callable[[], Any], arguments: Sequence[Any] = ()) -> Reply:
    start, cpu = time.time(), time.process_time()
    try:
        value, failure = work(), None
    except Exception as error:
        value, failure = None, capture(error)
    end, cpu_s = time.time(), time.process_time() - cpu
    return Reply(value, failure, start, end, cpu_s, work_of(arguments, value))
