"""What is read from a run's folder, whole or damaged."""

import math
import shutil

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.report.history import read_run
from tests.unit.report.runs_for_tests import write_run, write_samples


def test_a_run_that_goes_on(tmp_path):
    run = read_run(write_run(tmp_path / "small"))
    assert run.name == "small"
    assert [(stage.name, stage.method, stage.iteration, stage.elapsed_s) for stage in run.stages] == [
        ("sft", "sft", 1, 65.0),
        ("ppo", "ppo", 2, None),
    ]
    assert run.planned == ("sft", "ppo")
    assert not run.is_done
    assert run.stages[1].values("evaluation/reward_mean") == [(0, -0.25), (1, 0.5), (2, 1.0)]
    assert run.stages[0].samples is None


def test_evaluations_are_compared_by_prompt(tmp_path):
    samples = read_run(write_run(tmp_path / "small")).stages[1].samples
    assert (samples.kind, samples.first, samples.last, samples.total) == ("evaluation", 0, 2, 3)
    assert [(sample.prompt, sample.response, sample.score) for sample in samples.before] == [
        ("b", "bad", 0.5),
        ("a", "dull", -1.0),
    ]
    assert [(sample.prompt, sample.score) for sample in samples.after] == [("b", 0.25), ("a", 1.0)]


def test_rollouts_stand_in_for_evaluations(tmp_path):
    run_dir = write_run(tmp_path / "small")
    shutil.rmtree(run_dir / "ppo" / "evaluation")
    for iteration, prompt in ((1, "x"), (2, "y")):
        path = run_dir / "ppo" / "rollouts" / f"iteration_{iteration:06}.parquet"
        write_samples(path, {iteration: prompt}, ["r"], [math.nan])
    samples = read_run(run_dir).stages[1].samples
    assert (samples.kind, samples.first, samples.last) == ("rollouts", 1, 2)
    assert [sample.prompt for sample in (*samples.before, *samples.after)] == ["x", "y"]


def test_what_a_kill_has_torn_is_left_out(tmp_path):
    run_dir = write_run(tmp_path / "small")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "ppo", "iteration": 3, "rew')
    trace = (run_dir / "trace.json").read_text()
    (run_dir / "trace.json").write_text(trace[:-30])
    (run_dir / "sft" / "done.json").write_text("{")
    (run_dir / "ppo" / "evaluation" / "iteration_000002.parquet").write_bytes(b"PAR1 torn")
    run = read_run(run_dir)
    assert run.stages[1].iteration == 2
    assert run.stages[0].elapsed_s is None
    assert run.stages[1].samples is None
    assert len(run.events) > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: shutil.rmtree(run), "is no folder; wanted the run_dir"),
        (lambda run: (run / "config.yaml").unlink(), r"holds no run \(no config.yaml\)"),
        (lambda run: (run / "metrics.jsonl").unlink(), "no metrics yet: no iteration has ended"),
        (lambda run: (run / "metrics.jsonl").write_text("torn"), "no metrics yet"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml: is damaged"),
    ],
    ids=["no folder", "no config", "no metrics", "only a torn line", "damaged config"],
)
def test_what_is_no_run_is_named(tmp_path, change, message):
    run_dir = write_run(tmp_path / "small")
    change(run_dir)
    with pytest.raises(ConfigError, match=message):
        read_run(run_dir)


def test_secrets_stay_out(tmp_path):
    settings = {"tracking": {"wandb": {"api_key": "abc", "project": "p"}}}
    run = read_run(write_run(tmp_path / "small", settings=settings))
    assert run.settings["tracking"] == {"wandb": {"api_key": "(removed)", "project": "p"}}
