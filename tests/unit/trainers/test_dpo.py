"""The loop of DPO on workers in this process: who is asked what, and when; and what is measured, by hand."""

from __future__ import annotations

import json
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.algorithms.preference_losses import ChosenLoss, DpoLoss, IpoLoss, OrpoLoss, SimpoLoss
from rlhf_ray.config import schema
from rlhf_ray.config.rules import DPO_METRICS
from rlhf_ray.data.pair_scores import PairScores, choose_pairs
from rlhf_ray.data.preferences import PreferenceSet, load_preferences
from rlhf_ray.data.reference_cache import ReferenceCache
from rlhf_ray.distributed.groups import LocalGroup
from rlhf_ray.distributed.tracing import Recorder
from rlhf_ray.trainers.dpo import (
    DpoGroups,
    References,
    Samples,
    preference_objective,
    score_pairs,
    train_dpo,
    unknown_answers,
)
from rlhf_ray.trainers.journal import read_rollouts
from rlhf_ray.trainers.metric_rows import read_metrics
from rlhf_ray.trainers.run import RunFolder
from rlhf_ray.trainers.turns import GpuTurns
from tests.unit.data.tokenizers_for_tests import byte_tokenizer
from tests.unit.trainers.fake_workers import (
    Events,
    FakeGenerator,
    FakeLearner,
    FakeParts,
    FakeReference,
    FakeScorer,
    FakeSync,
    answer_sums,
    stage_run,
)


def settings(**changes: Any) -> schema.Dpo:
    values: dict[str, Any] = {
        "method": "dpo",
        "policy": {"model": "org/base"},
        "data": {"train": "x.jsonl", "shuffle": False},
        "loss": {"beta": 0.5},
        "steps": 3,
        "batch_size": 2,
        "evaluation": {"every": 2},
        "checkpoints": {"every": 1},
    }
    return schema.Dpo.model_validate(values | changes)


def pairs_of(folder: Path, number: int = 4, *, start: int = 0) -> PreferenceSet:
    """Chosen answers of two tokens and rejected ones of three, the last of each being the end of sequence."""
    path = folder / f"pairs{start}.jsonl"
    rows = [
        {"prompt": "ab", "chosen": chr(65 + start + i), "rejected": "b" + chr(65 + start + i)} for i in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_preferences(
        schema.PreferenceData(train=str(path), shuffle=False), byte_tokenizer(), seed=1, sources="train"
    )


class Stage:
    """What one run of the stage needs; `events` is what was asked."""

    def __init__(self, folder: Path, config: schema.Dpo, *, held_out: bool = True, reference: bool = True) -> None:
        self.folder = folder
        self.config = config
        self.events: Events = []
        self.pairs = pairs_of(folder)
        self.held_out = pairs_of(folder, 3, start=5) if held_out else None
        self.recorder = Recorder()
        self.samples: Samples | None = None
        self.scorers: dict[str, Any] = {}
        self.reference = reference
        self.messages: list[str] = []

    def group(self, worker: Any, role: str) -> Any:
        return LocalGroup(worker, role=role, recorder=self.recorder)

    def cache(self) -> ReferenceCache:
        return ReferenceCache(self.folder / "cache", "key", self.messages.append)

    def train(
        self, *, cache: ReferenceCache | None = None, fails_at: int | None = None, run: str = "run"
    ) -> FakeLearner:
        learner = FakeLearner(self.events, fails_at=fails_at)
        reference = self.group(FakeReference(self.events), "reference") if self.reference else None
        groups = DpoGroups(self.group(learner, "policy"), reference, self.scorers)
        path = self.folder / run
        with RunFolder.open(path) if path.exists() else RunFolder.create(path, {"config.yaml": ""}) as folder:
            with stage_run(folder, self.config, total=self.config.steps or 0, recorder=self.recorder) as stage:
                stage.start_or_resume(FakeParts(learner))
                references = References(groups, cache, needed=self.config.needs_reference)
                train_dpo(self.config, groups, self.pairs, self.held_out, references, self.samples, stage)
        return learner


UPDATES = [("policy update", step, 1, 1) for step in (1, 2, 3)]
JUDGED = ("policy logprobs", 1.0)


def test_the_reference_is_one_batch_ahead(tmp_path: Path) -> None:
    stage = Stage(tmp_path, settings(), held_out=False)
    learner = stage.train()
    asked = ("reference", 4)
    # The second batch is asked for before the first is learnt from; nothing is asked for after the last.
    assert stage.events == [asked, asked, UPDATES[0], asked, UPDATES[1], UPDATES[2]]
    # The third batch is the first one of the second pass.
    assert learner.batch.pairs.ids == [0, 1]
    wanted = answer_sums(learner.batch.pairs.chosen)
    assert torch.equal(learner.batch.reference_chosen, wanted)
    assert not torch.equal(learner.batch.reference_rejected, wanted)


def test_evaluations_ask_for_the_held_out_pairs_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path, settings())
    stage.train()
    assert [event for event in stage.events if event in (("reference", 6), JUDGED)] == [("reference", 6), *[JUDGED] * 3]
    rows = read_metrics(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    assert ["evaluation/loss" in row for row in rows] == [True, False, True, True]
    assert rows[1]["policy/tokens"] == 2 * (4 + 5)
    assert {role: rows[1][f"{role}/peak_memory_gib"] for role in ("policy", "reference")} == {
        "policy": 1.5,
        "reference": 0.5,
    }


def test_metrics_by_hand(tmp_path: Path) -> None:
    """The policy gives each token -1: chosen answers -2, rejected ones -3."""
    stage = Stage(tmp_path, settings())
    stage.train()
    row = read_metrics(tmp_path / "run")[0]
    tokenizer = byte_tokenizer()
    ids = {text: tokenizer(text)["input_ids"][0] for text in "bFGH"}
    end = tokenizer.eos_token_id
    chosen = [0.5 * (-2 + (ids[c] + end) / 100) for c in "FGH"]
    rejected = [0.5 * (-3 + (ids["b"] + ids[c] + end) / 100) for c in "FGH"]
    margins = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
    expected = {
        "loss": sum(log(1 + exp(-margin)) for margin in margins) / 3,
        "accuracy": sum(margin > 0 for margin in margins) / 3,
        "accuracy_chosen_shorter": sum(margin > 0 for margin in margins) / 3,
        "margin": sum(margins) / 3,
        "chosen_reward": sum(chosen) / 3,
        "rejected_reward": sum(rejected) / 3,
        "chosen_logprob": -2.0,
        "rejected_logprob": -3.0,
    }
    for name, value in expected.items():
        assert row[f"evaluation/{name}"] == pytest.approx(value, rel=1e-5), name
    found = {name.removeprefix("evaluation/") for name in row if name.startswith("evaluation/")}
    # No chosen answer is the longer one here.
    assert found == set(DPO_METRICS) - {"accuracy_chosen_longer"}
    kept = tmp_path / "run/dpo/evaluation"
    assert sorted(path.name for path in kept.iterdir()) == [f"preferences_00000{step}.json" for step in (0, 2, 3)]
    report = json.loads((kept / "preferences_000000.json").read_text())
    assert {f"evaluation/{name}": value for name, value in report["metrics"].items()} == {
        name: row[name] for name in row if name.startswith("evaluation/")
    }
    assert [(part["low"], part["high"], part["pairs"]) for part in report["by_length"]] == [(-1, -1, 3)]
    assert sum(part["pairs"] for part in report["margins"]) == 3


def test_what_was_asked_once_is_found(tmp_path: Path) -> None:
    stage = Stage(tmp_path, settings())
    plain = stage.train(run="plain")
    with stage.cache() as cache:
        assert unknown_answers(stage.config, cache, stage.pairs, stage.held_out, steps=3) == (14, 14)
        stage.events.clear()
        first = stage.train(cache=cache, run="first")
    # Two batches and the held-out pairs; the third step's batch is the first one again.
    assert [event for event in stage.events if event[0] == "reference"] == [("reference", 6)] + [("reference", 4)] * 2

    later = Stage(tmp_path, settings(loss={"beta": 0.1}), reference=False)
    with later.cache() as cache:
        assert unknown_answers(later.config, cache, later.pairs, later.held_out, steps=3) == (0, 14)
        found = later.train(cache=cache, run="later")
    for learner in (first, found):
        assert torch.equal(learner.batch.reference_chosen, plain.batch.reference_chosen)
        assert torch.equal(learner.batch.reference_rejected, plain.batch.reference_rejected)
    assert later.messages == []


def test_only_the_pairs_of_the_steps_count(tmp_path: Path) -> None:
    stage = Stage(tmp_path, settings())
    with stage.cache() as cache:
        assert unknown_answers(stage.config, cache, stage.pairs, None, steps=1) == (4, 4)
        groups = DpoGroups(None, stage.group(FakeReference([]), "reference"), {})  # type: ignore[arg-type]
        References(groups, cache, needed=True).ask(stage.pairs.batch(0, 2)).result()
        assert unknown_answers(stage.config, cache, stage.pairs, None, steps=1) == (0, 4)
        assert unknown_answers(stage.config, cache, stage.pairs, None, steps=9) == (4, 8)


def test_an_answer_that_comes_twice_is_asked_for_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path, settings())
    events: Events = []
    groups = DpoGroups(None, stage.group(FakeReference(events), "reference"), {})  # type: ignore[arg-type]
    with stage.cache() as cache:
        found = References(groups, cache, needed=True).ask(stage.pairs.select([1, 1, 1])).result()
    assert events == [("reference", 2)]
    assert len(set(found.reference_chosen.tolist())) == 1


@pytest.mark.parametrize("cached", [False, True])
def test_without_a_reference_of_its_own_the_policy_answers(tmp_path: Path, cached: bool) -> None:
    asked = Stage(tmp_path, settings()).train(run="separate")
    stage = Stage(tmp_path, settings(), reference=False)
    with stage.cache() as cache:
        learner = stage.train(cache=cache if cached else None)
        assert unknown_answers(stage.config, cache, stage.pairs, stage.held_out, steps=3) == (14 * (not cached), 14)
    answers = [event for event in stage.events if event[0] == "policy reference_answer_logprobs"]
    # The third step's batch is the first one again.
    wanted = (6, 4, 4) if cached else (6, 4, 4, 4)
    assert answers == [("policy reference_answer_logprobs", number) for number in wanted]
    assert torch.equal(learner.batch.reference_chosen, asked.batch.reference_chosen)
    assert torch.equal(learner.batch.reference_rejected, asked.batch.reference_rejected)


@pytest.mark.parametrize("kind", ["simpo", "orpo"])
def test_a_loss_without_a_reference_asks_nobody(tmp_path: Path, kind: str) -> None:
    stage = Stage(tmp_path, settings(loss={"kind": kind}), reference=False)
    learner = stage.train()
    assert {event[0] for event in stage.events} == {"policy logprobs", "policy update"}
    assert not learner.batch.reference_chosen.any()
    assert read_metrics(tmp_path / "run")[0]["evaluation/chosen_logprob"] == -2


def test_a_resumed_stage_goes_on_with_the_right_batch(tmp_path: Path) -> None:
    config = settings()
    with pytest.raises(RuntimeError, match="update 2"):
        Stage(tmp_path, config, held_out=False).train(fails_at=2)
    stage = Stage(tmp_path, config, held_out=False)
    learner = stage.train()
    assert stage.events == [("reference", 4), ("reference", 4), *UPDATES[1:]]
    assert learner.weights == 3


def test_samples_are_drawn_from_synced_weights_and_compared_with_the_reference(tmp_path: Path) -> None:
    config = settings(
        generator={},
        reward=[{"kind": "function", "function": "a:b", "weight": 2.0}],
        evaluation={"every": 0, "temperature": 0.5, "max_new_tokens": 9, "prompts": 2},
    )
    stage = Stage(tmp_path, config)
    generator = FakeGenerator(stage.events)
    assert stage.held_out is not None
    prompts = stage.held_out.prompts(2, byte_tokenizer())
    assert prompts.ids == [0]
    weights: Any = FakeSync(stage.events, generator)
    stage.samples = Samples(stage.group(generator, "generator"), weights, GpuTurns(), prompts)
    stage.scorers = {"function": stage.group(FakeScorer(1.0), "reward/function")}
    stage.train()
    sampled = [("generate", 0, [0]), ("policy logprobs", 0.5), ("reference logprobs", 0.5)]
    around = [event for event in stage.events if event[0] not in ("reference", "policy update")]
    assert around == [JUDGED, ("sync", 0), *sampled, JUDGED, ("sync", 3), *sampled]
    assert generator.sampling == schema.Sampling(temperature=0.5, max_new_tokens=9)
    rows = read_metrics(tmp_path / "run")
    assert "evaluation/reward_mean" not in rows[1]
    assert [row["evaluation/reward_mean"] for row in (rows[0], rows[3])] == [2.0, 2 * 301.0]
    # Two tokens of -1 against -1.25: k1 is 0.25 each, k3 exp(-0.25) - 1 + 0.25 each.
    assert rows[0]["evaluation/kl_k1"] == pytest.approx(0.5)
    assert rows[0]["evaluation/kl_k3"] == pytest.approx(2 * (exp(-0.25) - 0.75), rel=1e-5)
    assert rows[0]["evaluation/length_mean"] == 2
    assert rows[3]["sync/bytes"] == 8
    peaks = {"policy": 1.5, "reference": 0.5, "generator": 2.5, "reward/function": 0.25}
    assert {role: rows[1][f"{role}/peak_memory_gib"] for role in peaks} == peaks
    written = read_rollouts(tmp_path / "run/dpo/evaluation/iteration_000003.parquet")
    assert written.kl.tolist() == [0.5]
    assert written.scores.tolist() == [2 * 301.0]


def test_samples_are_compared_with_the_policy_without_its_adapter(tmp_path: Path) -> None:
    stage = Stage(tmp_path, settings(generator={}), reference=False)
    assert stage.held_out is not None
    generator = FakeGenerator(stage.events)
    weights: Any = FakeSync(stage.events, generator)
    prompts = stage.held_out.prompts(2, byte_tokenizer())
    stage.samples = Samples(stage.group(generator, "generator"), weights, GpuTurns(), prompts)
    stage.train()
    assert ("policy reference_logprobs", 1.0) in stage.events
    row = read_metrics(tmp_path / "run")[-1]
    assert row["evaluation/kl_k1"] == pytest.approx(0.5)
    assert "reference/peak_memory_gib" not in row


def test_samples_without_scorers_and_reference(tmp_path: Path) -> None:
    stage = Stage(tmp_path, settings(generator={}, loss={"kind": "simpo"}), reference=False)
    generator = FakeGenerator(stage.events)
    assert stage.held_out is not None
    weights: Any = FakeSync(stage.events, generator)
    prompts = stage.held_out.prompts(2, byte_tokenizer())
    stage.samples = Samples(stage.group(generator, "generator"), weights, GpuTurns(), prompts)
    stage.train()
    row = read_metrics(tmp_path / "run")[-1]
    assert not {"evaluation/reward_mean", "evaluation/kl_k1"} & set(row)
    assert row["evaluation/finished_share"] == 1
    written = read_rollouts(tmp_path / "run/dpo/evaluation/iteration_000003.parquet")
    assert written.scores.isnan().all()
    assert written.kl.isnan().all()


def test_both_answers_of_every_pair_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_ray.trainers.dpo.SCORED_AT_ONCE", 3)
    config = settings(
        reward=[
            {"kind": "function", "function": "a:b", "name": "one", "weight": 2.0},
            {"kind": "function", "function": "a:c", "name": "two"},
        ]
    )
    stage = Stage(tmp_path, config)
    scorers = {name: stage.group(FakeScorer(first), name) for name, first in (("one", 0.0), ("two", 10.0))}
    found = score_pairs(config, scorers, stage.pairs, byte_tokenizer())
    # Chosen answers of three pairs, then their rejected ones, are rows 0 to 5; then one pair more.
    assert found.chosen.tolist() == [10.0, 13.0, 16.0, 10.0]
    assert found.rejected.tolist() == [19.0, 22.0, 25.0, 13.0]


def test_what_the_scores_did_is_recorded_before_the_first_step(tmp_path: Path) -> None:
    reward = [{"kind": "function", "function": "a:b"}]
    stage = Stage(tmp_path, settings(reward=reward, pairs={"relabel": True, "min_margin": 1}), held_out=False)
    scores = PairScores(torch.tensor([2.0, 0.0, 0.5, 0.0]), torch.tensor([0.0, 3.0, 0.0, 1.0]))
    data = schema.PreferenceData(train="x.jsonl", shuffle=False)
    stage.pairs = choose_pairs(data, stage.pairs, scores, stage.config.pairs, seed=1)
    stage.train()
    before, *later = read_metrics(tmp_path / "run")
    assert before["iteration"] == 0
    counts = {"data/pairs_used": 3, "data/pairs_exchanged": 2, "data/pairs_dropped": 1}
    assert {name: value for name, value in before.items() if name.startswith("data/")} == counts
    assert not any(name.startswith("data/") for row in later for name in row)


@pytest.mark.parametrize(
    ("loss", "expected", "nll"),
    [
        ({"beta": 0.3, "label_smoothing": 0.1}, DpoLoss(0.3, 0.1), None),
        ({"kind": "ipo", "beta": 0.3, "nll_coefficient": 0.2}, IpoLoss(0.3), ChosenLoss(0.2)),
        ({"kind": "simpo", "beta": 2, "gamma": 1}, SimpoLoss(2, 1), None),
        ({"kind": "orpo", "odds_coefficient": 0.4}, OrpoLoss(0.4), None),
    ],
)
def test_the_objective_of_the_settings(loss: dict[str, Any], expected: Any, nll: Any) -> None:
    objective = preference_objective(schema.PreferenceLoss.model_validate(loss))
    assert objective.loss == expected
    assert objective.nll == nll
