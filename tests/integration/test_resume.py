"""Resume is equality: a run that was stopped or killed and resumed is the run that was not, bit for bit."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.load import dump_pipeline
from rlhf_ray.config.schema import Pipeline
from rlhf_ray.distributed.faults import VARIABLE
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.trainers.metric_rows import read_metrics
from tests.integration.tiny_runs import comparable, run, tiny_ppo, weights_digest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Setup:
    """How the six iterations are trained."""

    zero: int
    lora: bool = False
    staleness: int = 0
    chunk_samples: int | None = None


def six_iterations(folder: Path, *, name: str, setup: Setup) -> Pipeline:
    """PPO with two learners of each kind, two generators, and everything that has a state: schedule, KL controller.

    With an adapter one of each: the learners' own test stops and resumes two ranks with adapters.
    """
    learner = {"workers": 2, "zero": setup.zero}
    policy = {"optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 3}}
    with_critic: dict[str, Any] = {"policy": learner | policy, "critic": learner}
    with_adapter: dict[str, Any] = {
        "policy": {"zero": setup.zero, "lora": {"rank": 2, "dropout": 0.1}} | policy,
        "advantages": {"estimator": "leave_one_out"},
        "sampling": {"samples_per_prompt": 2},
    }
    return tiny_ppo(
        folder,
        run=name,
        iterations=6,
        **with_adapter if setup.lora else with_critic,
        generator={"workers": 1 if setup.lora else 2},
        staleness=setup.staleness,
        chunk_samples=setup.chunk_samples,
        kl={"controller": "adaptive", "target": 0.5, "coefficient": 0.05, "horizon": 100},
        evaluation={"every": 2},
        checkpoints={"every": 3},
    )


AHEAD = Setup(2, staleness=1, chunk_samples=2)
SETUPS = [
    pytest.param(Setup(0, chunk_samples=2), id="ZeRO-0, judged in pieces", marks=pytest.mark.slow),
    pytest.param(AHEAD, id="ZeRO-2, one step ahead, judged in pieces"),
    pytest.param(Setup(2, lora=True, chunk_samples=6), id="ZeRO-2, adapter", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=SETUPS)
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cluster: Cluster
) -> tuple[Setup, Path]:
    """A setup, and a folder with a run of six iterations that nothing disturbed."""
    folder = tmp_path_factory.mktemp("resume")
    rows = run(six_iterations(folder, name="whole", setup=request.param), folder)
    assert len(rows) == 7
    assert rows[6]["kl/coefficient"] != rows[1]["kl/coefficient"]
    assert [row["generator/policy_version_lag"] for row in rows[1:]] == [0, *[request.param.staleness] * 5]
    return request.param, folder


def assert_equal_runs(folder: Path, name: str) -> None:
    assert comparable(read_metrics(folder / name)) == comparable(read_metrics(folder / "whole"))
    assert weights_digest(folder / name) == weights_digest(folder / "whole")


@pytest.mark.slow
def test_stop_and_resume_equals_an_undisturbed_run(
    undisturbed: tuple[Setup, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, folder = undisturbed
    stopped = six_iterations(folder, name="stopped", setup=setup)
    monkeypatch.setenv(VARIABLE, "committed:driver:0:4:raise")
    with pytest.raises(RuntimeError, match="injected fault"):
        run(stopped, folder)
    monkeypatch.delenv(VARIABLE)
    assert [row["iteration"] for row in read_metrics(Path(stopped.run_dir))] == [0, 1, 2, 3, 4]
    run(stopped, folder, resume=True)
    assert_equal_runs(folder, "stopped")


def test_kill_9_of_the_driver_then_resume(undisturbed: tuple[Setup, Path], cluster: Cluster) -> None:
    setup, folder = undisturbed
    if setup != AHEAD:
        pytest.skip("one setup is enough for the kill; the stop is tested with all of them")
    killed = six_iterations(folder, name="killed", setup=setup)
    file = folder / "killed.yaml"
    file.write_text(dump_pipeline(killed))
    command = [sys.executable, "-m", "rlhf_ray", "run", str(file)]
    environment = os.environ | {VARIABLE: "commit:driver:0:5:kill", "RAY_ADDRESS": cluster.address}
    process = subprocess.run(command, cwd=ROOT, env=environment, timeout=240, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    run(killed, folder, resume=True)
    assert_equal_runs(folder, "killed")
