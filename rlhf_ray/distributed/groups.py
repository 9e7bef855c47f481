"""Groups of workers and their verbs: split, all, one, first.

A method is named by a reference to the function (`Learner.update`), so the type checker sees its arguments:

    rollouts = generator.split(Generator.generate, prompts, sampling, iteration=3).result()
    scores, old = gather(reward.split(RewardScorer.score, rollouts), policy.split(Learner.logprobs, rollouts.sequences))

The method that runs is the worker's own of that name, so a reference to a protocol's method works too.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeAlias, TypeVar, cast, overload

import ray
import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_ray.data.batches import Batch
from rlhf_ray.distributed.place import Place
from rlhf_ray.distributed.supervision import Call, Reply, as_they_come, wait
from rlhf_ray.distributed.tracing import Recorder, Span
from rlhf_ray.distributed.work import work_of

__all__ = ["LocalGroup", "Pending", "Place", "RayGroup", "WorkerGroup", "arrivals", "cut", "gather", "merge", "shares"]

T = TypeVar("T")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")
T5 = TypeVar("T5")
R = TypeVar("R")
P = ParamSpec("P")
W = TypeVar("W")
W_co = TypeVar("W_co", covariant=True)
T_co = TypeVar("T_co", covariant=True)
Rows = TypeVar("Rows", bound=Batch | Tensor | list[Any])
Hosts: TypeAlias = Sequence[Any]


class Pending(ABC, Generic[T_co]):
    """A result that may still be on its way."""

    @abstractmethod
    def result(self) -> T_co:
        """Waits for the result, with the group's deadline; may be called again.

        Raises:
            WorkerError: a worker died, raised or missed the deadline.
            RlhfRayError: the error of this package that a worker raised.
        """

    def calls(self) -> Sequence[Call]:
        """The calls to workers that this result still waits for."""
        return ()

    def collect(self, replies: Sequence[Reply]) -> None:
        """Takes the answers to `calls()`, in their order."""

    def abandon(self) -> None:
        """Notes that the calls failed and nobody will wait for them."""


class Ready(Pending[T]):
    """A result that is there."""

    def __init__(self, value: T) -> None:
        self._value = value

    def result(self) -> T:
        return self._value


@overload
def gather(first: Pending[T1], /) -> tuple[T1]: ...
@overload
def gather(first: Pending[T1], second: Pending[T2], /) -> tuple[T1, T2]: ...
@overload
def gather(first: Pending[T1], second: Pending[T2], third: Pending[T3], /) -> tuple[T1, T2, T3]: ...
@overload
def gather(
    first: Pending[T1], second: Pending[T2], third: Pending[T3], fourth: Pending[T4], /
) -> tuple[T1, T2, T3, T4]: ...
@overload
def gather(
    first: Pending[T1], second: Pending[T2], third: Pending[T3], fourth: Pending[T4], fifth: Pending[T5], /
) -> tuple[T1, T2, T3, T4, T5]: ...
@overload
def gather(*pending: Pending[T]) -> tuple[T, ...]: ...
def gather(*pending: Pending[Any]) -> tuple[Any, ...]:
    """All results, in the order of the arguments; the first failure anywhere is raised at once."""
    calls = [list(item.calls()) for item in pending]
    try:
        replies = iter(wait([call for item in calls for call in item]))
    except BaseException:
        for item in pending:
            item.abandon()
        raise
    for item, own in zip(pending, calls, strict=True):
        item.collect([next(replies) for _ in own])
    return tuple(item.result() for item in pending)


def arrivals(*pending: Pending[T]) -> Iterator[tuple[int, T]]:
    """(number of the argument, its result) in the order of arrival; the first failure anywhere is raised at once.

    Deadlines count from one arrival to the next.
    """
    calls = [list(item.calls()) for item in pending]
    try:
        for number, item in enumerate(pending):
            if not calls[number]:
                yield number, item.result()
        owners = [(number, place) for number, own in enumerate(calls) for place in range(len(own))]
        replies: dict[tuple[int, int], Reply] = {}
        for index, reply in as_they_come([call for own in calls for call in own]):
            replies[owners[index]] = reply
            number = owners[index][0]
            wanted = [(number, place) for place in range(len(calls[number]))]
            if all(owner in replies for owner in wanted):
                pending[number].collect([replies.pop(owner) for owner in wanted])
                yield number, pending[number].result()
    except BaseException:
        for item in pending:
            item.abandon()
        raise


class WorkerGroup(Protocol[W_co]):
    """The workers of one role, called together."""

    @property
    def role(self) -> str:
        """Name of the role in the configuration."""

    @property
    def size(self) -> int:
        """Number of workers."""

    def split(
        self, method: Callable[Concatenate[W_co, Rows, P], R], batch: Rows, /, *args: P.args, **kwargs: P.kwargs
    ) -> Pending[R]:
        """Rows cut contiguously over the workers, results merged in row order; the other arguments go to each.

        A worker without a row gets no call, except in a group that works collectively, where it gets an empty batch.
        """

    def split_groups(
        self,
        group_size: int,
        method: Callable[Concatenate[W_co, Rows, P], R],
        batch: Rows,
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Pending[R]:
        """Like split, but each `group_size` adjacent rows (a pair, the siblings of a prompt) stay together."""

    def all(self, method: Callable[Concatenate[W_co, P], R], /, *args: P.args, **kwargs: P.kwargs) -> Pending[list[R]]:
        """The same arguments to every worker; results in rank order. A batch is stored once and read by all."""

    def one(
        self, rank: int, method: Callable[Concatenate[W_co, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Pending[R]:
        """A call to one worker alone; a worker answers its calls in the order in which they were sent."""

    def first(self, method: Callable[Concatenate[W_co, P], R], /, *args: P.args, **kwargs: P.kwargs) -> Pending[R]:
        """A call to rank 0 alone."""

    def close(self) -> None:
        """Ends the workers; may be called again."""


def shares(rows: int, parts: int, *, group_size: int = 1) -> list[range]:
    """`parts` contiguous ranges that cover range(rows) in order; their sizes differ by at most one group.

    With fewer groups than parts the last ranges are empty. `group_size` divides `rows`.
    """
    assert rows % group_size == 0, f"{rows} rows are not whole groups of {group_size}"
    groups = rows // group_size
    least, extra = divmod(groups, parts)
    starts = [part * least + min(part, extra) for part in range(parts + 1)]
    return [range(start * group_size, end * group_size) for start, end in itertools.pairwise(starts)]


def cut(batch: Rows, rows: range) -> Rows:
    """The given rows of a batch, a tensor or a list."""
    if isinstance(batch, Batch):
        return batch.select(rows)
    return cast(Rows, batch[rows.start : rows.stop])


def merge(results: Sequence[Any]) -> Any:
    """The results of row shares as the result of all rows.

    Batches are joined, tensors are joined along the rows and padded on the right to the longest T, lists are chained,
    tuples are merged element by element, None stays None.
    """
    first = results[0]
    if isinstance(first, Batch):
        return type(first).concat(results)
    if isinstance(first, Tensor):
        if first.dim() > 1:
            longest = max(result.shape[1] for result in results)
            # pad counts from the last dimension; only the second one (T) grows.
            before = [0, 0] * (first.dim() - 2)
            results = [pad(result, (*before, 0, longest - result.shape[1])) for result in results]
        return torch.cat(list(results))
    if isinstance(first, tuple):
        return tuple(merge(column) for column in zip(*results, strict=True))
    if isinstance(first, list):
        return [item for result in results for item in result]
    assert all(result is None for result in results), f"results of type {type(first).__name__} cannot be merged"
    return None


class LocalGroup(Generic[W]):
    """One worker in this process: a loop runs on it without Ray. Its errors come out as they are, at the call."""

    def __init__(self, worker: W, *, role: str = "local", recorder: Recorder | None = None) -> None:
        self.worker = worker
        self.role = role
        self.size = 1
        self._recorder = recorder or Recorder()

    def split(
        self, method: Callable[Concatenate[W, Rows, P], R], batch: Rows, /, *args: P.args, **kwargs: P.kwargs
    ) -> Pending[R]:
        return Ready(self._call(method, batch, *args, **kwargs))

    def split_groups(
        self,
        group_size: int,
        method: Callable[Concatenate[W, Rows, P], R],
        batch: Rows,
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Pending[R]:
        shares(len(batch), 1, group_size=group_size)
        return Ready(self._call(method, batch, *args, **kwargs))

    def all(self, method: Callable[Concatenate[W, P], R], /, *args: P.args, **kwargs: P.kwargs) -> Pending[list[R]]:
        return Ready([self._call(method, *args, **kwargs)])

    def one(
        self, rank: int, method: Callable[Concatenate[W, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Pending[R]:
        assert rank == 0, f"{self.role}: no worker {rank}"
        return Ready(self._call(method, *args, **kwargs))

    def first(self, method: Callable[Concatenate[W, P], R], /, *args: P.args, **kwargs: P.kwargs) -> Pending[R]:
        return Ready(self._call(method, *args, **kwargs))

    def close(self) -> None:
        """Calls the worker's own close() where it has one."""
        close = getattr(self.worker, "close", None)
        if callable(close):
            close()

    def _call(self, method: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        name = method.__name__
        number = self._recorder.begin(self.role, name)
        iteration = _iteration(self._recorder, kwargs)
        start, cpu = time.time(), time.process_time()
        try:
            value: R = getattr(self.worker, name)(*args, **kwargs)
        except BaseException:
            self._recorder.finish(number)
            raise
        end, cpu_s = time.time(), time.process_time() - cpu
        work = work_of(args, value)
        span = Span(self.role, 0, name, start, end, iteration, work.tokens, work.nbytes, cpu_s)
        self._recorder.finish(number, [span])
        return value


class RayPending(Pending[T]):
    """The answers of some workers of a RayGroup, on their way.

    Args:
        calls: the calls, in rank order.
        combine: the workers' results -> the result.
        finish: takes the replies to the calls; None when nobody waits for them any longer.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        combine: Callable[[list[Any]], T],
        finish: Callable[[Sequence[Reply] | None], None],
    ) -> None:
        self._calls = list(calls)
        self._combine = combine
        self._finish = finish
        self._value: list[T] = []

    def result(self) -> T:
        if not self._value:
            try:
                replies = wait(self._calls)
            except BaseException:
                self.abandon()
                raise
            self.collect(replies)
        return self._value[0]

    def calls(self) -> Sequence[Call]:
        return [] if self._value else self._calls

    def collect(self, replies: Sequence[Reply]) -> None:
        if self._value:
            return
        self._finish(replies)
        self._value.append(self._combine([reply.value for reply in replies]))
        # Nothing of the answers stays in the object store for as long as this result lives.
        self._calls, self._finish = [], lambda _: None

    def abandon(self) -> None:
        self._finish(None)


class RayGroup(Generic[W]):
    """Workers in Ray actors; made by `Placement.start`.

    Args:
        hosts: the actors in rank order.
        collective: the workers call each other (torch.distributed), so a split gives each of them a call.
        timeout_s: deadline of a call, counted from the moment somebody waits for it.
        built: what the hosts answered to `build`; the result of `ready`.
        release: ends the actors, or keeps them for the next group; told whether all calls were answered.
    """

    def __init__(
        self,
        role: str,
        hosts: Hosts,
        *,
        collective: bool,
        timeout_s: float,
        recorder: Recorder,
        built: Sequence[Call],
        release: Callable[[bool], None],
    ) -> None:
        self.role = role
        self._take(hosts, built)
        self._collective = collective
        self._timeout_s = timeout_s
        self._recorder = recorder
        self._release: Callable[[bool], None] | None = release
        self._under_way: set[int] = set()
        self.ready: Pending[None] = self._pending(built, lambda _: None, iteration=recorder.iteration)

    def split(
        self, method: Callable[Concatenate[W, Rows, P], R], batch: Rows, /, *args: P.args, **kwargs: P.kwargs
    ) -> Pending[R]:
        return self.split_groups(1, method, batch, *args, **kwargs)

    def split_groups(
        self,
        group_size: int,
        method: Callable[Concatenate[W, Rows, P], R],
        batch: Rows,
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Pending[R]:
        parts = shares(len(batch), self.size, group_size=group_size)
        full = max(1, sum(len(rows) > 0 for rows in parts))
        stored, stored_kwargs = self._store(args, kwargs)
        called = parts if self._collective else parts[:full]
        calls = [
            self._call(rank, method, cut(batch, rows), *stored, **stored_kwargs) for rank, rows in enumerate(called)
        ]

        def combine(results: list[Any]) -> R:
            return cast(R, merge(results[:full]))

        return self._pending(calls, combine, iteration=_iteration(self._recorder, kwargs))

    def all(self, method: Callable[Concatenate[W, P], R], /, *args: P.args, **kwargs: P.kwargs) -> Pending[list[R]]:
        stored, stored_kwargs = self._store(args, kwargs)
        calls = [self._call(rank, method, *stored, **stored_kwargs) for rank in range(self.size)]
        # Each takes its share of the one batch.
        return self._pending(calls, list, iteration=_iteration(self._recorder, kwargs), share=self.size)

    def one(
        self, rank: int, method: Callable[Concatenate[W, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Pending[R]:
        calls = [self._call(rank, method, *args, **kwargs)]
        iteration = _iteration(self._recorder, kwargs)
        return self._pending(calls, lambda results: cast(R, results[0]), iteration=iteration)

    def first(self, method: Callable[Concatenate[W, P], R], /, *args: P.args, **kwargs: P.kwargs) -> Pending[R]:
        return self.one(0, method, *args, **kwargs)

    def part(self, workers: int) -> RayGroup[W]:
        """The first workers as a group of their own; closing it leaves them."""
        return RayGroup(
            self.role,
            self._hosts[:workers],
            collective=self._collective,
            timeout_s=self._timeout_s,
            recorder=self._recorder,
            built=self._built[:workers],
            release=lambda idle: None,
        )

    def join(self, newcomers: RayGroup[W]) -> None:
        """Takes in the workers of another group, which were made with the ranks after this one's; that one is empty."""
        self._take([*self._hosts, *newcomers._hosts], [*self._built, *newcomers._built])
        newcomers._take([], [])
        newcomers._release = None

    def leave(self, workers: int) -> None:
        """Lets go of all but the first workers, which have nothing to do; whoever placed them ends them."""
        self._take(self._hosts[:workers], self._built[:workers])

    def close(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release(not self._under_way)
            for number in self._under_way:
                self._recorder.finish(number)

    def _take(self, hosts: Hosts, built: Sequence[Call]) -> None:
        self.size = len(hosts)
        self._hosts = hosts
        self._built = built
        self._processes = [call.process for call in built]

    def _store(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with each batch put into the object store, once for all workers."""

        def stored(value: Any) -> Any:
            return ray.put(value) if self.size > 1 and isinstance(value, Batch | Tensor) else value

        return [stored(value) for value in args], {name: stored(value) for name, value in kwargs.items()}

    def _call(self, rank: int, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
        assert self._release is not None, f"{self.role}: the group is closed"
        name = method.__name__
        reply = self._hosts[rank].call.remote(name, *args, **kwargs)
        return Call(
            reply=reply,
            role=self.role,
            rank=rank,
            method=name,
            timeout_s=self._timeout_s,
            setting="placement.call_timeout_s",
            process=self._processes[rank],
        )

    def _pending(
        self, calls: Sequence[Call], combine: Callable[[list[Any]], T], *, iteration: int, share: int = 1
    ) -> Pending[T]:
        number = self._recorder.begin(self.role, calls[0].method, workers=len(calls))
        self._under_way.add(number)

        def finish(replies: Sequence[Reply] | None) -> None:
            spans = [
                Span(
                    role=call.role,
                    rank=call.rank,
                    method=call.method,
                    start=reply.start,
                    end=reply.end,
                    iteration=iteration,
                    tokens=reply.work.tokens // share,
                    nbytes=reply.work.nbytes,
                    cpu_s=reply.cpu_s,
                )
                for call, reply in zip(calls, replies or (), strict=replies is not None)
            ]
            self._recorder.finish(number, spans)
            if replies is not None:
                self._under_way.discard(number)

        return RayPending(calls, combine, finish)


def _iteration(recorder: Recorder, kwargs: Mapping[str, Any]) -> int:
    """The iteration a call is for: the one under way, or a later one that the call itself names."""
    return max(recorder.iteration, int(kwargs.get("iteration") or 0))
