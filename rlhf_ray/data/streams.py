"""Which row comes at which position of the endless stream over one or several sources."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.data.seeds import derive_seed

_CHUNK = 65536


class Stream:
    """An endless sequence of (row, pass), a pure function of seed and position: resuming needs the position only.

    One source: every pass holds each row once. Several: each position draws its source in proportion to the weights,
    and every source's own rows come in whole passes. Rows are numbered over the sources in order.

    Args:
        sizes: rows of each source, at least one each.
        weights: positive shares of the sources.
        shuffle: a new order in every pass, otherwise the sources' own.
    """

    def __init__(self, *, sizes: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool) -> None:
        assert min(sizes) > 0, f"an empty source: {sizes}"
        assert len(sizes) == len(weights), f"sizes {sizes}, weights {weights}"
        self._sizes = list(sizes)
        self._firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._shares = np.cumsum(weights) / np.sum(weights)
        self._seed = seed
        self._shuffle = shuffle
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}
        self._draws: tuple[int, NDArray[np.int64]] | None = None
        # Draws of each source before each chunk; grows as later chunks are asked for.
        self._before = [np.zeros(len(sizes), dtype=np.int64)]

    def __len__(self) -> int:
        """Rows of all sources together."""
        return sum(self._sizes)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches in one pass over all rows; the last may be smaller."""
        return ceil(sum(self._sizes) / batch_size)

    def batch(self, step: int, batch_size: int) -> list[int]:
        """The rows of the step-th (from 0) batch.

        Each epoch starts a new batch, so with one source every epoch holds each row once.
        """
        rows = sum(self._sizes)
        epoch, number = divmod(step, self.steps_per_epoch(batch_size))
        start = number * batch_size
        return [row for row, _ in self.take(epoch * rows + start, min(batch_size, rows - start))]

    def take(self, start: int, count: int) -> list[tuple[int, int]]:
        """(row, pass) at the positions start ... start + count - 1."""
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> tuple[int, int]:
        source, rank = (0, position) if len(self._sizes) == 1 else self._draw(position)
        number, index = divmod(rank, self._sizes[source])
        return self._firsts[source] + (int(self._order(source, number)[index]) if self._shuffle else index), number

    def _order(self, source: int, number: int) -> NDArray[np.int64]:
        known = self._orders.get(source)
        if known is None or known[0] != number:
            generator = np.random.default_rng(derive_seed(self._seed, "order", source, number))
            known = (number, generator.permutation(self._sizes[source]))
            self._orders[source] = known
        return known[1]

    def _draw(self, position: int) -> tuple[int, int]:
        """The source drawn at a position, and how often it was drawn before."""
        chunk, offset = divmod(position, _CHUNK)
        while len(self._before) <= chunk:
            drawn = self._chunk(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(drawn, minlength=len(self._sizes)))
        drawn = self._chunk(chunk)
        source = int(drawn[offset])
        return source, int(self._before[chunk][source]) + int(np.count_nonzero(drawn[:offset] == source))

    def _chunk(self, chunk: int) -> NDArray[np.int64]:
        if self._draws is None or self._draws[0] != chunk:
            uniform = np.random.default_rng(derive_seed(self._seed, "mix", chunk)).random(_CHUNK)
            drawn = np.minimum(np.searchsorted(self._shares, uniform, side="right"), len(self._sizes) - 1)
            self._draws = (chunk, drawn.astype(np.int64))
        return self._draws[1]
