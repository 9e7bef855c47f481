"""Who is on the GPU, and when: the order of calls in the loops, on workers that fail when they are asked while away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.algorithms.kl import FixedKlController
from rlhf_ray.distributed.groups import LocalGroup
from rlhf_ray.stages.site import LearnerParts
from rlhf_ray.trainers.ppo import PpoGroups, train_ppo
from rlhf_ray.trainers.run import RunFolder
from rlhf_ray.trainers.sampling import SampleStream
from rlhf_ray.trainers.turns import GpuTurns
from tests.unit.trainers.fake_workers import (
    Events,
    FakeGenerator,
    FakeLearner,
    FakePrompts,
    FakeReference,
    FakeScorer,
    no_wishes,
    ppo_settings,
    stage_run,
)


class LeavingLearner(FakeLearner):
    """Notes that it leaves and comes back, and saves nothing."""

    here = "all"

    def offload(self, *, keep_weights: bool) -> None:
        self.here = "weights" if keep_weights else "nothing"
        self.events.append((f"{self.name} offload", "keeps weights" if keep_weights else "all"))

    def reload(self) -> None:
        self.here = "all"
        self.events.append((f"{self.name} reload",))

    def save(self, directory: Path) -> None:
        assert self.here == "all"
        directory.mkdir(parents=True)
        self.events.append((f"{self.name} save",))

    def save_model(self, directory: Path, notes: Any) -> None:
        assert self.here == "all"
        (directory / "config.json").write_text("{}")
        self.events.append((f"{self.name} save_model",))

    def logprobs(self, sequences: Any, temperature: float | None = None) -> Any:
        assert self.here != "nothing"
        return super().logprobs(sequences, temperature)

    def update(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        assert self.here == "all"
        return super().update(*args, **kwargs)


class SleepingGenerator(FakeGenerator):
    awake, keeps = True, True

    def sleep(self, *, keep_weights: bool) -> None:
        self.awake, self.keeps = False, keep_weights
        self.events.append(("sleep", "keeps weights" if keep_weights else "all"))

    def wake(self, *, weights_only: bool = False) -> None:
        self.awake = not weights_only
        self.events.append(("wake", "weights" if weights_only else "all"))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        assert self.awake
        assert self.keeps, "the weights were given up, and none have come since"
        return super().generate(*args, **kwargs)


class TurnsSync:
    """Takes the turns as WeightSync does."""

    def __init__(self, events: Events, generator: SleepingGenerator, policy: Any, turns: GpuTurns) -> None:
        self.events, self.generator, self.policy, self.turns = events, generator, policy, turns

    def sync(self, version: int, *, interrupted: str = "refuse") -> dict[str, float]:
        self.turns.receiving()
        self.events.append(("sync", version))
        self.generator.keeps, self.generator.version = True, version
        self.turns.proving(self.policy)
        self.turns.sampling()
        return {}

    def check_rollouts(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {}


def train(folder: Path, *, sleep: bool, offload: bool) -> tuple[Events, list[str]]:
    """Two iterations with a critic, a checkpoint after each, and three chunks of samples; what happened."""
    config = ppo_settings(prompts_per_iteration=3, chunk_samples=1, checkpoints={"every": 1})
    events: Events = []
    policy, critic = LeavingLearner(events), LeavingLearner(events, "critic")
    worker = SleepingGenerator(events)
    groups = PpoGroups(
        policy=LocalGroup(policy),  # type: ignore[arg-type]
        critic=LocalGroup(critic),  # type: ignore[arg-type]
        reference=LocalGroup(FakeReference([])),  # type: ignore[arg-type]
        generator=LocalGroup(worker),  # type: ignore[arg-type]
        rewards={"function": LocalGroup(FakeScorer())},  # type: ignore[dict-item]
    )
    learners: Any = {"policy": groups.policy, "critic": groups.critic}
    turns = GpuTurns(groups.generator if sleep else None, list(learners.values()) if offload else [])
    sync: Any = TurnsSync(events, worker, groups.policy, turns)
    prompts: Any = FakePrompts()
    samples = SampleStream(config, groups.generator, prompts)
    with RunFolder.create(folder / "run", {"config.yaml": ""}) as opened:
        with stage_run(opened, config, total=2) as run:
            turns.learning()
            run.start_or_resume(LearnerParts(learners, FixedKlController(0.1), samples=samples, turns=turns))
            scaling = no_wishes(run, groups.generator)
            train_ppo(config, groups, samples, prompts, sync, turns, FixedKlController(0.1), scaling, run)
            run.finish()
    return events, [event[0] for event in events]


AWAY = [("sleep", "all"), ("policy reload",), ("critic reload",)]
"""From the generators' turn to the learners'."""
SYNC = [
    ("wake", "weights"),
    ("sync",),
    ("policy offload", "keeps weights"),
    ("critic offload", "all"),
    ("wake", "all"),
    ("policy offload", "all"),
    ("critic offload", "all"),
    ("wake", "all"),
]


def test_the_turns_of_a_run(tmp_path: Path) -> None:
    """Also around a checkpoint, before which the generators keep their weights: no sync follows it."""
    events, _ = train(tmp_path, sleep=True, offload=True)
    turns = [event[:1] if event[0] == "sync" else event for event in events if "logprobs" not in event[0]]
    turns = [event for event in turns if event[0] not in ("critic values", "generate")]
    sampled = [("policy offload", "all"), ("critic offload", "all"), ("wake", "all"), *AWAY]
    kept = [("sleep", "keeps weights"), ("policy reload",), ("critic reload",), ("policy save",), ("critic save",)]
    updates = [[(f"{role} update", i, 1, 1) for role in ("policy", "critic")] for i in (1, 2)]
    first = [*AWAY, *SYNC, *AWAY, *updates[0], *SYNC, *kept]
    second = [*sampled, *updates[1], *SYNC, *kept, ("policy save_model",)]
    assert turns == [*first, *second]


@pytest.mark.parametrize(("sleep", "offload"), [(True, False), (False, True)])
def test_one_side_alone(tmp_path: Path, sleep: bool, offload: bool) -> None:
    _, names = train(tmp_path, sleep=sleep, offload=offload)
    assert ("sleep" in names, "wake" in names) == (sleep, sleep)
    assert ("policy offload" in names, "critic reload" in names) == (offload, offload)


def test_nobody_leaves_and_pieces_are_judged_as_they_come(tmp_path: Path) -> None:
    _, names = train(tmp_path, sleep=False, offload=False)
    assert not {"sleep", "wake", "policy offload", "policy reload"} & set(names)
    taken = []

    def pieces() -> Any:
        for piece in range(3):
            taken.append(piece)
            yield piece

    assert next(GpuTurns().sampled(pieces())) == 0
    assert taken == [0]
    group: Any = LocalGroup(SleepingGenerator([]))
    assert next(GpuTurns(group).sampled(pieces())) == 0
    assert taken == [0, 0, 1, 2]
