"""The parts of the training engine that need no engine: schedule and parameter groups."""

import pytest
from torch import nn

from rlhf_ray.config.schema import Learner, Optimizer
from rlhf_ray.engines.deepspeed_training import decay_groups, effective_stage, learning_rate


def rates(settings: Optimizer, total_steps: int) -> list[float]:
    return [learning_rate(settings, step=step, total_steps=total_steps) for step in range(total_steps)]


def test_constant() -> None:
    assert rates(Optimizer(learning_rate=2.0), 3) == [2.0, 2.0, 2.0]


def test_warm_up_reaches_the_peak_after_its_steps() -> None:
    assert rates(Optimizer(learning_rate=4.0, warmup_steps=3), 5) == [1.0, 2.0, 3.0, 4.0, 4.0]


def test_linear_ends_at_the_final_ratio() -> None:
    settings = Optimizer(learning_rate=1.0, schedule="linear", final_ratio=0.2)
    assert rates(settings, 5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_after_warm_up() -> None:
    settings = Optimizer(learning_rate=1.0, schedule="cosine", warmup_steps=1)
    # Half a period over steps 1 to 5: (1 + cos(pi k / 4)) / 2.
    assert rates(settings, 6) == pytest.approx([0.5, 1.0, 0.853553, 0.5, 0.146447, 0.0], abs=1e-6)


def test_schedule_stays_at_its_end() -> None:
    settings = Optimizer(learning_rate=1.0, schedule="linear", final_ratio=0.1)
    assert learning_rate(settings, step=50, total_steps=5) == pytest.approx(0.1)
    assert learning_rate(settings, step=0, total_steps=1) == 1.0


def test_only_matrices_decay() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    module[0].weight.requires_grad_(True)
    matrices, vectors = decay_groups(module, 0.1)
    assert [tuple(p.shape) for p in matrices["params"]] == [(3, 2)]
    assert matrices["weight_decay"] == 0.1
    assert [tuple(p.shape) for p in vectors["params"]] == [(3,), (3,), (3,)]
    assert vectors["weight_decay"] == 0.0


def test_frozen_weights_are_left_out() -> None:
    module = nn.Linear(2, 3)
    module.weight.requires_grad_(False)
    (vectors,) = decay_groups(module, 0.1)
    assert [tuple(p.shape) for p in vectors["params"]] == [(3,)]


def test_bfloat16_runs_at_stage_two_at_least() -> None:
    assert [effective_stage(Learner(zero=z, dtype="bfloat16")) for z in (0, 1, 2, 3)] == [2, 2, 2, 3]
    assert [effective_stage(Learner(zero=z)) for z in (0, 1, 2, 3)] == [0, 1, 2, 3]
