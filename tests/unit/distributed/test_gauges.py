"""What a row of metrics becomes on Ray's metrics endpoint."""

from __future__ import annotations

import math
import re
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.config import schema
from rlhf_ray.distributed import gauges
from rlhf_ray.distributed.gauges import RayGauges, gauge_name
from rlhf_ray.trainers.metrics import MetricLog


class KeptGauge:
    """Stands for Ray's gauge, which wants a running Ray: keeps what was set."""

    made: list[KeptGauge]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.description, self.tag_keys = name, description, tag_keys
        self.tags: dict[str, str] = {}
        self.values: list[float] = []
        self.made.append(self)

    def set_default_tags(self, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        self.tags = tags

    def set(self, value: float) -> None:
        assert type(value) is float
        self.values.append(value)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[KeptGauge]:
    monkeypatch.setattr(KeptGauge, "made", [], raising=False)
    monkeypatch.setattr(gauges, "Gauge", KeptGauge)
    return KeptGauge.made


def test_each_metric_has_one_gauge_with_run_and_stage(made: list[KeptGauge]) -> None:
    tracker = RayGauges(run="quickstart", stage="ppo")
    tracker.write(1, {"reward/mean": 0.25, "generator/tokens_per_s": 7205})
    tracker.write(2, {"reward/mean": 0.5})
    tracker.close()
    assert {gauge.name: gauge.values for gauge in made} == {
        "rlhf_ray_iteration": [1.0, 2.0],
        "rlhf_ray_not_finite": [0.0, 0.0],
        "rlhf_ray_reward_mean": [0.25, 0.5],
        "rlhf_ray_generator_tokens_per_s": [7205.0, 7205.0],
    }
    assert all(gauge.tags == {"run": "quickstart", "stage": "ppo"} for gauge in made)
    assert "reward/mean" in next(gauge.description for gauge in made if gauge.name == "rlhf_ray_reward_mean")


def test_what_is_no_number_is_counted_and_goes(made: list[KeptGauge]) -> None:
    tracker = RayGauges(run="quickstart", stage="ppo")
    for iteration, reward in enumerate((0.25, math.nan, math.inf, 0.5)):
        tracker.write(iteration, {"reward/mean": reward})
    tracker.close()
    values = {gauge.name: gauge.values for gauge in made}
    assert values["rlhf_ray_reward_mean"] == [0.25, 0.5]
    assert values["rlhf_ray_not_finite"] == [0.0, 1.0, 1.0, 0.0]


def test_values_are_repeated_until_it_is_closed(made: list[KeptGauge], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "_REPEAT_S", 0.001)
    repeated = threading.Event()
    monkeypatch.setattr(
        KeptGauge, "set", lambda self, value: self.values.append(value) or (len(self.values) > 3 and repeated.set())
    )
    tracker = RayGauges(run="quickstart", stage="ppo")
    tracker.write(1, {"reward/mean": 0.25})
    assert repeated.wait(timeout=20)
    tracker.close()
    counts = [len(gauge.values) for gauge in made]
    assert not any(thread.name == "gauges" for thread in threading.enumerate())
    assert [len(gauge.values) for gauge in made] == counts


def test_the_metric_log_writes_to_it_and_closes_it(made: list[KeptGauge], tmp_path: Path) -> None:
    log = MetricLog(tmp_path, "sft", schema.Tracking(), trackers=[RayGauges(run="r", stage="sft")])
    log.write(3, {"policy/loss": 1.5})
    log.close()
    values = {gauge.name: gauge.values for gauge in made}
    assert values == {"rlhf_ray_iteration": [3.0], "rlhf_ray_not_finite": [0.0], "rlhf_ray_policy_loss": [1.5]}
    assert not any(thread.name == "gauges" for thread in threading.enumerate())


def test_names_of_parts_keep_their_place() -> None:
    assert gauge_name("reward/my-scorer/busy_share") == "rlhf_ray_reward_my_scorer_busy_share"


@given(st.text(min_size=1))
def test_every_name_is_one_that_prometheus_takes(metric: str) -> None:
    assert re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", gauge_name(metric))
