"""Evaluation: its own sampling, the same seeds every time, and the metrics' names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_ray.config import schema
from rlhf_ray.trainers.evaluation import evaluate_prompts, weighted_sum
from rlhf_ray.trainers.ppo import evaluation_sampling
from tests.unit.trainers.fake_workers import Events, FakePrompts, ppo_groups, ppo_settings

TWO_REWARDS = [
    {"kind": "function", "function": "a:b", "name": "wit", "weight": 2.0},
    {"kind": "function", "function": "a:c", "name": "length", "weight": -0.5},
]


def evaluated(config: schema.Ppo, events: Events, scores: dict[str, float] | None = None):
    groups = ppo_groups(events, scores=scores)
    prompts, sampling = FakePrompts().all(), evaluation_sampling(config)
    return evaluate_prompts(groups.generator, prompts, sampling, scorers=groups.rewards, rewards=config.reward), groups


def test_two_evaluations_ask_for_the_same_seeds() -> None:
    """Seeds follow from the iteration, and training counts from 1."""
    events: Events = []
    evaluated(ppo_settings(), events)
    evaluated(ppo_settings(), events)
    assert events == [("generate", 0, [90, 91, 92])] * 2


def sampling_of(**changes: Any) -> schema.Sampling:
    _, groups = evaluated(ppo_settings(**changes), [])
    found = groups.generator.worker.sampling
    assert isinstance(found, schema.Sampling)
    return found


def test_sampling_is_greedy_and_unfiltered() -> None:
    """Lengths and stop strings belong to the task and stay; filters and penalties are training's."""
    training = {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "min_new_tokens": 3,
        "max_new_tokens": 20,
        "stop": ("\n",),
        "samples_per_prompt": 4,
    }
    expected = schema.Sampling(temperature=0.0, min_new_tokens=3, max_new_tokens=20, stop=("\n",))
    assert sampling_of(sampling=training) == expected
    own = {"temperature": 0.5, "samples_per_prompt": 2, "max_new_tokens": 30}
    expected = expected.model_copy(update=own)
    assert sampling_of(sampling=training, evaluation=own) == expected


def test_metrics_of_one_scorer() -> None:
    """Scores 1, 2, 3: population standard deviation sqrt(2 / 3). Bigrams: `a b` and `b 2`, three times each."""
    found, _ = evaluated(ppo_settings(), [], scores={"function": 101.0})
    assert found.scores.tolist() == [1.0, 2.0, 3.0]
    assert found.metrics == {
        "evaluation/reward_mean": 2.0,
        "evaluation/reward_std": pytest.approx((2 / 3) ** 0.5),
        "evaluation/length_mean": 2.0,
        "evaluation/finished_share": 1.0,
        "evaluation/distinct_bigram_share": pytest.approx(2 / 6),
    }
    assert found.rollouts.prompt_ids.tolist() == [90, 91, 92]


def test_several_scorers_are_summed_by_weight() -> None:
    """2 * (1, 2, 3) - 0.5 * (4, 5, 6) = 0, 1.5, 3."""
    found, _ = evaluated(ppo_settings(reward=TWO_REWARDS), [], scores={"wit": 101.0, "length": 104.0})
    assert found.scores.tolist() == [0.0, 1.5, 3.0]
    assert {name: part.tolist() for name, part in found.parts.items()} == {"wit": [1, 2, 3], "length": [4, 5, 6]}
    assert found.metrics["evaluation/reward_mean"] == 1.5
    assert found.metrics["evaluation/wit_mean"] == 2.0
    assert found.metrics["evaluation/length_mean"] == 5.0


def test_weighted_sum_leaves_the_parts_as_they_are() -> None:
    config = ppo_settings(reward=TWO_REWARDS)
    parts = {"wit": torch.tensor([1.0, -1.0]), "length": torch.tensor([2.0, 4.0])}
    assert weighted_sum(config.reward, parts).tolist() == [1.0, -4.0]
    assert parts["wit"].tolist() == [1.0, -1.0]
    assert weighted_sum(config.reward[:1], {"wit": parts["wit"]}).tolist() == [2.0, -2.0]
