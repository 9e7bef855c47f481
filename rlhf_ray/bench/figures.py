"""What a benchmark says: figures, each beside its floor, measured alternately in the same run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import psutil

Kind = Literal["at_least", "at_most"]


@dataclass(frozen=True)
class Settings:
    """How a benchmark measures.

    Args:
        folder: where it may keep models and runs.
        repeats: of each figure.
        quick: the main sizes alone.
        say: shows one line of progress.
    """

    folder: Path
    repeats: int
    quick: bool
    say: Callable[[str], None]


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Args:
        name: `benchmark/what/variant`, for example `learn/tokens/float32`.
        value: median of our repeats.
        unit: of value and floor.
        floor: median of the floor's repeats; None where there is nothing to compare with.
        ratio: median of the repeats' own ratios value / floor; None without a floor.
        at_least: smallest ratio (without a floor: value) that is good enough.
        at_most: largest ratio (without a floor: value) that is good enough.
        repeats: how often both were measured.
        spread: (largest - smallest) / median of the ratios, or of the values where there is no floor.
    """

    name: str
    value: float
    unit: str
    floor: float | None = None
    ratio: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    repeats: int = 1
    spread: float = 0.0

    @property
    def missed(self) -> bool:
        """Whether a bound is not held."""
        judged = self.value if self.ratio is None else self.ratio
        low = self.at_least is not None and judged < self.at_least
        return low or (self.at_most is not None and judged > self.at_most)


@dataclass(frozen=True)
class Cost:
    """What one repeat did and took.

    Args:
        units: work done, in the figure's unit without its "per second".
        cpu_s: CPU seconds of all the processes that worked.
        wall_s: seconds that passed.
    """

    units: float
    cpu_s: float
    wall_s: float

    @property
    def per_cpu_second(self) -> float:
        return self.units / self.cpu_s

    @property
    def per_second(self) -> float:
        return self.units / self.wall_s


def cost(work: Callable[[], float], *, processes: Callable[[], Iterable[int]] | None = None) -> Cost:
    """Runs `work`, which gives the number of units it did.

    Args:
        processes: ids of the processes that work; this one alone unless told. Asked before and after.
    """
    ids = list(processes()) if processes else [os.getpid()]
    before, start = cpu_seconds(ids), time.perf_counter()
    units = work()
    wall_s = time.perf_counter() - start
    return Cost(units, cpu_seconds(ids) - before, wall_s)


def cpu_seconds(processes: Iterable[int]) -> float:
    """User and system seconds of these processes so far; one that is gone counts nothing."""
    total = 0.0
    for number in processes:
        try:
            times = psutil.Process(number).cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def compared(
    name: str,
    ours: Callable[[], float],
    floor: Callable[[], float],
    *,
    unit: str,
    repeats: int,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Figure:
    """Measures both in turn, one warm-up of each before; each call gives its figure in `unit`."""
    ours()
    floor()
    pairs = [(ours(), floor()) if turn % 2 == 0 else (floor(), ours())[::-1] for turn in range(repeats)]
    return from_pairs(name, pairs, unit=unit, at_least=at_least, at_most=at_most)


def from_pairs(
    name: str,
    pairs: Sequence[tuple[float, float]],
    *,
    unit: str,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Figure:
    """The figure of repeats (ours, floor)."""
    ratios = [ours / floor for ours, floor in pairs]
    return Figure(
        name=name,
        value=median(ours for ours, _ in pairs),
        unit=unit,
        floor=median(floor for _, floor in pairs),
        ratio=median(ratios),
        at_least=at_least,
        at_most=at_most,
        repeats=len(pairs),
        spread=_spread(ratios),
    )


def alone(
    name: str, values: Sequence[float], *, unit: str, at_least: float | None = None, at_most: float | None = None
) -> Figure:
    """A figure without a floor."""
    return Figure(
        name=name,
        value=median(values),
        unit=unit,
        at_least=at_least,
        at_most=at_most,
        repeats=len(values),
        spread=_spread(values),
    )


def _spread(values: Sequence[float]) -> float:
    middle = median(values)
    return (max(values) - min(values)) / middle if middle else 0.0
