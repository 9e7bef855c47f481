"""The loop of supervised fine-tuning, on a learner in this process."""

from __future__ import annotations

from math import exp
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Sequences, make_sequences
from rlhf_ray.distributed.groups import LocalGroup
from rlhf_ray.distributed.tracing import Recorder
from rlhf_ray.trainers.metric_rows import read_metrics
from rlhf_ray.trainers.run import RunFolder
from rlhf_ray.trainers.sft import total_steps, train_sft
from rlhf_ray.workers.objectives import LanguageObjective
from tests.unit.trainers.fake_workers import Events, FakeLearner, FakeParts, stage_run


def sft_settings(**changes: Any) -> schema.Sft:
    values: dict[str, Any] = {
        "method": "sft",
        "policy": {"model": "org/base"},
        "data": {"train": "x.jsonl"},
        "steps": 5,
        "batch_size": 2,
        "evaluation": {"every": 2},
        "checkpoints": {"every": 0},
    }
    return schema.Sft.model_validate(values | changes)


class FakeTexts:
    """Batch i has rows of 2 and of i + 2 tokens; all texts are three."""

    def __init__(self, events: Events) -> None:
        self.events = events

    def batch(self, step: int, batch_size: int) -> Sequences:
        self.events.append(("batch", step, batch_size))
        return make_sequences([[1], [1]], [[2], [2] * (step + 1)])

    def all(self) -> Sequences:
        return make_sequences([[1]] * 3, [[2]] * 3)


class Stage:
    """A stage on fakes in a folder; every session is a process's worth of it, with a learner of its own."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.config = sft_settings(**changes)
        self.run_dir = folder / "run"
        self.learner = FakeLearner([])

    def session(self, *, held_out: bool = True, fails_at: int | None = None) -> Events:
        """Runs to the end, or to the failure; what happened."""
        events: Events = []
        recorder = Recorder()
        self.learner = FakeLearner(events, fails_at=fails_at)
        policy: Any = LocalGroup(self.learner, role="policy", recorder=recorder)
        texts: Any = FakeTexts(events)
        assert self.config.steps is not None
        resume = self.run_dir.exists()
        with RunFolder.open(self.run_dir) if resume else RunFolder.create(self.run_dir, {"config.yaml": ""}) as folder:
            with stage_run(folder, self.config, total=self.config.steps, recorder=recorder) as run:
                run.start_or_resume(FakeParts(self.learner))
                train_sft(self.config, policy, texts, texts if held_out else None, run)
        return events


def step_events(step: int) -> Events:
    return [("batch", step - 1, 2), ("policy update", step, 1, 1)]


EVALUATED = [("policy evaluate_loss", 3)]


def test_steps_and_evaluations(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    expected = [*step_events(1), *step_events(2), *EVALUATED, *step_events(3), *step_events(4), *EVALUATED]
    assert stage.session() == [*expected, *step_events(5), *EVALUATED]
    assert isinstance(stage.learner.objective, LanguageObjective)

    rows = read_metrics(stage.run_dir)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["policy/loss"] for row in rows] == [1, 2, 3, 4, 5]
    # Rows of 2 and of step + 1 tokens, prompts included.
    assert [row["policy/tokens"] for row in rows] == [4, 5, 6, 7, 8]
    assert [row.get("evaluation/loss") for row in rows] == [None, pytest.approx(1 / 3), None, 0.2, pytest.approx(1 / 6)]
    assert rows[3]["evaluation/perplexity"] == pytest.approx(exp(0.2))
    assert rows[0]["guard/skipped_steps"] == 1
    assert rows[0]["policy/grad_norm"] == 2
    assert rows[0]["policy/tokens_per_s"] > 0
    assert rows[0]["time/policy_update_s"] > 0


def test_an_evaluation_only_at_the_end(tmp_path: Path) -> None:
    events = Stage(tmp_path, evaluation={"every": 0}).session()
    assert events[-1:] == EVALUATED
    assert events.count(EVALUATED[0]) == 1


def test_nothing_is_evaluated_without_held_out_texts(tmp_path: Path) -> None:
    assert EVALUATED[0] not in Stage(tmp_path).session(held_out=False)


def test_a_huge_loss_has_a_finite_perplexity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLearner, "evaluate_loss", lambda self, sequences: 5000.0)
    stage = Stage(tmp_path, steps=1)
    stage.session()
    assert read_metrics(stage.run_dir)[0]["evaluation/perplexity"] == pytest.approx(exp(50))


@pytest.mark.parametrize(("fails_at", "first"), [(2, 1), (3, 3), (4, 3)])
def test_a_resumed_stage_goes_on_with_the_right_batch(tmp_path: Path, fails_at: int, first: int) -> None:
    """Checkpoints after steps 2 and 4."""
    stage = Stage(tmp_path, checkpoints={"every": 2}, evaluation={"every": 0})
    with pytest.raises(RuntimeError, match=f"update {fails_at}"):
        stage.session(fails_at=fails_at)
    left = [event for step in range(first, 6) for event in step_events(step)]
    assert stage.session() == [*left, *EVALUATED]
    assert stage.learner.weights == 5
    rows = read_metrics(stage.run_dir)
    assert [(row["iteration"], row["policy/loss"]) for row in rows] == [(n, n) for n in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"steps": 7}, 7),
        ({"steps": None}, 100),
        ({"steps": None, "epochs": 2}, 200),
        ({"steps": None, "epochs": 0.253}, 26),
        ({"steps": None, "epochs": 0.0001}, 1),
        # 1.1 * 100 is 110.00000000000001 in floating point.
        ({"steps": None, "epochs": 1.1}, 110),
    ],
)
def test_total_steps(changes: dict[str, Any], steps: int) -> None:
    texts: Any = SimpleNamespace(steps_per_epoch=lambda batch_size: 200 // batch_size)
    assert total_steps(sft_settings(**changes), texts) == steps
