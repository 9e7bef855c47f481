"""Samples for training: each batch in pieces as they finish, or sampled ahead of the iteration that learns from it.

samples = SampleStream(config, generator, prompts)
for iteration in ...:
    for piece in samples.pieces(iteration): ...     # may be judged while others are still sampled
    ...                                             # learn; batches ahead are being sampled meanwhile
    samples.wait()                                  # before the generators get other weights
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Prompts, Rollouts
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.distributed.groups import Pending, WorkerGroup, arrivals, gather, shares
from rlhf_ray.shapes import SequenceInt
from rlhf_ray.trainers.journal import read_rollouts, write_rollouts
from rlhf_ray.workers.generator import Finished, Generator, Interrupted

_SMALLEST_CHUNK = 16
_CHUNKS = 4
_PIECES = 16
_FOLDER = "sampled_ahead"
_FINISHED_BEFORE_SYNC = 3, 4


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
class _Chunk:
    """Samples that one generator hands over at once.

    Args:
        rank: of the generator.
        first_row: place in the batch of the generator's first row.
        count: of the samples.
        piece: chunks of the same piece are judged together.
        part: 0 of what the generator was given at first, another number of what it took over.
    """

    rank: int
    first_row: int
    count: int
    piece: tuple[int, int]
    part: int = 0


@dataclass
class _Batch:
    """A batch that is being sampled.

    Args:
        started: whether all generators have taken it on.
        asked: the chunks that are on their way.
        left: the chunks that nobody has asked for, each generator's in order.
        streams: whether chunks are judged one by one.
        samples: how many the batch has.
        parts: how many times generators were given something of it.
    """

    started: Pending[None]
    asked: list[tuple[_Chunk, Pending[Finished]]]
    left: list[_Chunk]
    streams: bool
    samples: int
    parts: int = 1

    def pieces(self) -> Iterator[Piece]:
        """Pieces as they finish; a single one in the order of the rows where chunks are not judged one by one."""
        if not self.streams:
            yield self.whole()
            return
        given = []
        awaited = Counter(chunk.piece for chunk, _ in self.asked)
        arrived = defaultdict[tuple[int, int], list[Piece]](list)
        for number, finished in arrivals(self.started, *(pending for _, pending in self.asked)):
            if finished is not None:
                chunk = self.asked[number - 1][0]
                arrived[chunk.piece].append(_piece(chunk, finished))
                if len(arrived[chunk.piece]) == awaited[chunk.piece]:
                    piece = _joined(arrived.pop(chunk.piece))
                    given.append(piece.rows)
                    yield piece
        self._check_ledger(given)

    def wait(self) -> None:
        """Returns when all that was asked for is there."""
        gather(self.started, *(pending for _, pending in self.asked))

    def whole(self) -> Piece:
        """All rows, in their order."""
        self.wait()
        pieces = [_piece(chunk, pending.result()) for chunk, pending in self.asked]
        self._check_ledger([piece.rows for piece in pieces])
        return _joined(pieces)

    def _check_ledger(self, given: list[SequenceInt]) -> None:
        """Each sample of the batch is given once, whoever came or left meanwhile."""
        rows = torch.cat(given).sort().values
        assert torch.equal(rows, torch.arange(self.samples)), f"of {self.samples} samples these came: {rows.tolist()}"


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
        self.interrupted: Interrupted = "refuse" if config.interrupted == "wait" else config.interrupted
        self._under_way: dict[int, _Batch] = {}
        self._complete: dict[int, Rollouts] = {}

    def pieces(self, iteration: int) -> Iterator[Piece]:
        """The batch of an iteration; those of the `staleness` iterations after it are started with the same weights.

        The pieces come as they finish. A batch that was complete before is one piece.
        """
        last = min(iteration + self._config.staleness, self._config.iterations)
        for ahead in range(iteration, last + 1):
            if ahead not in self._complete and ahead not in self._under_way:
                self._under_way[ahead] = self._start(ahead)
        for ahead in range(iteration, last + 1):
            newest = ahead == last > iteration
            self._ask(ahead, all_of_it=not newest or self._config.interrupted == "wait")
        if iteration in self._complete:
            rollouts = self._complete.pop(iteration)
            yield Piece(torch.arange(len(rollouts)), rollouts)
        else:
            yield from self._under_way.pop(iteration).pieces()

    def wait(self) -> None:
        """Returns when the generators can take other weights: nothing that was asked for is being sampled."""
        for batch in self._under_way.values():
            batch.wait()

    def hand_back(self, stay: int) -> int:
        """Takes from all but the first `stay` generators what they have; the others begin their unfinished rows anew.

        Returns when nothing that was asked for is being sampled; afterwards the generators may go.

        Returns:
            how many responses begin anew: with the same seeds, and with the weights that their new generators hold.
        """
        self.wait()
        moved = 0
        for iteration, batch in self._under_way.items():
            leaving = [chunk for chunk in batch.left if chunk.rank >= stay]
            batch.left = [chunk for chunk in batch.left if chunk.rank < stay]
            unfinished: list[int] = []
            for rank, part, first_row in dict.fromkeys((chunk.rank, chunk.part, chunk.first_row) for chunk in leaving):
                count = sum(chunk.count for chunk in leaving if (chunk.rank, chunk.part) == (rank, part))
                rows = self._generator.one(rank, Generator.unfinished, iteration=iteration, part=part).result()
                unfinished += [first_row + row for row in rows]
                if len(rows) < count:
                    piece = next(chunk.piece for chunk in leaving if (chunk.rank, chunk.part) == (rank, part))
                    batch.asked.append(self._call(iteration, _Chunk(rank, first_row, count - len(rows), piece, part)))
            if unfinished:
                self._start_anew(iteration, batch, sorted(unfinished), stay)
            moved += len(unfinished)
        self.wait()
        return moved

    def _start_anew(self, iteration: int, batch: _Batch, rows: list[int], generators: int) -> None:
        """Spreads these rows of a batch over the first generators."""
        prompts, sampling = self._prompts_of(iteration), self._config.sampling
        own = [rows[share.start : share.stop] for share in shares(len(rows), generators) if share]
        part, batch.parts = batch.parts, batch.parts + 1
        calls = [
            self._generator.one(
                rank, Generator.start, prompts, sampling, iteration=iteration, part=part, rows=own[rank]
            )
            for rank in range(len(own))
        ]
        gather(*calls)
        batch.left += [_Chunk(rank, 0, len(own[rank]), (rank, -part), part) for rank in range(len(own))]

    def save(self, folder: Path) -> None:
        """Writes the batches that were sampled ahead, and completes the one under way for that."""
        for iteration in sorted(self._under_way):
            self._ask(iteration, all_of_it=True)
            self._complete[iteration] = self._under_way.pop(iteration).whole().rollouts
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
                for answer in self._prompts_of(iteration).answers
                for _ in range(self._config.sampling.samples_per_prompt)
            ]
            self._complete[iteration] = replace(read_rollouts(file).rollouts, answers=answers)

    def _prompts_of(self, iteration: int) -> Prompts:
        return self._prompts.batch(iteration - 1, self._config.prompts_per_iteration)

    def _start(self, iteration: int) -> _Batch:
        prompts, sampling = self._prompts_of(iteration), self._config.sampling
        started = self._generator.split(Generator.start, prompts, sampling, iteration=iteration)
        each = sampling.samples_per_prompt
        together = generators_together(self._config, self._generator.size)
        chunks = [
            [
                _Chunk(rank, share.start * each, count, piece=(rank // together, number))
                for number, count in enumerate(chunk_sizes(self._config, len(share) * each))
            ]
            for rank, share in enumerate(shares(len(prompts), self._generator.size))
        ]
        streams = any(len(own) > 1 for own in chunks)
        return _Batch(started, [], [chunk for own in chunks for chunk in own], streams, len(prompts) * each)

    def _ask(self, iteration: int, *, all_of_it: bool) -> None:
        """Asks for what is left of a batch, or for each generator's first chunk."""
        batch = self._under_way.get(iteration)
        if batch is None or (batch.asked and not all_of_it):
            return
        ranks = [chunk.rank for chunk in batch.left]
        now = [chunk for at, chunk in enumerate(batch.left) if all_of_it or chunk.rank not in ranks[:at]]
        batch.left = [chunk for chunk in batch.left if chunk not in now]
        batch.asked += [self._call(iteration, chunk) for chunk in now]

    def _call(self, iteration: int, chunk: _Chunk) -> tuple[_Chunk, Pending[Finished]]:
        call = self._generator.one(
            chunk.rank, Generator.next_finished, iteration=iteration, count=chunk.count, part=chunk.part
        )
        return chunk, call


def chunk_sizes(config: schema.Ppo, rows: int) -> list[int]:
    """How many of a generator's samples are handed over at a time.

    Without staleness by the settings, else all at once; where unfinished responses outlive a change of weights, first
    those that must be finished before it.
    """
    if config.staleness == 0:
        size = config.chunk_samples or max(-(-rows // _CHUNKS), _SMALLEST_CHUNK)
    elif config.interrupted == "wait":
        size = rows
    else:
        size = -(-rows * _FINISHED_BEFORE_SYNC[0] // _FINISHED_BEFORE_SYNC[1])
    return [min(size, rows - taken) for taken in range(0, rows, max(size, 1))]


def generators_together(config: schema.Ppo, generators: int) -> int:
    """Of how many generators the chunks of one number are judged together; one where the settings give their size.

    Each piece is cut over all scorers and learners: with many small ones the driver could not keep up.
    """
    return 1 if config.chunk_samples else -(-generators * _CHUNKS // _PIECES)


def _joined(pieces: Sequence[Piece]) -> Piece:
    """All rows of the pieces, in their order."""
    if len(pieces) == 1:
        return pieces[0]
    rows, order = torch.cat([piece.rows for piece in pieces]).sort()
    rollouts = Rollouts.concat([piece.rollouts for piece in pieces])
    return Piece(rows, rollouts if bool((order.diff() > 0).all()) else rollouts.select(order.tolist()))


def _piece(chunk: _Chunk, finished: Finished) -> Piece:
    rows, order = finished.rows.sort()
    return Piece(rows + chunk.first_row, finished.rollouts.select(order.tolist()))
