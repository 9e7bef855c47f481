"""Generators that sleep and learners that leave: on a CPU nothing is moved, and nothing that is learnt changes.

Every call stands in its turn all the same: a worker that is asked for something while it is away fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.distributed.placement import Cluster
from tests.integration.test_dpo import tiny_dpo
from tests.integration.tiny_runs import comparable, run, tiny_ppo, weights_digest

SETTINGS: dict[str, Any] = {
    "checkpoints": {"every": 1, "best": "evaluation/reward_mean"},
    "evaluation": {"every": 1},
    "critic": {"optimizer": {"learning_rate": 1e-3}},
}
SHARED: dict[str, Any] = {"generator": {"sleep": True}, "policy": {"offload": True}, "critic": {"offload": True}}


def shared(**changes: Any) -> dict[str, Any]:
    """The settings of the run whose roles leave the GPU to each other."""
    return {name: SETTINGS.get(name, {}) | SHARED.get(name, {}) for name in SETTINGS | SHARED} | changes


def test_a_run_on_shared_gpus_learns_the_same_bits(tmp_path: Path, cluster: Cluster) -> None:
    """Its checkpoint after the first iteration and its best model are written when it is the generators' turn."""
    plain, other = tiny_ppo(tmp_path, run="plain", **SETTINGS), tiny_ppo(tmp_path, run="shared", **shared())
    wanted, rows = run(plain, tmp_path), run(other, tmp_path)
    assert comparable(rows) == comparable(wanted)
    assert weights_digest(other.run_dir) == weights_digest(plain.run_dir)
    assert {"time/generator_sleep_s", "time/policy_offload_s", "time/critic_reload_s"} <= rows[-1].keys()
    assert not {"time/generator_sleep_s", "time/policy_offload_s"} & wanted[-1].keys()


@pytest.mark.slow
def test_it_goes_on_after_a_stop(tmp_path: Path, cluster: Cluster) -> None:
    plain = tiny_ppo(tmp_path, run="plain", **SETTINGS)
    wanted = run(plain, tmp_path)
    run(tiny_ppo(tmp_path, run="shared", **shared(iterations=1)), tmp_path)
    other = tiny_ppo(tmp_path, run="shared", **shared())
    rows = run(other, tmp_path, resume=True)
    # The first session's last iteration was its stage's last.
    assert comparable(rows[2:]) == comparable(wanted[2:])
    assert weights_digest(other.run_dir) == weights_digest(plain.run_dir)


@pytest.mark.slow
def test_an_adapter_on_shared_gpus(tmp_path: Path, cluster: Cluster) -> None:
    adapter: dict[str, Any] = {"policy": {"lora": {"rank": 2}}, "critic": {"kind": "value_head"}}
    leaving = {"policy": adapter["policy"] | {"offload": True}, "generator": {"sleep": True}}
    plain, other = tiny_ppo(tmp_path, run="plain", **adapter), tiny_ppo(tmp_path, run="other", **adapter | leaving)
    assert comparable(run(other, tmp_path)) == comparable(run(plain, tmp_path))
    assert weights_digest(other.run_dir) == weights_digest(plain.run_dir)


@pytest.mark.slow
def test_dpo_whose_evaluation_samples_on_shared_gpus(tmp_path: Path, cluster: Cluster) -> None:
    """Without a cache, so that the references are asked for alike in both runs."""
    common: dict[str, Any] = {"epochs": 1, "cache": False, "cache_dir": None, "checkpoints": {"every": 1}}
    common["evaluation"] = {"every": 1, "prompts": 4, "max_new_tokens": 8}
    plain = tiny_dpo(tmp_path, run="plain", generator={}, **common)
    other = tiny_dpo(tmp_path, run="other", generator={"sleep": True}, policy={"offload": True}, **common)
    assert comparable(run(other, tmp_path)) == comparable(run(plain, tmp_path))
    assert weights_digest(other.run_dir, "dpo") == weights_digest(plain.run_dir, "dpo")
