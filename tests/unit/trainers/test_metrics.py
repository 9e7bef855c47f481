import json
import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Experience, Rollouts, make_sequences, one_version
from rlhf_ray.errors import InstallError
from rlhf_ray.trainers.metric_rows import read_metrics
from rlhf_ray.trainers.metrics import (
    MetricLog,
    check_tracking,
    distinct_bigram_share,
    experience_metrics,
    rollout_metrics,
)

TRACKING = schema.Tracking()


def log(tmp_path, last=-1, stage="ppo"):
    return MetricLog(tmp_path, stage, TRACKING, last_iteration=last)


def iterations(tmp_path, stage=None):
    return [(row["stage"], row["iteration"]) for row in read_metrics(tmp_path, stage)]


def rollouts() -> Rollouts:
    sequences = make_sequences([[5, 6], [7]], [[1, 2, 3], [4]])
    return Rollouts(
        sequences=sequences,
        generator_logprobs=torch.tensor([[0.0, 0, -1, -2, -3], [0, -4, 0, 0, 0]]),
        finished=torch.tensor([True, False]),
        prompts=["a", "b"],
        responses=["x y x y", "x y"],
        answers=[None, None],
        prompt_ids=torch.tensor([0, 1]),
        policy_versions=one_version(sequences, 0),
    )


def test_rollout_metrics_by_hand():
    metrics = rollout_metrics(rollouts(), torch.tensor([1.0, 3.0]), {"lexicon": torch.tensor([0.5, 1.0])})
    assert metrics == {
        "reward/mean": 2.0,
        "reward/std": 1.0,
        "reward/min": 1.0,
        "reward/max": 3.0,
        "reward/lexicon_mean": 0.75,
        "response/length_mean": 2.0,
        "response/length_max": 3.0,
        "response/finished_share": 0.5,
        "response/truncated_share": 0.5,
        # x y, y x, x y | x y: two kinds of four.
        "response/distinct_bigram_share": 0.5,
    }


def test_distinct_bigrams_of_nothing():
    assert distinct_bigram_share(["", "word"]) == 0.0
    assert distinct_bigram_share(["a b c"]) == 1.0


def experience(**changes) -> Experience:
    batch = rollouts()
    zeros = torch.zeros(2, 5)
    values = {
        "sequences": batch.sequences,
        # Differences to the generator on the response tokens: 0.1, 0, 0.2 | 0.5.
        "old_logprobs": torch.tensor([[9.0, 9, -1.1, -2, -3.2], [9, -4.5, 9, 9, 9]]),
        "reference_logprobs": torch.tensor([[0.0, 0, -2.1, -2, -3.2], [0, -2.5, 0, 0, 0]]),
        "values": zeros,
        "advantages": torch.tensor([[7.0, 7, 1, 1, 1], [7, -3, 7, 7, 7]]),
        "returns": zeros,
        "correction": torch.ones(2, 5),
    }
    return Experience(**(values | changes))


def test_experience_metrics_by_hand():
    metrics = experience_metrics(experience(), rollouts(), version=0)
    assert metrics["generator/logprob_diff_mean"] == pytest.approx(0.8 / 4, abs=1e-6)
    assert metrics["generator/logprob_diff_max"] == pytest.approx(0.5, abs=1e-6)
    # d on the response tokens: 1, 0, 0 | -2.
    assert metrics["kl/per_sequence"] == pytest.approx((1 - 2) / 2, abs=1e-6)
    assert metrics["kl/k1"] == pytest.approx(-1 / 4, abs=1e-6)
    assert metrics["kl/k2"] == pytest.approx((0.5 + 2) / 4, abs=1e-6)
    assert metrics["kl/k3"] == pytest.approx((math.exp(-1) - 1 + 1 + math.exp(2) - 1 - 2) / 4, abs=1e-5)
    assert metrics["advantage/mean"] == 0.0
    assert metrics["advantage/std"] == pytest.approx(math.sqrt((3 + 9) / 4))
    assert not any(name.startswith("critic/") for name in metrics)


def test_generator_and_learner_are_compared_where_both_had_the_same_weights():
    batch = rollouts()
    batch.policy_versions[0, 3:] = 1
    # Of the second version are the last two tokens of the first row: 0 and 0.2.
    metrics = experience_metrics(experience(), batch, version=1)
    assert metrics["generator/logprob_diff_mean"] == pytest.approx(0.1, abs=1e-6)
    assert metrics["generator/logprob_diff_max"] == pytest.approx(0.2, abs=1e-6)
    none = experience_metrics(experience(), batch, version=2)
    assert not any(name.startswith("generator/") for name in none)


def test_explained_variance_where_there_is_a_critic():
    returns = torch.tensor([[0.0, 0, 1, 3, 1], [0, 3, 0, 0, 0]])
    values = torch.tensor([[5.0, 5, 1, 2, 1], [5, 2, 5, 5, 5]])
    metrics = experience_metrics(experience(returns=returns, values=values), rollouts(), version=0)
    # Var(returns) = 1; returns - values = 0, 1, 0, 1 with variance 0.25.
    assert metrics["critic/explained_variance"] == pytest.approx(0.75)
    assert metrics["critic/value_mean"] == pytest.approx(1.5)


def test_every_row_is_valid_json_with_plain_numbers(tmp_path):
    with_everything = {
        "a": torch.tensor(1.5),
        "b": np.float32(0.5),
        "c": 3,
        "d": float("nan"),
        "e": float("inf"),
        "f": True,
    }
    metric_log = log(tmp_path)
    numbers = metric_log.write(1, with_everything)
    metric_log.close()
    assert math.isnan(numbers["d"])

    def refuse(constant):
        raise AssertionError(constant)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"stage": "ppo", "iteration": 1, "a": 1.5, "b": 0.5, "c": 3, "d": None, "e": None, "f": 1}


def test_a_metric_that_is_no_number_is_named(tmp_path):
    metric_log = log(tmp_path)
    with pytest.raises(TypeError, match="policy/loss"):
        metric_log.write(1, {"policy/loss": "high"})
    metric_log.close()


def test_rows_can_be_read_while_the_run_goes_on(tmp_path):
    metric_log = log(tmp_path)
    metric_log.write(1, {"a": 1})
    assert iterations(tmp_path) == [("ppo", 1)]
    metric_log.close()


@pytest.mark.parametrize("resumed_at", [-1, 0, 2, 5, 6])
def test_each_iteration_is_there_once_after_a_resume(tmp_path, resumed_at):
    sft = log(tmp_path, stage="sft")
    for iteration in (1, 2, 3):
        sft.write(iteration, {"a": 0})
    sft.close()
    first = log(tmp_path)
    for iteration in range(6):
        first.write(iteration, {"a": 1})
    first.close()
    second = log(tmp_path, last=resumed_at)
    for iteration in range(resumed_at + 1, 8):
        second.write(iteration, {"a": 2})
    second.close()
    assert iterations(tmp_path, "sft") == [("sft", i) for i in (1, 2, 3)]
    expected = [*range(min(resumed_at, 5) + 1), *range(resumed_at + 1, 8)]
    assert iterations(tmp_path, "ppo") == [("ppo", i) for i in expected]
    assert len(set(expected)) == len(expected)


def test_a_line_torn_by_a_kill_is_dropped(tmp_path):
    first = log(tmp_path)
    first.write(1, {"a": 1})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "ppo", "iterat')
    second = log(tmp_path, last=1)
    second.write(2, {"a": 2})
    second.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2]


def test_a_last_line_without_its_newline_is_completed(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "ppo", "iteration": 1, "a": 1}')
    second = log(tmp_path, last=1)
    second.write(2, {"a": 2})
    second.close()
    assert iterations(tmp_path) == [("ppo", 1), ("ppo", 2)]


def test_tensorboard_shows_each_iteration_once(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # Within one second files sort by their number in this process, and 10 stands before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    first = log(tmp_path)
    for iteration in range(5):
        first.write(iteration, {"reward/mean": 1.0})
    first.close()
    second = log(tmp_path, last=2)
    for iteration in (3, 4, 5):
        second.write(iteration, {"reward/mean": 2.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "ppo"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert points == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


WANDB = schema.Tracking(wandb=schema.Wandb(project="p"))


def test_missing_wandb_gives_the_line_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InstallError, match="pip install"):
        MetricLog(tmp_path, "ppo", WANDB)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InstallError, match="pip install"):
        check_tracking(WANDB)
    check_tracking(TRACKING)


def test_wandb_gets_the_metrics_and_the_same_run_on_resume(tmp_path, monkeypatch):
    started, logged = [], []
    run = SimpleNamespace(define_metric=lambda *a, **k: None, log=logged.append, finish=lambda: logged.append("end"))
    fake = ModuleType("wandb")
    fake.init = lambda **settings: started.append(settings) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "config.yaml").write_text("seed: 1")
    for last in (-1, 1):
        metric_log = MetricLog(tmp_path, "ppo", WANDB, last_iteration=last, settings={"lr": 1})
        metric_log.write(last + 2, {"reward/mean": 0.5})
        metric_log.close()
    assert logged == [{"iteration": 1, "reward/mean": 0.5}, "end", {"iteration": 3, "reward/mean": 0.5}, "end"]
    assert started[0]["id"] == started[1]["id"]
    assert started[0]["resume"] == "allow"
    assert started[0]["name"] == f"{tmp_path.name}-ppo"
