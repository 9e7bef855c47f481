"""Generators and learners by turns on the GPUs that they share.

    turns = GpuTurns(generator, [policy, critic])       # who leaves the GPU for the others; there may be nobody
    turns.learning()                                    # before the first weights are sent
    weights.sync(version)                               # afterwards it is the generators' turn
    for piece in turns.sampled(samples.pieces(1)): ...  # afterwards the learners': judge, update, save
    weights.sync(version + 1)

What is asked of a worker that is away fails there, on a CPU too, where nothing is moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeVar

from rlhf_ray.distributed.groups import WorkerGroup, gather
from rlhf_ray.workers.generator import Generator
from rlhf_ray.workers.learner import Learner

T = TypeVar("T")


class GpuTurns:
    """Whose turn it is; without anybody who leaves, every call returns at once.

    Args:
        generator: the engines, where they sleep while the learners train.
        learners: the groups that wait in host memory while the generators sample.
    """

    def __init__(
        self, generator: WorkerGroup[Generator] | None = None, learners: Sequence[WorkerGroup[Learner]] = ()
    ) -> None:
        self._generator = generator
        self._learners = learners
        self._turn: Literal["everybody", "learning", "sync", "sampling"] = "everybody"

    def sampled(self, pieces: Iterable[T]) -> Iterator[T]:
        """The pieces as they come; where somebody leaves, all of them at once, when it is the learners' turn."""
        if self._generator is None and not self._learners:
            yield from pieces
            return
        self.sampling()
        found = list(pieces)
        self.learning()
        yield from found

    def learning(self, *, keep_weights: bool = False) -> None:
        """The generators sleep, then the learners are back.

        Args:
            keep_weights: the generators keep theirs; else a sync comes before they sample again.
        """
        if self._turn == "learning":
            return
        if self._generator is not None:
            self._generator.all(Generator.sleep, keep_weights=keep_weights).result()
        gather(*(group.all(Learner.reload) for group in self._learners))
        self._turn = "learning"

    def receiving(self) -> None:
        """The learners are there, and the generators have room for weights, not yet for their cache."""
        self.learning()
        if self._generator is not None:
            self._generator.all(Generator.wake, weights_only=True).result()
        self._turn = "sync"

    def proving(self, policy: WorkerGroup[Learner]) -> None:
        """The generators are awake, and of all that leave only the policy's weights are there still."""
        self._offload(keep_weights_of=policy)
        self._wake()

    def sampling(self) -> None:
        """The learners leave, then the generators are awake."""
        if self._turn == "sampling":
            return
        self._offload()
        self._wake()
        self._turn = "sampling"

    def _offload(self, *, keep_weights_of: WorkerGroup[Learner] | None = None) -> None:
        gather(*(group.all(Learner.offload, keep_weights=group is keep_weights_of) for group in self._learners))

    def _wake(self) -> None:
        if self._generator is not None:
            self._generator.all(Generator.wake).result()
