"""Samples for training: each batch in pieces as they finish, or sampled ahead of the iteration that learns from it.

samples = SampleStream(config, generator, prompts)
for iteration in ...:
    for piece in samples.pieces(iteration): ...     # may be judged while others are still sampled
    ...                                             # learn; batches ahead are being sampled meanwhile
    samples.wait()                                  # before the generators get other weights
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Prompts, Rollouts
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.distributed.groups import Pending, WorkerGroup, arrivals, gather, shares
from rlhf_ray.shapes import SequenceInt
from rlhf_ray.trainers.journal import read_rollouts, write_rollouts
from rlhf_ray.workers.generator import Finished, Generator

_SMALLEST_CHUNK = 16
_CHUNKS = 4
_FOLDER = "sampled_ahead"


@dataclass(frozen=True)
class Piece:
    """Samples that are judged together.

    Args:
        rows: [C] their places in the batch, ascending.
        rollouts: the samples.
    """

    rows: SequenceInt
    rollouts: Rollouts


@dataclass(frozen=True)
class _UnderWay:
    """A batch that is being sampled.

    Args:
        started: whether all generators have taken it on.
        chunks: what they finish, one after the other.
        first_rows: place in the batch of the first row of each chunk's generator.
        streams: whether the chunks are judged one by one.
    """

    started: Pending[None]
    chunks: list[Pending[Finished]]
    first_rows: list[int]
    streams: bool

    def pieces(self) -> Iterator[Piece]:
        """Chunks as they finish; a single piece in the order of the rows where they are not judged one by one."""
        if not self.streams:
            gather(self.started, *self.chunks)
            yield _in_order([self._piece(number, chunk.result()) for number, chunk in enumerate(self.chunks)])
            return
        for number, chunk in arrivals(self.started, *self.chunks):
            if chunk is not None:
                yield self._piece(number - 1, chunk)

    def _piece(self, number: int, chunk: Finished) -> Piece:
        rows, order = chunk.rows.sort()
        return Piece(rows + self.first_rows[number], chunk.rollouts.select(order.tolist()))


class SampleStream:
    """The generators' batches, one for each iteration.

    Args:
        config: the stage's settings.
        generator: the engines.
        prompts: what is sampled from.
    """

    def __init__(self, config: schema.Ppo, generator: WorkerGroup[Generator], prompts: PromptSet) -> None:
        self._config = config
        self._generator = generator
        self._prompts = prompts
        self._under_way: dict[int, _UnderWay] = {}
        self._complete: dict[int, Rollouts] = {}

    def pieces(self, iteration: int) -> Iterator[Piece]:
        """The batch of an iteration; those of the `staleness` iterations after it are started with the same weights.

        Without staleness the pieces come as they finish. A batch that was sampled ahead is one piece.
        """
        last = min(iteration + self._config.staleness, self._config.iterations)
        for ahead in range(iteration, last + 1):
            if ahead not in self._complete and ahead not in self._under_way:
                self._under_way[ahead] = self._start(ahead)
        if iteration in self._complete:
            rollouts = self._complete.pop(iteration)
            yield Piece(torch.arange(len(rollouts)), rollouts)
        else:
            yield from self._under_way.pop(iteration).pieces()

    def wait(self) -> None:
        """Returns once nothing is being sampled: the generators can take other weights."""
        for iteration in list(self._under_way):
            piece = _in_order(list(self._under_way.pop(iteration).pieces()))
            self._complete[iteration] = piece.rollouts

    def save(self, folder: Path) -> None:
        """Writes the batches that were sampled ahead."""
        self.wait()
        for iteration, rollouts in self._complete.items():
            unknown = torch.full((len(rollouts),), torch.nan)
            write_rollouts(folder / _FOLDER / f"{iteration:06}.parquet", rollouts, scores=unknown)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        for file in (folder / _FOLDER).glob("*.parquet"):
            iteration = int(file.stem)
            # A journal keeps answers as JSON; the data have them as they are.
            answers = [
                answer
                for answer in self._batch(iteration).answers
                for _ in range(self._config.sampling.samples_per_prompt)
            ]
            self._complete[iteration] = replace(read_rollouts(file).rollouts, answers=answers)

    def _batch(self, iteration: int) -> Prompts:
        return self._prompts.batch(iteration - 1, self._config.prompts_per_iteration)

    def _start(self, iteration: int) -> _UnderWay:
        batch, sampling = self._batch(iteration), self._config.sampling
        started = self._generator.split(Generator.start, batch, sampling, iteration=iteration)
        chunks, first_rows = [], []
        streams = False
        for rank, prompts in enumerate(shares(len(batch), self._generator.size)):
            rows = len(prompts) * sampling.samples_per_prompt
            size = rows if self._config.staleness else self._config.chunk_samples or chunk_rows(rows)
            streams = streams or size < rows
            for taken in range(0, rows, max(size, 1)):
                count = min(size, rows - taken)
                chunks.append(self._generator.one(rank, Generator.next_finished, iteration=iteration, count=count))
                first_rows.append(prompts.start * sampling.samples_per_prompt)
        return _UnderWay(started, chunks, first_rows, streams)


def chunk_rows(rows: int) -> int:
    """Samples that are judged together where the settings do not say: a quarter of a generator's, at least 16."""
    return max(-(-rows // _CHUNKS), _SMALLEST_CHUNK)


def _in_order(pieces: list[Piece]) -> Piece:
    """One piece of all rows."""
    rows, order = torch.cat([piece.rows for piece in pieces]).sort()
    return Piece(rows, Rollouts.concat([piece.rollouts for piece in pieces]).select(order.tolist()))
