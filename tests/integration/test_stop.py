"""Stopping a run from outside: the iteration under way is finished and saved, and `resume` goes on from there."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from rlhf_ray.config.load import dump_pipeline
from rlhf_ray.distributed.faults import VARIABLE
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.trainers.metric_rows import read_metrics
from tests.integration.tiny_runs import tiny_ppo

ROOT = Path(__file__).parents[2]
DEADLINE_S = 120.0


def command(*arguments: str, cluster: Cluster, fault: str = "") -> subprocess.Popen[str]:
    """The program in a process of its own, on the tests' Ray."""
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_ray", *arguments],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": cluster.address, VARIABLE: fault, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def iterations(run_dir: Path) -> list[int]:
    return [row["iteration"] for row in read_metrics(run_dir)]


def stop_after(process: subprocess.Popen[str], run_dir: Path, iteration: int, number: signal.Signals) -> str:
    """Sends the signal once this iteration's metrics are there; what the program wrote until it ended."""
    deadline = time.monotonic() + DEADLINE_S
    while iteration not in iterations(run_dir):
        ended = process.poll() is not None
        if ended or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"iteration {iteration} was not reached: {process.communicate()}")
        time.sleep(0.1)
    process.send_signal(number)
    out, errors = process.communicate(timeout=DEADLINE_S)
    return out + errors


def stopped_at(said: str, run_dir: Path, *, by: str, after: int) -> int:
    """The iteration that the program finished and saved; the one before it may still be under way at the signal."""
    found = re.search(rf"{by}: finishing iteration (\d+), then saving; once more stops at once, without saving", said)
    assert found, said
    iteration = int(found[1])
    assert iteration in (after, after + 1), said
    assert f"stopped after iteration {iteration} of 6" in said
    assert f"rlhf-ray resume {run_dir}  (stage ppo is saved at iteration {iteration})" in said
    assert "Traceback" not in said
    assert iterations(run_dir) == list(range(iteration + 1))
    return iteration


def test_stop_and_resume(tmp_path: Path, cluster: Cluster) -> None:
    """Ctrl-C once iteration 1 is there, SIGTERM once iteration 3 is, and then to the end, which is iteration 6."""
    config = tiny_ppo(
        tmp_path,
        iterations=6,
        prompts_per_iteration=2,
        advantages={"estimator": "leave_one_out"},
        sampling={"samples_per_prompt": 2, "max_new_tokens": 4},
        kl={"place": "off"},
        generator={"engine": "hf"},
    )
    file, run_dir = tmp_path / "tiny.yaml", tmp_path / "run"
    file.write_text(dump_pipeline(config))
    stage = run_dir / "ppo"

    # A pause within an iteration, so that the signal comes in the middle of it.
    process = command("run", str(file), cluster=cluster, fault="update:policy:0:2:sleep:3")
    said = stop_after(process, run_dir, 1, signal.SIGINT)
    assert process.returncode == 130, said
    first = stopped_at(said, run_dir, by="Ctrl-C", after=1)
    assert [path.name for path in (stage / "checkpoints").glob("iteration_*")] == [f"iteration_{first:06d}"]
    assert not (stage / "model").exists()

    again = command("run", str(file), cluster=cluster)
    _, errors = again.communicate(timeout=DEADLINE_S)
    assert again.returncode == 2, errors
    assert f"rlhf-ray resume {run_dir}" in errors
    assert iterations(run_dir) == list(range(first + 1))

    process = command("resume", str(run_dir), cluster=cluster, fault="update:policy:0:4:sleep:3")
    said = stop_after(process, run_dir, 3, signal.SIGTERM)
    assert process.returncode == 143, said
    second = stopped_at(said, run_dir, by="SIGTERM", after=3)

    process = command("resume", str(run_dir), cluster=cluster)
    out, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, out + errors
    assert f"going on after iteration {second} of 6" in out
    assert iterations(run_dir) == [0, 1, 2, 3, 4, 5, 6]
    assert (stage / "model" / "config.json").exists()
    assert (stage / "done.json").exists()
