"""The loop of a reward model, on a learner in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import schema
from rlhf_ray.data.batches import PreferencePairs, make_sequences
from rlhf_ray.distributed.groups import LocalGroup
from rlhf_ray.distributed.tracing import Recorder
from rlhf_ray.trainers.metric_rows import read_metrics
from rlhf_ray.trainers.reward_model import score_statistics, train_reward_model
from rlhf_ray.trainers.run import RunFolder
from rlhf_ray.workers.objectives import BradleyTerryObjective
from tests.unit.trainers.fake_workers import Events, FakeLearner, FakeParts, stage_run


class FakePairs:
    """Every pair has a chosen answer of two tokens and a rejected one of one token; three pairs in all."""

    def __init__(self, events: Events) -> None:
        self.events = events

    def __len__(self) -> int:
        return 3

    def batch(self, step: int, batch_size: int) -> PreferencePairs:
        self.events.append(("batch", step, batch_size))
        return self._pairs(batch_size)

    def all(self) -> PreferencePairs:
        return self._pairs(3)

    def _pairs(self, number: int) -> PreferencePairs:
        chosen, rejected = (make_sequences([[1]] * number, [answer] * number) for answer in ([2, 2], [2]))
        return PreferencePairs(chosen, rejected, list(range(number)), torch.zeros(number))


class ScoringLearner(FakeLearner):
    """A row's score is the number of updates times the length of its answer."""

    def scores(self, sequences: Any) -> torch.Tensor:
        self.events.append(("scores", len(sequences)))
        return self.weights * sequences.response_mask.sum(1).float()


def train(folder: Path, *, held_out: bool = True, fails_at: int | None = None) -> tuple[Events, ScoringLearner]:
    """A stage of three steps, evaluated every second, saved after each."""
    config = schema.RewardModel.model_validate(
        {
            "method": "reward_model",
            "policy": {"model": "org/base"},
            "data": {"train": "x.jsonl"},
            "steps": 3,
            "batch_size": 2,
            "evaluation": {"every": 2},
            "checkpoints": {"every": 1},
        }
    )
    events: Events = []
    recorder = Recorder()
    learner = ScoringLearner(events, fails_at=fails_at)
    policy: Any = LocalGroup(learner, role="policy", recorder=recorder)
    pairs: Any = FakePairs(events)
    path = folder / "run"
    with RunFolder.open(path) if path.exists() else RunFolder.create(path, {"config.yaml": ""}) as run_folder:
        with stage_run(run_folder, config, total=3, recorder=recorder) as run:
            run.start_or_resume(FakeParts(learner))
            train_reward_model(config, policy, pairs, pairs if held_out else None, run)
    return events, learner


def step_events(step: int) -> Events:
    return [("batch", step - 1, 2), ("policy update", step, 1, 1)]


EVALUATED = [("scores", 6)]


def test_steps_and_evaluations(tmp_path: Path) -> None:
    events, learner = train(tmp_path)
    expected = [*EVALUATED, *step_events(1), *step_events(2), *EVALUATED, *step_events(3), *EVALUATED]
    assert events == expected
    assert isinstance(learner.objective, BradleyTerryObjective)
    rows = read_metrics(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    assert [row.get("evaluation/accuracy") for row in rows] == [0.5, None, 1.0, 1.0]
    assert [row.get("evaluation/margin") for row in rows] == [0, None, 2, 3]
    assert rows[1]["policy/tokens"] == 2 * 3 + 2 * 2
    assert rows[1]["policy/tokens_per_s"] > 0
    reports = {path.name: json.loads(path.read_text()) for path in (tmp_path / "run/reward_model/evaluation").iterdir()}
    assert sorted(reports) == [f"preferences_00000{step}.json" for step in (0, 2, 3)]
    assert [reports[name]["metrics"]["accuracy"] for name in sorted(reports)] == [0.5, 1.0, 1.0]
    # Every chosen answer is one token longer.
    assert [(part["low"], part["pairs"]) for part in reports["preferences_000003.json"]["by_length"]] == [(1, 3)]


def test_a_resumed_stage_goes_on_with_the_right_batch(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="update 2"):
        train(tmp_path, held_out=False, fails_at=2)
    events, learner = train(tmp_path, held_out=False)
    assert events == [*step_events(2), *step_events(3)]
    assert learner.weights == 3


def test_statistics_are_those_of_both_answers() -> None:
    learner = ScoringLearner([])
    learner.weights = 4
    pairs: Any = FakePairs(learner.events)
    policy: Any = LocalGroup(learner, role="policy")
    # Answers of two tokens score 8, of one token 4.
    assert score_statistics(policy, pairs) == {"score_mean": 6.0, "score_std": 2.0}
    assert learner.events == [("batch", 0, 3), ("scores", 6)]
