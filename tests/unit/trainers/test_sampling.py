"""Batches of samples while generators come and go: every row once, of the seeds that it would have had anyway."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Prompts, Rollouts
from rlhf_ray.data.seeds import derive_seed
from rlhf_ray.distributed.groups import Pending, cut, merge, shares
from rlhf_ray.distributed.place import Place
from rlhf_ray.engines.generation import Sample
from rlhf_ray.trainers.sampling import SampleStream
from rlhf_ray.workers.generator import Generator
from tests.unit.trainers.fake_workers import FakePrompts, ppo_settings


class Engine:
    """A token for each response and step, of the weights at that step; the seed says which and how many."""

    max_model_len = 1000

    def __init__(self) -> None:
        self.version = 0
        self.count = 0
        self.running: dict[int, tuple[int, list[int]]] = {}

    def start(self, prompts: list[list[int]], sampling: schema.Sampling, *, seeds: list[int]) -> list[int]:
        numbers = list(range(self.count, self.count + len(prompts)))
        self.count += len(prompts)
        self.running |= {number: (seed, []) for number, seed in zip(numbers, seeds, strict=True)}
        return numbers

    def step(self) -> list[tuple[int, Sample]]:
        for _, versions in self.running.values():
            versions.append(self.version)
        ended = [number for number, (seed, versions) in self.running.items() if len(versions) > seed % 6]
        return [(number, made(*self.running.pop(number))) for number in ended]

    def restart(self) -> None:
        for _, versions in self.running.values():
            versions.clear()


def made(seed: int, versions: list[int]) -> Sample:
    return Sample([1 + seed % 7] * len(versions), [-1.0] * len(versions), True, str(seed), versions)


class Later(Pending[Any]):
    """An answer that is made when it is waited for, after those to all earlier questions."""

    def __init__(self, queue: list[Later], answer: Callable[[], Any]) -> None:
        queue.append(self)
        self.queue = queue
        self.answer = answer
        self.answers: list[Any] = []

    def result(self) -> Any:
        while not self.answers:
            first = self.queue.pop(0)
            first.answers.append(first.answer())
        return self.answers[0]


class Crowd:
    """Generators in this process with their own bookkeeping, on invented engines; their number changes."""

    role = "generator"

    def __init__(self, size: int) -> None:
        self.asked: list[Later] = []
        self.workers: list[Any] = []
        self.started: list[tuple[int, int]] = []
        self.grow(size)

    @property
    def size(self) -> int:
        return len(self.workers)

    def grow(self, size: int) -> None:
        for rank in range(self.size, size):
            worker: Any = object.__new__(Generator)
            worker.place, worker.seed, worker.engine = Place("generator", rank, size), 5, Engine()
            worker._started, worker._ended = {}, {}
            worker._asleep, worker._without_weights = [], False
            if self.workers:
                worker.engine.version = self.workers[0].engine.version
            self.workers.append(worker)

    def shrink(self, size: int) -> None:
        assert not self.asked, "they are still sampling"
        del self.workers[size:]

    def split(self, method: Callable[..., Any], batch: Any, /, *args: Any, **kwargs: Any) -> Any:
        parts = [rows for rows in shares(len(batch), self.size) if rows]
        calls = list(zip(self.workers, parts, strict=False))
        return Later(
            self.asked,
            lambda: merge(
                [getattr(worker, method.__name__)(cut(batch, own), *args, **kwargs) for worker, own in calls]
            ),
        )

    def one(self, rank: int, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        worker = self.workers[rank]
        return Later(self.asked, lambda: getattr(worker, method.__name__)(*args, **kwargs))

    def take_weights(self, version: int, *, abandon: bool) -> None:
        assert not self.asked, "they are still sampling"
        for worker in self.workers:
            worker.engine.version = version
            if abandon:
                worker.engine.restart()


PROMPTS: Any = FakePrompts()
MOMENTS = ("begin", "judged", "waited", "synced")


def run_stage(
    config: schema.Ppo, sizes: dict[tuple[int, str], int], *, saves: frozenset[int] = frozenset()
) -> tuple[list[Rollouts], Crowd, int]:
    """All batches of a stage, each in row order, with so many generators from these moments on; responses moved."""
    crowd, batches, moved = Crowd(sizes.get((0, "begin"), 2)), [], 0
    stream = SampleStream(config, crowd, PROMPTS)  # type: ignore[arg-type]

    def change(iteration: int, moment: str) -> int:
        size = sizes.get((iteration, moment), crowd.size)
        count = stream.hand_back(stay=size) if size < crowd.size else 0
        (crowd.shrink if size < crowd.size else crowd.grow)(size)
        return count

    for iteration in range(1, config.iterations + 1):
        moved += change(iteration, "begin")
        pieces = list(stream.pieces(iteration))
        rows = torch.cat([piece.rows for piece in pieces])
        assert sorted(rows.tolist()) == list(range(len(rows))), "each row once"
        batches.append(Rollouts.concat([piece.rollouts for piece in pieces]).select(rows.argsort().tolist()))
        moved += change(iteration, "judged")
        stream.wait()
        moved += change(iteration, "waited")
        crowd.take_weights(iteration, abandon=config.interrupted == "abandon")
        moved += change(iteration, "synced")
        if iteration in saves:
            with tempfile.TemporaryDirectory() as folder:
                stream.save(Path(folder))
    return batches, crowd, moved


def stage_of(**changes: Any) -> schema.Ppo:
    sampling = {"samples_per_prompt": 2, "max_new_tokens": 6}
    return ppo_settings(**{"iterations": 4, "prompts_per_iteration": 7, "sampling": sampling} | changes)


sizes_of_crowds = st.dictionaries(st.tuples(st.integers(1, 4), st.sampled_from(MOMENTS)), st.integers(1, 5), max_size=9)


@settings(max_examples=60)
@given(
    sizes=sizes_of_crowds,
    staleness=st.integers(0, 2),
    interrupted=st.sampled_from(["wait", "keep", "abandon"]),
    chunk=st.sampled_from([None, 1, 3]),
    saves=st.frozensets(st.integers(1, 4)),
)
def test_whoever_comes_and_goes_each_row_is_sampled_once(
    sizes: dict[tuple[int, str], int], staleness: int, interrupted: str, chunk: int | None, saves: frozenset[int]
) -> None:
    """Each row is the response of its own seed; its versions are of weights that were there, in their order."""
    config = stage_of(
        staleness=staleness,
        interrupted=interrupted if staleness else "wait",
        chunk_samples=None if staleness else chunk,
    )
    batches, crowd, _ = run_stage(config, sizes, saves=saves)
    for iteration, rollouts in enumerate(batches, start=1):
        ids = range(7 * (iteration - 1), 7 * iteration)
        assert rollouts.prompt_ids.tolist() == [number for number in ids for _ in range(2)]
        assert rollouts.responses == [str(derive_seed(5, iteration, n, s)) for n in ids for s in range(2)]
        first = max(0, iteration - 1 - staleness)
        for versions, mask in zip(rollouts.policy_versions, rollouts.sequences.response_mask, strict=True):
            own = versions[mask].tolist()
            assert own == sorted(own)
            assert first <= own[0] <= own[-1] <= (first if config.interrupted == "wait" else iteration - 1)
            assert config.interrupted == "keep" or own[0] == own[-1]
    assert all(not worker._started and not worker._ended for worker in crowd.workers)


def test_a_leaving_generator_keeps_nothing_that_it_has_finished() -> None:
    """Three quarters are asked for before a sync; of the last one, what has ended is taken and the rest moves."""
    config = stage_of(staleness=1, interrupted="keep")
    batches, _, moved = run_stage(config, {(0, "begin"): 3, (2, "waited"): 1})
    whole, _, none = run_stage(config, {(0, "begin"): 3})
    assert none == 0
    assert 0 < moved < 4
    for mine, other in zip(batches, whole, strict=True):
        assert mine.responses == other.responses


@pytest.mark.parametrize("interrupted", ["keep", "abandon"])
def test_what_was_taken_over_is_handed_on(interrupted: str) -> None:
    """Three leave one after the other, while a batch is under way that each had a part in."""
    config = stage_of(staleness=2, interrupted=interrupted, prompts_per_iteration=40)
    sizes = {(0, "begin"): 4, (2, "judged"): 3, (2, "waited"): 2, (2, "synced"): 1}
    batches, crowd, moved = run_stage(config, sizes)
    whole, _, _ = run_stage(config, {})
    assert moved > 9
    for mine, other in zip(batches, whole, strict=True):
        assert mine.responses == other.responses
    assert not crowd.workers[0]._started


def test_one_chunk_of_each_is_one_piece() -> None:
    (piece,) = SampleStream(stage_of(), Crowd(3), PROMPTS).pieces(1)  # type: ignore[arg-type]
    assert piece.rows.tolist() == list(range(14))
    assert piece.rollouts.prompt_ids.tolist() == [row // 2 for row in range(14)]


def test_only_the_last_batch_ahead_is_left_unfinished() -> None:
    """Of the batches under way, a sync finds the newest one alone, and only a part of that is asked for."""
    crowd = Crowd(2)
    stream = SampleStream(stage_of(staleness=2, interrupted="keep"), crowd, PROMPTS)  # type: ignore[arg-type]
    for iteration, newest in ((1, 3), (2, 4), (3, 4)):
        assert sum(len(piece.rows) for piece in stream.pieces(iteration)) == 14
        stream.wait()
        assert {number for worker in crowd.workers for number, _ in worker._started} == {newest}


@pytest.mark.parametrize(("interrupted", "told"), [("wait", "refuse"), ("keep", "keep"), ("abandon", "abandon")])
def test_what_a_sync_does_with_unfinished_responses(interrupted: str, told: str) -> None:
    config = stage_of(staleness=1, interrupted=interrupted)
    assert SampleStream(config, Crowd(1), PROMPTS).interrupted == told  # type: ignore[arg-type]


class Answered(FakePrompts):
    """Each prompt with an answer that JSON would change."""

    def batch(self, iteration: int, count: int) -> Prompts:
        prompts = super().batch(iteration, count)
        return replace(prompts, answers=[(number, {1: "one"}) for number in prompts.ids])


def test_answers_of_samples_that_were_saved(tmp_path: Path) -> None:
    config, prompts = stage_of(staleness=1), Answered()
    stream = SampleStream(config, Crowd(2), prompts)  # type: ignore[arg-type]
    list(stream.pieces(1))
    stream.save(tmp_path)
    resumed = SampleStream(config, Crowd(2), prompts)  # type: ignore[arg-type]
    resumed.load(tmp_path)
    (mine,), (whole,) = resumed.pieces(2), stream.pieces(2)
    assert mine.rollouts.answers == whole.rollouts.answers
    assert mine.rollouts.answers == [(7 + row // 2, {1: "one"}) for row in range(14)]
    assert mine.rollouts.responses == whole.rollouts.responses


@pytest.mark.parametrize("changes", [{"chunk_samples": 1}, {"staleness": 1}])
def test_a_row_that_comes_twice_is_noticed(changes: dict[str, int]) -> None:
    config = stage_of(**changes)
    crowd = Crowd(2)
    stream = SampleStream(config, crowd, PROMPTS)  # type: ignore[arg-type]
    original = crowd.workers[1].next_finished

    def again(*args: Any, **kwargs: Any) -> Any:
        finished = original(*args, **kwargs)
        finished.rows.zero_()
        return finished

    crowd.workers[1].next_finished = again
    with pytest.raises(AssertionError, match=r"of 14 samples these came: \[0, 1, 2, 3, 4, 5, 6, 7, 8, 8"):
        list(stream.pieces(1))
