"""What engines that sleep ask for, and when they sleep for the first time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from rlhf_ray.config import schema
from rlhf_ray.stages.actors import Actors, generator_request, own_part
from tests.unit.trainers.fake_workers import ppo_settings


@dataclass
class FakeGroup:
    """Notes what it is asked; every answer is there."""

    role: str
    events: list[str]

    @property
    def ready(self) -> FakeGroup:
        return self

    def result(self) -> None:
        self.events.append(f"{self.role} waited for")

    def all(self, method: Any, **arguments: Any) -> FakeGroup:
        self.events.append(f"{self.role} {method.__name__}")
        return self


@dataclass
class FakePlacement:
    """Gives every role this share of a GPU."""

    gpus: float
    events: list[str] = field(default_factory=list)

    def share(self, role: str) -> FakePlacement:
        return self

    def room(self, role: str) -> FakePlacement:
        return self

    def start(self, role: str, worker: type[Any], **arguments: Any) -> FakeGroup:
        self.events.append(f"{role} started")
        return FakeGroup(role, self.events)


class FakeSite:
    """The little that is read of a run."""

    config = schema.Pipeline.model_validate({"run_dir": "r", "stages": [ppo_settings().model_dump()]})

    def tokenizer(self, stage: Any) -> str:
        return "tokenizer"


@pytest.mark.parametrize(("sleep", "share"), [(False, 0.4), (True, 0.8)])
def test_engines_that_sleep_may_use_the_whole_gpu(sleep: bool, share: float) -> None:
    placement: Any = FakePlacement(0.5)
    found = own_part(schema.Generator(memory_share=0.8, sleep=sleep), placement)
    assert found.memory_share == pytest.approx(share)


def test_the_process_of_an_engine_that_sleeps_on_a_gpu_is_not_used_again() -> None:
    def reuse(gpus: float, *, sleep: bool) -> str | None:
        return generator_request("ppo", schema.Generator(sleep=sleep), gpus=gpus).reuse

    assert (reuse(1, sleep=True), reuse(0, sleep=True), reuse(1, sleep=False)) == (None, "generator", "generator")


@pytest.mark.parametrize(
    ("sleep", "gpus", "between"),
    [
        (True, 0.5, ["generator waited for", "generator sleep", "generator waited for"]),
        (True, 0.0, []),
        (False, 0.5, []),
    ],
)
def test_engines_on_a_gpu_sleep_before_other_actors_start(sleep: bool, gpus: float, between: list[str]) -> None:
    placement, site = FakePlacement(gpus), FakeSite()
    config = ppo_settings(generator={"sleep": sleep})
    actors = Actors(site, config, placement, "model")  # type: ignore[arg-type]
    actors.generator(config.generator, max_length=8)
    actors.reference(config.reference)
    assert placement.events == ["generator started", *between, "reference started"]
