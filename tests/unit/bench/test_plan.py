"""What the benchmark of plans makes of a run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_ray.bench import plan
from rlhf_ray.bench.figures import Settings


def test_planned_over_measured(tmp_path: Path) -> None:
    planned = {"memory_gib": {"policy": 1.1, "reward/model": 0.5}, "iteration_s": 3.0}
    (tmp_path / "plan.json").write_text(json.dumps({"stages": {"ppo": planned}}))
    rows = [{"time/iteration_s": 9.0}, {"time/iteration_s": 2.0}]
    policy, reward, seconds = plan.figures("s", tmp_path, {"policy": 1.0, "reward/model": 0.7}, rows)
    assert (policy.name, policy.ratio, policy.missed) == ("plan/memory/s/policy", 1.1, False)
    assert (reward.name, reward.floor, reward.missed) == ("plan/memory/s/reward", 0.7, True)
    assert (seconds.name, seconds.ratio, seconds.at_most) == ("plan/seconds/s/iteration", 1.5, None)


def test_a_size_without_room_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: SimpleNamespace(available=2 << 30))
    assert plan.measure(Settings(tmp_path, 1, False, said.append)) == []
    assert said[0] == "size s needs 5 GiB, 2.0 are free: left out"
