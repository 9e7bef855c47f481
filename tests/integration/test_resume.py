"""Resume is equality: a run that was stopped or killed and resumed is the run that was not, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray.config.load import dump_pipeline
from rlhf_ray.distributed.faults import VARIABLE
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.trainers.metrics import read_metrics
from tests.integration.tiny_runs import comparable, run, tiny_ppo, weights_digest

ROOT = Path(__file__).parents[2]


def six_iterations(folder: Path, *, name: str, zero: int):
    learner = {"workers": 2, "zero": zero}
    return tiny_ppo(
        folder,
        run=name,
        iterations=6,
        policy=learner | {"optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 3}},
        critic=learner,
        generator={"workers": 2},
        kl={"controller": "adaptive", "target": 0.5, "coefficient": 0.05, "horizon": 100},
        evaluation={"every": 2},
        checkpoints={"every": 3},
    )


@pytest.mark.parametrize("zero", [0, 2])
def test_stop_and_resume_equals_an_undisturbed_run(
    zero: int, tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(six_iterations(tmp_path, name="whole", zero=zero), tmp_path)

    stopped = six_iterations(tmp_path, name="stopped", zero=zero)
    monkeypatch.setenv(VARIABLE, "committed:driver:0:4:raise")
    with pytest.raises(Exception, match="fault"):
        run(stopped, tmp_path)
    monkeypatch.delenv(VARIABLE)
    assert [row["iteration"] for row in read_metrics(Path(stopped.run_dir))] == [0, 1, 2, 3, 4]
    resumed = run(stopped, tmp_path, resume=True)

    assert comparable(resumed) == comparable(whole)
    assert len(whole) == 7
    assert whole[6]["kl/coefficient"] != whole[1]["kl/coefficient"]
    assert weights_digest(stopped.run_dir) == weights_digest(tmp_path / "whole")


def test_kill_9_of_the_driver_then_resume(tmp_path: Path, cluster: Cluster) -> None:
    whole = run(six_iterations(tmp_path, name="whole", zero=2), tmp_path)

    killed = six_iterations(tmp_path, name="killed", zero=2)
    file = tmp_path / "killed.yaml"
    file.write_text(dump_pipeline(killed))
    command = [sys.executable, "-m", "rlhf_ray", "run", str(file)]
    environment = os.environ | {VARIABLE: "commit:driver:0:5:kill", "RAY_ADDRESS": cluster.address}
    process = subprocess.run(command, cwd=ROOT, env=environment, timeout=240, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    resumed = run(killed, tmp_path, resume=True)

    assert comparable(resumed) == comparable(whole)
    assert weights_digest(killed.run_dir) == weights_digest(tmp_path / "whole")
