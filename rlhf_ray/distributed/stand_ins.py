"""Stand-ins for workers, many in one process, to simulate the driver of a large run on a small machine.

A stand-in answers each call after a while with a reply that was made beforehand. The driver's group is a real one, and
sends and receives what it does with real workers. The stand-ins' processes know neither torch nor the types of this
package: arguments and replies are bytes to them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray import cloudpickle

if TYPE_CHECKING:
    from rlhf_ray.distributed.groups import RayGroup
    from rlhf_ray.distributed.supervision import Reply
    from rlhf_ray.distributed.tracing import Recorder

_MANY_CALLS = 100_000


@dataclass(frozen=True)
class Sealed:
    """A value as bytes: who holds it needs none of its classes.

    Args:
        head: the pickled value without its arrays.
        buffers: the arrays' memory.
        numbered: which buffer holds int64 numbers that each answer multiplies; none where it is -1.
    """

    head: bytes
    buffers: Sequence[Any]
    numbered: int = -1

    @classmethod
    def of(cls, value: Any, numbered: NDArray[np.int64] | None = None) -> Sealed:
        """The value, in which `numbered` is an array."""
        buffers: list[pickle.PickleBuffer] = []
        head = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        place = -1
        if numbered is not None:
            shared = [np.shares_memory(np.frombuffer(buffer.raw(), np.uint8), numbered) for buffer in buffers]
            place = shared.index(True)
        return cls(head, buffers, place)

    def times(self, number: int) -> Sealed:
        """The value with its numbers multiplied."""
        if self.numbered < 0:
            return self
        buffers = list(self.buffers)
        buffers[self.numbered] = np.frombuffer(buffers[self.numbered], np.int64) * number
        return dataclasses.replace(self, buffers=buffers)

    def copy(self) -> Sealed:
        """The same in memory of this process's own."""
        return dataclasses.replace(self, buffers=[bytes(buffer) for buffer in self.buffers])

    def open(self) -> Any:
        """The value; its arrays are the buffers."""
        return cloudpickle.loads(self.head, buffers=self.buffers)

    def __reduce__(self) -> tuple[Any, ...]:
        return Sealed, (self.head, [pickle.PickleBuffer(buffer) for buffer in self.buffers], self.numbered)


@dataclass(frozen=True)
class Answer:
    """How a call is answered.

    Args:
        reply: the key of the reply's value.
        seconds: that the work takes.
        number: what the reply's numbers are multiplied by.
    """

    reply: Hashable
    seconds: float = 0.0
    number: int = 1


@dataclass(frozen=True)
class _Done:
    """A reply on its way, which the driver receives as a `Reply`; its times are those of the stand-in's clock."""

    reply: Sealed
    start: float
    end: float

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.reply, self.start, self.end)


def _opened(sealed: Sealed, start: float, end: float) -> Reply:
    reply: Reply = sealed.open()
    return dataclasses.replace(reply, start=start, end=end)


class Process:
    """Hosts stand-ins of one role; each does one thing at a time, in the order of its calls."""

    def __init__(self) -> None:
        self._replies: dict[Hashable, Sealed] = {}
        self._turns: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def learn(self, replies: Mapping[Hashable, Sealed]) -> None:
        """Takes further replies."""
        self._replies |= {key: reply.copy() for key, reply in replies.items()}

    async def call(self, rank: int, answer: Answer, arguments: Sealed, stored: Sequence[ray.ObjectRef[Any]]) -> _Done:
        """Answers a call to one of the stand-ins; what its arguments hold in the object store is not fetched."""
        async with self._turns[rank]:
            start = time.time()
            await asyncio.sleep(answer.seconds)
            return _Done(self._replies[answer.reply].times(answer.number), start, time.time())


@dataclass(frozen=True)
class Prepared:
    """A reply's value, and the array in it that `Answer.number` multiplies; None where there is none."""

    value: Any
    numbered: NDArray[np.int64] | None = None


Choose = Callable[[int, str, Sequence[Any], Mapping[str, Any]], Answer]
"""(rank, method, arguments, keyword arguments) -> how the call is answered."""


class _StandIn:
    """What a group takes for the host of a worker."""

    def __init__(self, process: Any, rank: int, choose: Choose) -> None:
        self._process = process
        self._rank = rank
        self._choose = choose

    @property
    def call(self) -> _StandIn:
        return self

    def remote(self, method: str, /, *args: Any, **kwargs: Any) -> ray.ObjectRef[Reply]:
        answer = self._choose(self._rank, method, args, kwargs)
        given = [*args, *kwargs.values()]
        stored = [value for value in given if isinstance(value, ray.ObjectRef)]
        # Ray would never free an object whose reference lies in bytes that it has not made itself.
        sent = Sealed.of([value for value in given if not isinstance(value, ray.ObjectRef)])
        reply: ray.ObjectRef[Reply] = self._process.call.remote(self._rank, answer, sent, stored)
        return reply


def start_stand_ins(
    role: str,
    size: int,
    choose: Choose,
    replies: Mapping[Hashable, Prepared],
    *,
    processes: int,
    collective: bool,
    timeout_s: float,
    recorder: Recorder,
) -> RayGroup[Any]:
    """A group of stand-ins; they are spread over some processes, which end when the group is closed.

    Args:
        choose: how each call is answered.
        replies: what there is to answer, by key.
        processes: how many of them.
        collective: as in `RayGroup`.
        timeout_s: deadline of each call.
        recorder: takes the spans of all calls.
    """
    from rlhf_ray.distributed.groups import RayGroup
    from rlhf_ray.distributed.supervision import Call, Reply
    from rlhf_ray.distributed.work import work_of

    def sealed(prepared: Prepared) -> Sealed:
        work = work_of((), prepared.value)
        return Sealed.of(Reply(prepared.value, None, 0.0, 0.0, 0.0, work), prepared.numbered)

    ready = "ready"
    stored = {key: sealed(prepared) for key, prepared in {ready: Prepared(None), **replies}.items()}
    options = {"num_cpus": 0, "max_concurrency": _MANY_CALLS}
    actors = [ray.remote(Process).options(**options).remote() for _ in range(processes)]
    shared = ray.put(stored)
    ray.get([actor.learn.remote(shared) for actor in actors], timeout=timeout_s)
    hosts = [_StandIn(actors[rank % processes], rank, choose) for rank in range(size)]
    nothing = Sealed.of(None)
    built = [
        Call(
            reply=actors[rank % processes].call.remote(rank, Answer(ready), nothing, []),
            role=role,
            rank=rank,
            method="start",
            timeout_s=timeout_s,
            setting="timeout_s",
        )
        for rank in range(size)
    ]

    def release(idle: bool) -> None:
        for actor in actors:
            ray.kill(actor)

    return RayGroup(
        role, hosts, collective=collective, timeout_s=timeout_s, recorder=recorder, built=built, release=release
    )


def object_store_bytes() -> float:
    """Bytes in the object stores of the cluster, as Ray last counted them."""
    name = "object_store_memory"
    return float(ray.cluster_resources()[name]) - float(ray.available_resources().get(name, 0.0))
