"""The PPO loop: experience from numbers worked by hand, and the order of what happens, on workers in this process."""

from __future__ import annotations

from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.kl import AdaptiveKlController, FixedKlController
from rlhf_ray.config import schema
from rlhf_ray.data.batches import Experience, Rollouts, one_version
from rlhf_ray.distributed.groups import LocalGroup
from rlhf_ray.distributed.tracing import Recorder
from rlhf_ray.trainers.journal import read_rollouts
from rlhf_ray.trainers.metric_rows import read_metrics
from rlhf_ray.trainers.ppo import (
    PpoGroups,
    Summary,
    describe,
    evaluate,
    gather_judgements,
    judge,
    make_experience,
    train_ppo,
    update,
)
from rlhf_ray.trainers.run import RunFolder
from rlhf_ray.trainers.sampling import Piece, SampleStream, chunk_sizes, generators_together
from rlhf_ray.trainers.turns import GpuTurns
from rlhf_ray.workers.generator import Finished
from rlhf_ray.workers.learner import Values
from rlhf_ray.workers.objectives import JointObjective, PolicyObjective, ValueObjective
from tests.unit.trainers.fake_workers import (
    Events,
    FakeLearner,
    FakeParts,
    FakePrompts,
    FakeSync,
    make_rollouts,
    no_wishes,
    ppo_groups,
    ppo_settings,
    stage_run,
)


def rows(*values: list[float], width: int = 5) -> Tensor:
    """Numbers of response tokens, which start at index 2, in rows [B, width]; 0 elsewhere."""
    return torch.tensor([[0.0, 0.0, *row, *[0.0] * (width - 2 - len(row))] for row in values])


def close(found: Tensor, *values: list[float]) -> None:
    torch.testing.assert_close(found, rows(*values, width=found.shape[1]), rtol=1e-5, atol=1e-6)


def no_values(rollouts: Rollouts) -> Values:
    zeros = torch.zeros(rollouts.sequences.tokens.shape)
    return Values(zeros, zeros[:, 0])


# Two responses, of 3 tokens and of 2 tokens; the second was cut by the length limit.
TWO = make_rollouts([3, 2], finished=[True, False])
SCORES = torch.tensor([2.0, -3.0])
OLD = rows([-1.0, -2.0, -3.0], [-1.0, -2.0])
# log pi - log pi_ref is 0.5, -0.25, 0.25 and 1, 0.5: 0.5 and 1.5 nats per sequence.
REFERENCE = rows([-1.5, -1.75, -3.25], [-2.0, -2.5])
VALUES = Values(rows([0.5, 1.0, 1.5], [0.25, 0.75]), torch.tensor([7.0, 2.0]))


def experience_of_two(*, coefficient: float = 0.1, **changes: Any) -> tuple[Experience, Summary]:
    advantages = {"lam": 0.5, "whiten": False} | changes.pop("advantages", {})
    config = ppo_settings(advantages=advantages, **changes)
    return make_experience(config, TWO, SCORES, REFERENCE, OLD, VALUES, coefficient)


def test_kl_stands_in_the_rewards_and_the_score_on_the_last_token() -> None:
    """Rewards -0.05, 0.025, 2 - 0.025 and -0.1, -3 - 0.05; GAE with lambda 0.5 backwards over them.

    delta = 0.45, 0.525, 0.475 and 0.4, -3.8; A_t = delta_t + A_(t+1) / 2.
    """
    experience, summary = experience_of_two()
    close(experience.advantages, [0.83125, 0.7625, 0.475], [-1.5, -3.8])
    close(experience.returns, [1.33125, 1.7625, 1.975], [-1.25, -3.05])
    torch.testing.assert_close(summary.kl_per_sequence, torch.tensor([0.5, 1.5]))
    assert summary.metrics == {
        "correction/weight_mean": 1.0,
        "correction/capped_share": 0.0,
        "reward/shaped_mean": -0.5,
    }
    assert experience.sequences is TWO.sequences
    assert experience.old_logprobs is OLD
    assert experience.reference_logprobs is REFERENCE
    assert experience.values is VALUES.values


def test_the_estimator_of_the_kl_in_the_rewards() -> None:
    """With k2 = d^2 / 2 and coefficient 0.8 the rewards are -0.1, -0.025, 2 - 0.025; with lambda 1 the rest's sum."""
    experience, _ = experience_of_two(coefficient=0.8, kl={"estimator": "k2"}, advantages={"lam": 1.0})
    close(experience.returns, [1.85, 1.95, 1.975], [-3.5, -3.1])


@pytest.mark.parametrize("kl", [{"place": "loss"}, {"place": "off"}], ids=["in the loss", "off"])
def test_rewards_without_kl(kl: dict[str, str]) -> None:
    experience, summary = experience_of_two(kl=kl, advantages={"lam": 1.0})
    close(experience.returns, [2.0, 2.0, 2.0], [-3.0, -3.0])
    close(experience.advantages, [1.5, 1.0, 0.5], [-3.25, -3.75])
    if kl["place"] == "off":
        assert summary.kl_per_sequence is None
    else:
        torch.testing.assert_close(summary.kl_per_sequence, torch.tensor([0.5, 1.5]))


@pytest.mark.parametrize(
    ("settings", "shaped"),
    [
        ({"clip": 1.0}, (1.0, -1.0)),
        ({"clip": 0.0}, (20.0, -3.0)),
        ({}, (10.0, -3.0)),
        ({"clip": 1.0, "missing_eos_penalty": 0.5}, (1.0, -1.5)),
    ],
    ids=["clipped at 1", "unclipped", "clipped at 10 by default", "penalty after the clip, for the cut row"],
)
def test_scores_are_clipped_and_penalised(settings: dict[str, float], shaped: tuple[float, float]) -> None:
    config = ppo_settings(scores=settings, kl={"place": "off"}, advantages={"lam": 1.0, "whiten": False})
    experience, summary = make_experience(config, TWO, torch.tensor([20.0, -3.0]), OLD, OLD, VALUES, 0.1)
    close(experience.returns, [shaped[0]] * 3, [shaped[1]] * 2)
    assert summary.metrics["reward/shaped_mean"] == pytest.approx(sum(shaped) / 2)


def test_the_value_after_a_cut_response_is_bootstrapped_where_asked() -> None:
    """Row 2: delta = 0.4, -3.05 + 2 - 0.75 = -1.8. Row 1 has ended: its final value of 7 is not read."""
    experience, _ = experience_of_two(advantages={"bootstrap_truncated": True})
    close(experience.advantages, [0.83125, 0.7625, 0.475], [-0.5, -1.8])


# Two samples of each of two prompts; lengths 2, 2, 1, 1.
FOUR = make_rollouts([2, 2, 1, 1], ids=[5, 5, 6, 6])
FOUR_SCORES = torch.tensor([3.0, 1.0, 0.0, 4.0])
FOUR_OLD = rows([-1.0, -1.0], [-1.0, -1.0], [-1.0], [-1.0], width=4)
# 1, 0, 0 and 2 nats per sequence.
FOUR_REFERENCE = rows([-1.25, -1.75], [-0.5, -1.5], [-1.0], [-3.0], width=4)


@pytest.mark.parametrize(
    ("estimator", "advantages"),
    [
        # With coefficient 0.5 the sums of token rewards are 2.5, 1 | 0, 3.
        ({"estimator": "leave_one_out"}, (1.5, -1.5, -3.0, 3.0)),
        ({"estimator": "group_relative", "divide_by_std": False}, (0.75, -0.75, -1.5, 1.5)),
        # Over the standard deviations 0.75 * sqrt(2) and 1.5 * sqrt(2).
        ({"estimator": "group_relative"}, (sqrt(0.5), -sqrt(0.5), -sqrt(0.5), sqrt(0.5))),
        # KL is a loss here, so the scores alone count: 1, -1 | -2, 2, over a root of (4 * 1 + 2 * 4) / 6 tokens.
        ({"estimator": "reinforce_baseline"}, (sqrt(0.5), -sqrt(0.5), -sqrt(2.0), sqrt(2.0))),
        ({"estimator": "reinforce_baseline", "whiten": False}, (1.0, -1.0, -2.0, 2.0)),
        # (2 * 2.25 * 2 + 2 * 9) / 6 = 4.5
        (
            {"estimator": "leave_one_out", "whiten": True},
            (1.5 / sqrt(4.5), -1.5 / sqrt(4.5), -3.0 / sqrt(4.5), 3.0 / sqrt(4.5)),
        ),
    ],
    ids=["leave_one_out", "Dr. GRPO", "group_relative", "reinforce_baseline", "unwhitened", "whitened leave_one_out"],
)
def test_estimators_of_a_group(estimator: dict[str, Any], advantages: tuple[float, ...]) -> None:
    config = ppo_settings(advantages=estimator, sampling={"samples_per_prompt": 2})
    experience, summary = make_experience(
        config, FOUR, FOUR_SCORES, FOUR_REFERENCE, FOUR_OLD, no_values(FOUR), coefficient=0.5
    )
    first, second, third, fourth = advantages
    close(experience.advantages, [first] * 2, [second] * 2, [third], [fourth])
    assert not experience.returns.any()
    torch.testing.assert_close(summary.kl_per_sequence, torch.tensor([1.0, 0.0, 0.0, 2.0]))


def test_gae_is_whitened_over_all_tokens_by_default() -> None:
    """Advantages 1, 1, 4 with mean 2 and variance 2; returns are those before whitening."""
    rollouts = make_rollouts([2, 1])
    config = ppo_settings(kl={"place": "off"}, advantages={"lam": 1.0})
    zeros = torch.zeros(2, 4)
    experience, _ = make_experience(
        config, rollouts, torch.tensor([1.0, 4.0]), zeros, zeros, no_values(rollouts), coefficient=0.1
    )
    close(experience.advantages, [-sqrt(0.5), -sqrt(0.5)], [sqrt(2.0)])
    close(experience.returns, [1.0, 1.0], [4.0])


def corrected(**changes: Any) -> tuple[Experience, Summary]:
    """The learner is 4, 1.5, 1 and 1, 0.5 times as sure of the tokens as the generator was."""
    ratios = rows([log(4.0), log(1.5), 0.0], [0.0, log(0.5)])
    rollouts = Rollouts(
        sequences=TWO.sequences,
        generator_logprobs=OLD - ratios,
        finished=TWO.finished,
        prompts=TWO.prompts,
        responses=TWO.responses,
        answers=TWO.answers,
        prompt_ids=TWO.prompt_ids,
        policy_versions=one_version(TWO.sequences, 0),
    )
    config = ppo_settings(**changes)
    return make_experience(config, rollouts, SCORES, REFERENCE, OLD, VALUES, coefficient=0.1)


@pytest.mark.parametrize(
    "changes", [{"correction": {"mode": "on"}}, {"generator": {"dtype": "bfloat16"}}, {"staleness": 1}]
)
def test_correction_weights_are_capped(changes: dict[str, Any]) -> None:
    experience, summary = corrected(**changes)
    expected = torch.tensor([[1.0, 1.0, 2.0, 1.5, 1.0], [1.0, 1.0, 1.0, 0.5, 1.0]])
    torch.testing.assert_close(experience.correction, expected)
    assert summary.metrics["correction/weight_mean"] == pytest.approx(6.0 / 5)
    assert summary.metrics["correction/capped_share"] == pytest.approx(1 / 5)


def test_the_cap_of_correction_weights() -> None:
    experience, summary = corrected(correction={"mode": "on", "cap": 1.25})
    torch.testing.assert_close(experience.correction[0], torch.tensor([1.0, 1.0, 1.25, 1.25, 1.0]))
    assert summary.metrics["correction/capped_share"] == pytest.approx(2 / 5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"correction": {"mode": "off"}, "generator": {"dtype": "bfloat16"}},
        {"correction": {"mode": "on"}, "old_logprobs": "generator"},
    ],
    ids=["float32", "switched off", "the generator's own are the old ones"],
)
def test_no_correction(changes: dict[str, Any]) -> None:
    experience, summary = corrected(**changes)
    torch.testing.assert_close(experience.correction, torch.ones(2, 5))
    assert summary.metrics["correction/weight_mean"] == 1.0
    assert summary.metrics["correction/capped_share"] == 0.0


# ------------------------------------------------------------------------------------ judgements


def judgements(config: schema.Ppo, groups: PpoGroups, rollouts: Rollouts) -> tuple[Any, ...]:
    """What is said of samples that come in one piece."""
    return gather_judgements(groups, [judge(config, groups, Piece(torch.arange(len(rollouts)), rollouts))])


def test_judgements_of_all_networks() -> None:
    events: Events = []
    groups = ppo_groups(events, critic=FakeLearner(events, "critic"), scores={"wit": 1.0, "length": -2.0})
    config = ppo_settings(sampling={"temperature": 0.5})
    rollouts, parts, reference, old, values = judgements(config, groups, TWO)
    assert rollouts.responses == TWO.responses
    assert {name: part.tolist() for name, part in parts.items()} == {"wit": [1.0, 2.0], "length": [-2.0, -1.0]}
    close(reference, [-1.25] * 3, [-1.25] * 2)
    close(old, [-1.0] * 3, [-1.0] * 2)
    close(values.values, [0.5] * 3, [0.5] * 2)
    assert values.final.tolist() == [1.0, 2.0]
    # The learners know their temperature, the reference is told.
    assert events == [("reference logprobs", 0.5), ("policy logprobs", None), ("critic values",)]


def test_the_generators_own_logprobs_spare_the_learners_pass() -> None:
    events: Events = []
    groups = ppo_groups(events)
    rollouts = make_rollouts([3, 2])
    rollouts.generator_logprobs[:] = -7.0
    found, _, reference, old, values = judgements(ppo_settings(old_logprobs="generator"), groups, rollouts)
    assert old is found.generator_logprobs
    assert torch.equal(old, rollouts.generator_logprobs)
    close(reference, [-1.25] * 3, [-1.25] * 2)
    assert events == [("reference logprobs", 1.0)]
    assert not values.values.any()
    assert values.final.tolist() == [0.0, 0.0]


def test_without_a_reference_the_old_policy_is_the_reference() -> None:
    events: Events = []
    config, groups = ppo_settings(kl={"place": "off"}), ppo_groups(events, reference=False)
    *_, reference, old, _ = judgements(config, groups, TWO)
    assert reference is old
    assert events == [("policy logprobs", None)]


def test_the_policy_without_its_adapter_is_the_reference() -> None:
    events: Events = []
    config = ppo_settings(policy={"model": "org/base", "lora": {}}, sampling={"temperature": 0.5})
    *_, reference, old, _ = judgements(config, ppo_groups(events, reference=False), TWO)
    close(reference, [-1.25] * 3, [-1.25] * 2)
    close(old, [-1.0] * 3, [-1.0] * 2)
    assert events == [("policy reference_logprobs", 0.5), ("policy logprobs", None)]


def test_pieces_are_put_together_in_the_order_of_the_rows() -> None:
    """Rows 3 and 1 finish first: whatever is said of them ends in places 3 and 1, padded to the longest row."""
    events: Events = []
    groups = ppo_groups(events, critic=FakeLearner(events, "critic"))
    rollouts = make_rollouts([1, 2, 3, 4], ids=[5, 6, 7, 8])
    pieces = [
        Piece(torch.tensor([1, 3]), rollouts.select([1, 3])),
        Piece(torch.tensor([0, 2]), Rollouts.concat([make_rollouts([1], ids=[5]), make_rollouts([3], ids=[7])])),
    ]
    asked = [judge(ppo_settings(), groups, piece) for piece in pieces]
    assert [name for name, *_ in events] == ["reference logprobs", "policy logprobs", "critic values"] * 2
    found, parts, reference, old, values = gather_judgements(groups, asked)
    assert found.prompt_ids.tolist() == [5, 6, 7, 8]
    assert torch.equal(found.sequences.tokens, rollouts.sequences.tokens)
    # The fakes count from the first row of each piece.
    assert parts["function"].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert values.final.tolist() == [1.0, 1.0, 2.0, 2.0]
    for tensor, value in ((reference, -1.25), (old, -1.0), (values.values, 0.5)):
        close(tensor, *([value] * length for length in (1, 2, 3, 4)))


def test_a_value_head_is_asked_for_both() -> None:
    events: Events = []
    policy = FakeLearner(events)
    judgements(ppo_settings(), ppo_groups(events, policy=policy, critic=policy), TWO)
    assert events[1:] == [("policy logprobs", None), ("policy values",)]


# ---------------------------------------------------------------------------------------- update


def updated(iteration: int, *, value_head: bool = False, **changes: Any) -> tuple[dict[str, float], PpoGroups, Events]:
    config = ppo_settings(epochs=3, mini_batches=4, **changes)
    events: Events = []
    policy = FakeLearner(events)
    has_critic = config.critic_role is not None
    critic = policy if value_head else FakeLearner(events, "critic") if has_critic else None
    groups = ppo_groups(events, policy=policy, critic=critic)
    experience, _ = make_experience(ppo_settings(), TWO, SCORES, REFERENCE, OLD, VALUES, coefficient=0.1)
    metrics = update(config, groups, experience, coefficient=0.3, iteration=iteration)
    assert all(group.worker.batch in (experience, None) for group in (groups.policy, groups.critic) if group)  # type: ignore[attr-defined]
    return metrics, groups, events


def objective(group: Any) -> Any:
    return group.worker.objective


def test_policy_and_critic_learn() -> None:
    metrics, groups, events = updated(
        7,
        policy_loss={"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 3.0, "entropy_coefficient": 0.01},
        value_loss={"clip": 0.5},
    )
    assert events == [("policy update", 7, 3, 4), ("critic update", 7, 3, 4)]
    assert metrics == {
        "policy/loss": 1.0,
        "policy/grad_norm": 2.0,
        "critic/loss": 1.0,
        "critic/grad_norm": 2.0,
        # A step that either of them skipped counts.
        "guard/skipped_steps": 2.0,
    }
    policy, critic = objective(groups.policy), objective(groups.critic)
    assert isinstance(policy, PolicyObjective)
    loss = policy.loss
    assert (loss.clip_low, loss.clip_high, loss.dual_clip, loss.entropy_coefficient) == (0.1, 0.3, 3.0, 0.01)
    assert policy.kl is None
    assert isinstance(critic, ValueObjective)
    assert critic.loss.clip == 0.5


def test_the_warm_up_trains_the_critic_alone() -> None:
    settings = {"critic": {"warmup_iterations": 2}}
    for iteration in (1, 2):
        metrics, _, events = updated(iteration, **settings)
        assert events == [("critic update", iteration, 3, 4)]
        assert metrics == {"critic/loss": 1.0, "critic/grad_norm": 2.0, "guard/skipped_steps": 1.0}
    _, _, events = updated(3, **settings)
    assert [name for name, *_ in events] == ["policy update", "critic update"]


def test_a_value_head_learns_with_the_policy() -> None:
    metrics, groups, events = updated(
        1, value_head=True, critic={"kind": "value_head"}, value_loss={"coefficient": 0.25, "clip": 0.5}
    )
    assert events == [("policy update", 1, 3, 4)]
    joint = objective(groups.policy)
    assert isinstance(joint, JointObjective)
    assert (joint.coefficient, joint.value.loss.clip) == (0.25, 0.5)
    assert metrics == {"policy/loss": 1.0, "policy/grad_norm": 2.0, "guard/skipped_steps": 1.0}


def test_without_a_critic_the_kl_can_be_a_loss() -> None:
    metrics, groups, events = updated(
        1,
        advantages={"estimator": "reinforce_baseline"},
        sampling={"samples_per_prompt": 2},
        policy_loss={"aggregation": "sequence_mean"},
    )
    assert events == [("policy update", 1, 3, 4)]
    policy = objective(groups.policy)
    assert (policy.kl.estimator, policy.kl.coefficient, policy.kl.aggregation) == ("k2", 0.3, "sequence_mean")
    assert policy.unit == "sequence"
    assert "critic/loss" not in metrics


# ------------------------------------------------------------------------------------------ loop


class Stage:
    """A stage on fakes in a folder; every session is a process's worth of it, with workers of its own."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.config = ppo_settings(**changes)
        self.run_dir = folder / "run"
        self.events: Events = []
        self.policy = FakeLearner(self.events)

    def session(self, *, held_out: bool = True, fails_at: int | None = None, scales: bool = False) -> Events:
        """Runs to the end, or to the failure; what happened, with the loop's calls that let generators come and go."""
        self.events, recorder = [], Recorder()
        self.policy = FakeLearner(self.events, fails_at=fails_at)
        critic = FakeLearner(self.events, "critic")
        groups = ppo_groups(self.events, policy=self.policy, critic=critic, recorder=recorder)
        settings = self.config.kl
        kl = (
            AdaptiveKlController(settings.coefficient, target=settings.target, horizon=settings.horizon)
            if settings.target
            else FixedKlController(settings.coefficient)
        )
        fakes: Any = FakePrompts(), FakePrompts() if held_out else None
        samples = (NotedSamples if scales else SampleStream)(self.config, groups.generator, fakes[0])
        sync: Any = FakeSync(self.events, groups.generator.worker)  # type: ignore[attr-defined]
        resume = self.run_dir.exists()
        with RunFolder.open(self.run_dir) if resume else RunFolder.create(self.run_dir, {"config.yaml": ""}) as folder:
            with stage_run(folder, self.config, total=self.config.iterations, recorder=recorder) as run:
                run.start_or_resume(FakeParts(self.policy, kl, samples))
                scaling: Any = NotedScaling(self.events, groups) if scales else no_wishes(run, groups.generator)
                train_ppo(self.config, groups, samples, fakes[1], sync, GpuTurns(), kl, scaling, run)
        return self.events

    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.run_dir)


class NotedSamples(SampleStream):
    """Notes when it is waited for."""

    def wait(self) -> None:
        self._generator.worker.events.append(("wait",))  # type: ignore[attr-defined]
        super().wait()


class NotedScaling:
    """Notes its turns; from each on there is a generator more."""

    def __init__(self, events: Events, groups: PpoGroups) -> None:
        self.events = events
        self.group: Any = groups.generator

    def begin(self, iteration: int) -> None:
        self.events.append(("begin", iteration))

    def settle(self, samples: SampleStream, weights: Any) -> None:
        self.events.append(("settle",))
        self.group.size += 1


# What the networks are asked in every iteration.
JUDGED = [("reference logprobs", 1.0), ("policy logprobs", None), ("critic values",)]


def iteration_events(iteration: int, ids: list[int]) -> Events:
    checked = ("check rollouts", iteration - 1, -1.0)
    learnt = [(f"{role} update", iteration, 1, 1) for role in ("policy", "critic")]
    return [("generate", iteration, ids), *JUDGED, checked, *learnt, ("sync", iteration)]


EVALUATED = [("generate", 0, [90, 91, 92])]


def test_the_order_of_events(tmp_path: Path) -> None:
    """Weights are synced before anything is sampled and after every update."""
    stage = Stage(tmp_path)
    assert stage.session() == [
        ("sync", 0),
        *EVALUATED,
        *iteration_events(1, [0, 1]),
        *iteration_events(2, [2, 3]),
        *EVALUATED,
    ]
    rows = stage.metrics()
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    # Scores are 0, 1, ... plus 100 times the version that sampled.
    assert [row.get("evaluation/reward_mean") for row in rows] == [1.0, None, 201.0]
    assert [row["reward/mean"] for row in rows[1:]] == [0.5, 100.5]
    assert [row["generator/policy_version_lag"] for row in rows[1:]] == [0, 0]
    for row in rows[1:]:
        assert row["policy/loss"] == row["critic/loss"] == row["iteration"]
        assert row["kl/per_sequence"] == pytest.approx(0.5)
        assert row["kl/coefficient"] == 0.01
        assert row["generator/logprob_diff_mean"] == pytest.approx(0.25)
        assert row["sync/bytes"] == 8
        assert row["generator/workers"] == 1
        assert row["correction/weight_mean"] == 1
        peaks = {"policy": 1.5, "critic": 1.5, "reference": 0.5, "generator": 2.5, "reward/function": 0.25}
        assert {role: row[f"{role}/peak_memory_gib"] for role in peaks} == peaks
        assert row["reward/function_truncated"] == 3
        assert {"time/generate_s", "time/policy_update_s", "time/reward_function_score_s"} <= row.keys()
    folder = stage.run_dir / "ppo"
    kept = read_rollouts(folder / "rollouts/iteration_000002.parquet")
    assert kept.rollouts.prompt_ids.tolist() == [2, 3]
    assert kept.scores.tolist() == [100.0, 101.0]
    assert kept.parts["function"].tolist() == [100.0, 101.0]
    assert kept.kl.tolist() == pytest.approx([0.5, 0.5])
    assert read_rollouts(folder / "evaluation/iteration_000002.parquet").scores.tolist() == [200.0, 201.0, 202.0]
    assert sorted(path.name for path in (folder / "evaluation").iterdir()) == [
        "iteration_000000.parquet",
        "iteration_000002.parquet",
    ]


def test_generators_come_and_go_when_nothing_is_sampled(tmp_path: Path) -> None:
    """After the wait for what was asked of them, and before the sync, whose weights newcomers serve with."""
    stage = Stage(tmp_path, iterations=1)
    events = stage.session(held_out=False, scales=True)
    sampled, *rest, synced = iteration_events(1, [0, 1])
    assert events == [("sync", 0), ("begin", 1), sampled, *rest, ("wait",), ("settle",), synced]
    # The number is of those that sampled.
    assert [row["generator/workers"] for row in stage.metrics()] == [1]


def test_the_lag_is_that_of_the_oldest_sample() -> None:
    rollouts = Rollouts.concat([make_rollouts([2], version=2), make_rollouts([1, 1], version=0)])
    zeros = torch.zeros(rollouts.sequences.tokens.shape)
    experience = Experience(rollouts.sequences, *[zeros] * 6)
    assert describe(rollouts, torch.zeros(3), {}, experience, version=3)["generator/policy_version_lag"] == 3


def test_evaluations_fall_due(tmp_path: Path) -> None:
    stage = Stage(tmp_path, iterations=5, evaluation={"every": 2})
    events = stage.session()
    assert [row["iteration"] for row in stage.metrics() if "evaluation/reward_mean" in row] == [0, 2, 4, 5]
    # An evaluation reads the weights that its iteration ends with.
    where = [i for i, event in enumerate(events) if event == EVALUATED[0]]
    assert [events[i - 1] for i in where] == [("sync", 0), ("sync", 2), ("sync", 4), ("sync", 5)]


def test_nothing_is_evaluated_without_held_out_prompts(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    assert EVALUATED[0] not in stage.session(held_out=False)
    assert [row["iteration"] for row in stage.metrics()] == [1, 2]
    assert not any(name.startswith("evaluation/") for row in stage.metrics() for name in row)
    groups = ppo_groups([])
    run: Any = None
    assert evaluate(stage.config, groups, None, run, iteration=0) == {}


@pytest.mark.parametrize(
    ("changes", "absent", "attested"),
    [
        ({}, (), True),
        ({"kl": {"place": "off"}}, ("kl/",), True),
        # Then there is nothing to compare the generator's log-probabilities with.
        ({"old_logprobs": "generator"}, ("generator/logprob_diff",), False),
        ({"sampling": {"top_p": 0.9}}, (), False),
    ],
    ids=["all", "without KL", "the generator's log-probabilities", "filtered samples"],
)
def test_what_cannot_be_measured_is_not_reported(
    tmp_path: Path, changes: dict[str, Any], absent: tuple[str, ...], attested: bool
) -> None:
    stage = Stage(tmp_path, **changes)
    events = stage.session()
    row = stage.metrics()[1]
    for beginning in ("kl/", "generator/logprob_diff"):
        assert any(name.startswith(beginning) for name in row) == (beginning not in absent)
    assert any(name == "check rollouts" for name, *_ in events) == attested


ADAPTIVE = {"controller": "adaptive", "coefficient": 0.1, "target": 0.5 / 1.1, "horizon": 40.0}


def test_the_kl_coefficient_follows_the_mean_over_the_batch(tmp_path: Path) -> None:
    """KL is 0.5 a sequence, a tenth above the target; 4 samples of a horizon of 40: 1 + 0.1 * 4 / 40 = 1.01."""
    stage = Stage(tmp_path, iterations=3, prompts_per_iteration=4, kl=ADAPTIVE)
    stage.session()
    coefficients = [row["kl/coefficient"] for row in stage.metrics()[1:]]
    assert coefficients == pytest.approx([0.1, 0.101, 0.10201], rel=1e-5)


@pytest.mark.parametrize(("fails_at", "left"), [(3, [3, 4]), (4, [3, 4]), (1, [1, 2, 3, 4])])
def test_a_resumed_stage_goes_on_where_it_was_saved(tmp_path: Path, fails_at: int, left: list[int]) -> None:
    """Checkpoints after iterations 2 and 4; the prompts, the version and the KL coefficient follow."""
    changes: dict[str, Any] = {"iterations": 4, "checkpoints": {"every": 2}, "kl": ADAPTIVE}
    whole = Stage(tmp_path / "whole", **changes)
    whole.session()

    stage = Stage(tmp_path / "stopped", **changes)
    with pytest.raises(RuntimeError, match=f"update {fails_at}"):
        stage.session(fails_at=fails_at)
    assert stage.events[-1][0] == "check rollouts"
    # The samples are there though nothing was learnt from them.
    assert (stage.run_dir / f"ppo/rollouts/iteration_{fails_at:06}.parquet").exists()

    expected: Events = [("sync", left[0] - 1)]
    if left[0] == 1:
        expected += EVALUATED
    for iteration in left:
        expected += iteration_events(iteration, [2 * iteration - 2, 2 * iteration - 1])
    assert stage.session() == [*expected, *EVALUATED]
    assert stage.policy.weights == 4
    assert [row["iteration"] for row in stage.metrics()] == [0, 1, 2, 3, 4]
    names = ("kl/coefficient", "reward/mean", "policy/loss", "evaluation/reward_mean")
    for mine, other in zip(stage.metrics(), whole.metrics(), strict=True):
        assert [mine.get(name) for name in names] == [other.get(name) for name in names]


def test_a_batch_is_judged_while_others_are_sampled(tmp_path: Path) -> None:
    stage = Stage(tmp_path, iterations=1, prompts_per_iteration=5, chunk_samples=2)
    events = stage.session(held_out=False)
    assert events[2:-4] == JUDGED * 3
    kept = read_rollouts(stage.run_dir / "ppo/rollouts/iteration_000001.parquet")
    assert kept.rollouts.prompt_ids.tolist() == [0, 1, 2, 3, 4]
    # Rows 4 and 3 finish first, row 0 alone at the end; a piece's scores count from its first row.
    assert kept.scores.tolist() == [0.0, 0.0, 1.0, 0.0, 1.0]


def stale_events(iteration: int, *, staleness: int, total: int) -> Events:
    """An iteration of a stage that samples ahead: the next batch is started before this one is judged."""
    version = max(iteration - 1 - staleness, 0)
    events = list(iteration_events(iteration, []))[1:]
    where = next(index for index, event in enumerate(events) if event[0] == "check rollouts")
    events[where] = ("check rollouts", version, -1.0)
    ahead = range(1, 2 + staleness) if iteration == 1 else range(iteration + staleness, iteration + staleness + 1)
    started = [("generate", number, [2 * number - 2, 2 * number - 1]) for number in ahead if number <= total]
    return [*started, *events]


@pytest.mark.parametrize("staleness", [1, 2])
def test_sampling_runs_ahead(tmp_path: Path, staleness: int) -> None:
    """Batch k is sampled with the weights of version k - 1 - staleness, and evaluations read the newest ones."""
    stage = Stage(tmp_path, iterations=4, staleness=staleness)
    expected: Events = [("sync", 0), *EVALUATED]
    for iteration in (1, 2, 3, 4):
        expected += stale_events(iteration, staleness=staleness, total=4)
    assert stage.session() == [*expected, *EVALUATED]
    rows = stage.metrics()
    assert [row["generator/policy_version_lag"] for row in rows[1:]] == [0, 1, staleness, staleness]
    # Samples of other weights than the learner's cannot be compared with it.
    assert [row["generator/attested_share"] for row in rows[1:]] == [1, 0, 0, 0]
    assert ["generator/logprob_diff_mean" in row for row in rows[1:]] == [True, False, False, False]
    assert [row["reward/mean"] for row in rows[1:]] == [0.5 + 100 * max(k - 1 - staleness, 0) for k in (1, 2, 3, 4)]
    # exp(-1 + 0.75), which is below the cap.
    assert rows[4]["correction/weight_mean"] == pytest.approx(exp(-0.25))
    assert rows[4]["evaluation/reward_mean"] == 401.0


def test_responses_outlive_a_change_of_the_weights(tmp_path: Path) -> None:
    """Of the 6 responses of the batch ahead 5 are finished before a sync; the last token of the other one is newer."""
    stage = Stage(tmp_path, iterations=3, prompts_per_iteration=6, staleness=1, interrupted="keep")
    events = stage.session(held_out=False)
    syncs = [event for event in events if event[0] == "sync"]
    assert syncs == [("sync", 0), ("sync", 1, "keep", 1), ("sync", 2, "keep", 1), ("sync", 3)]
    started = [event for event in events if event[0] in ("generate", "policy update", "reference logprobs")]
    # A batch is judged in two pieces: what was finished before the sync, and the row that was late.
    judged = [("reference logprobs", 1.0)] * 2
    learnt = [("policy update", k, 1, 1) for k in (1, 2, 3)]
    one, two, three = (("generate", k, list(range(6 * k - 6, 6 * k))) for k in (1, 2, 3))
    assert started == [one, two, *judged, learnt[0], three, *judged, learnt[1], *judged, learnt[2]]
    kept = read_rollouts(stage.run_dir / "ppo/rollouts/iteration_000003.parquet").rollouts
    assert kept.prompt_ids.tolist() == list(range(12, 18))
    # Rows finish from the last to the first; index 2 and 3 are the response's.
    assert kept.policy_versions[:, 2:].tolist() == [[1, 2], *[[1, 1]] * 5]
    assert [row["generator/policy_version_lag"] for row in stage.metrics()] == [0, 1, 1]
    assert ["generator/logprob_diff_mean" in row for row in stage.metrics()] == [True, True, True]


class ManyGenerators:
    """Eight generators of 32 samples each, in two chunks; they answer at once, in an order of their own."""

    size = 8

    def __init__(self) -> None:
        self.given = [0] * self.size

    def split(self, *args: Any, **kwargs: Any) -> Any:
        return LocalGroup(Finishes()).first(Finishes.nothing)

    def one(self, rank: int, method: Any, *, iteration: int, count: int, part: int = 0) -> Any:
        places = [place for place in range(31, -1, -1) if place % 2 == self.given[rank]]
        self.given[rank] += 1
        found = make_rollouts([1 + self.given[rank]] * count, ids=[32 * rank + place for place in places])
        return LocalGroup(Finishes(torch.tensor(places), found)).first(Finishes.finished)


class Finishes:
    """Gives what it was made with."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def finished(self) -> Finished:
        return Finished(*self.parts)

    def nothing(self) -> None: ...


def test_the_chunks_of_many_generators_are_judged_together() -> None:
    """Two generators' at a time; a piece has the chunks of one number, and its rows in order."""
    config = ppo_settings(prompts_per_iteration=256)
    generators: Any = ManyGenerators()
    pieces = list(SampleStream(config, generators, FakePrompts()).pieces(1))
    assert [len(piece.rows) for piece in pieces] == [32] * 8
    assert sorted(row for piece in pieces for row in piece.rows.tolist()) == list(range(256))
    for piece in pieces:
        assert piece.rows.tolist() == sorted(piece.rows.tolist())
        assert piece.rollouts.prompt_ids.tolist() == piece.rows.tolist()
        assert piece.rows[-1] - piece.rows[0] == 62
    lengths = [piece.rollouts.sequences.tokens.shape[1] for piece in pieces]
    assert sorted(lengths) == [4] * 4 + [5] * 4


@pytest.mark.parametrize(
    ("generators", "changes", "together"),
    [(1, {}, 1), (4, {}, 1), (5, {}, 2), (64, {}, 16), (64, {"chunk_samples": 16}, 1)],
)
def test_of_how_many_generators(generators: int, changes: dict[str, int], together: int) -> None:
    assert generators_together(ppo_settings(**changes), generators) == together


@pytest.mark.parametrize("interrupted", ["keep", "abandon"])
def test_a_checkpoint_completes_the_batch_under_way(tmp_path: Path, interrupted: str) -> None:
    changes: dict[str, Any] = {"iterations": 4, "checkpoints": {"every": 2}, "staleness": 1, "interrupted": interrupted}
    changes |= {"prompts_per_iteration": 6}
    whole = Stage(tmp_path / "whole", **changes)
    whole.session()
    stage = Stage(tmp_path / "stopped", **changes)
    with pytest.raises(RuntimeError, match="update 3"):
        stage.session(fails_at=3)
    stage.session()
    for iteration in range(1, 5):
        name = f"ppo/rollouts/iteration_{iteration:06}.parquet"
        mine, other = (read_rollouts(run.run_dir / name) for run in (stage, whole))
        assert torch.equal(mine.rollouts.policy_versions, other.rollouts.policy_versions)
        assert torch.equal(mine.scores, other.scores)


@pytest.mark.parametrize(
    ("rows", "changes", "sizes"),
    [
        (8, {}, [8]),
        (16, {}, [16]),
        (40, {}, [16, 16, 8]),
        (70, {}, [18, 18, 18, 16]),
        (8, {"chunk_samples": 3}, [3, 3, 2]),
        (0, {}, []),
        (70, {"staleness": 1}, [70]),
        (70, {"staleness": 1, "interrupted": "keep"}, [53, 17]),
        (1, {"staleness": 1, "interrupted": "abandon"}, [1]),
    ],
)
def test_how_many_samples_are_handed_over_at_a_time(rows: int, changes: dict[str, Any], sizes: list[int]) -> None:
    assert chunk_sizes(ppo_settings(**changes), rows) == sizes


@pytest.mark.parametrize(("staleness", "fails_at"), [(1, 3), (1, 4), (2, 3), (2, 2)])
def test_a_resumed_stage_learns_from_what_was_sampled_ahead(tmp_path: Path, staleness: int, fails_at: int) -> None:
    """The checkpoint after iteration 2 holds the samples of iteration 3 (and 4), of weights that are gone."""
    changes: dict[str, Any] = {"iterations": 5, "checkpoints": {"every": 2}, "staleness": staleness}
    whole = Stage(tmp_path / "whole", **changes)
    whole.session()
    stage = Stage(tmp_path / "stopped", **changes)
    with pytest.raises(RuntimeError, match=f"update {fails_at}"):
        stage.session(fails_at=fails_at)
    events = stage.session()
    if fails_at > 2:
        first = 3 + staleness
        assert events[:2] == [("sync", 2), ("generate", first, [2 * first - 2, 2 * first - 1])]
    names = ("reward/mean", "policy/loss", "generator/policy_version_lag", "evaluation/reward_mean")
    for mine, other in zip(stage.metrics(), whole.metrics(), strict=True):
        assert [mine.get(name) for name in names] == [other.get(name) for name in names]
    journals = [s.run_dir / "ppo/rollouts" for s in (stage, whole)]
    for iteration in range(1, 6):
        mine, other = (read_rollouts(folder / f"iteration_{iteration:06}.parquet") for folder in journals)
        assert torch.equal(mine.rollouts.policy_versions, other.rollouts.policy_versions)
        assert torch.equal(mine.scores, other.scores)


def test_a_finished_stage_has_nothing_left(tmp_path: Path) -> None:
    """As after a kill between the last checkpoint and the model: the weights are synced, nothing else happens."""
    stage = Stage(tmp_path)
    stage.session()
    assert stage.session() == [("sync", 2)]
    assert [row["iteration"] for row in stage.metrics()] == [0, 1, 2]
