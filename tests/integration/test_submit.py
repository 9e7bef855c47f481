"""Runs submitted to a Ray cluster of the test's own, which wants a token."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from rlhf_ray.config.load import dump_pipeline
from rlhf_ray.distributed.faults import VARIABLE
from rlhf_ray.distributed.jobs import PROBE_S
from rlhf_ray.trainers.metric_rows import read_metrics
from tests.integration.tiny_runs import comparable, tiny_ppo, weights_digest

ROOT = Path(__file__).parents[2]
TOKEN = "4f" * 32
SECRET = "sesame-4711"
DEADLINE_S = 180.0
# In the second iteration of every run, so that a stop comes in the middle of it.
PAUSE = "update:policy:0:2:sleep:15"


@dataclass(frozen=True)
class Head:
    """A head node: the address of its dashboard, and the environment of a user of it."""

    address: str
    environment: dict[str, str]

    def run(
        self, *arguments: str, token: str | None = TOKEN, timeout_s: float = DEADLINE_S
    ) -> subprocess.CompletedProcess[str]:
        """The program, with the cluster's token, another or none."""
        environment = self.environment | ({} if token is None else {"RAY_AUTH_TOKEN": token})
        command = [sys.executable, "-m", "rlhf_ray", *arguments, "--address", self.address]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started({"MY_KEY": SECRET, VARIABLE: PAUSE}) as running:
        yield running


@contextmanager
def started(variables: Mapping[str, str]) -> Iterator[Head]:
    """`ray start --head` with token authentication, ports and folders of its own, and further variables."""
    # Sockets lie below this folder, and their paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="rr_", dir="/tmp"))
    (folder / "ray").mkdir()
    gcs, dashboard, agent, client = free_ports(4)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {
        "HOME": str(folder),
        "RAY_TMPDIR": str(folder),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    options = {
        "port": gcs,
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client,
        "num-cpus": 4,
        "num-gpus": 0,
        "object-store-memory": 200 << 20,
    }
    log = folder / "ray_start.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
            + [f"--{name}={value}" for name, value in options.items()],
            env=environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN} | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for_jobs_api(address, process, log)
        yield Head(address, environment)
    finally:
        started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        for left in psutil.wait_procs(started, timeout=30)[1]:
            left.kill()
        process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_jobs_api(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            # `connect` waits no longer, and a head that is still starting answers late.
            answer = httpx.get(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=PROBE_S)
            if answer.status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"no Ray came up: {log.read_text()}")


def write_pipeline(folder: Path, *, run: str, iterations: int) -> Path:
    """A tiny pipeline whose model, data and reward function lie here, its paths relative where they can be."""
    config = tiny_ppo(
        folder,
        run=run,
        iterations=iterations,
        prompts_per_iteration=2,
        advantages={"estimator": "leave_one_out"},
        sampling={"samples_per_prompt": 2, "max_new_tokens": 4},
        kl={"place": "off"},
        generator={"engine": "hf"},
    )
    file = folder / f"{run}.yaml"
    file.write_text(dump_pipeline(config))
    return file


def local_status(run_dir: Path) -> str:
    """What `rlhf-ray status` says of a folder, without a cluster."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "rlhf_ray", "status", str(run_dir)]
    said = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=DEADLINE_S)
    assert said.returncode == 0, said.stderr
    return said.stdout


def test_submit(tmp_path: Path, head: Head) -> None:
    file = write_pipeline(tmp_path, run="run", iterations=1)
    for token, said in ((None, "wants a token, and there is none here"), ("0" * 64, "refuses the token of RAY_AUTH")):
        refused = head.run("submit", str(file), token=token)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert said in refused.stderr
        assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()

    done = head.run("submit", str(file), "--secret", "MY_KEY")
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("module tiny_rewards", "ppo.data.train", "ppo.policy.model"):
        assert f"uploads {what}: " in done.stderr
    assert weights_digest(tmp_path / "run")
    assert [row["iteration"] for row in read_metrics(tmp_path / "run")] == [0, 1]

    detached = head.run("submit", str(file), "--detach", "--secret", "NO_SUCH_KEY")
    assert detached.returncode == 0
    followed = head.run("logs", detached.stdout.strip(), "--follow")
    assert followed.returncode == 2
    assert "NO_SUCH_KEY: not set on this cluster" in followed.stdout

    listed = head.run("list").stdout.splitlines()
    assert [line.split()[1] for line in listed[1:]] == ["FAILED", "SUCCEEDED"]
    assert "FAILED, exit code 2" in head.run("status", str(tmp_path / "run")).stdout
    first = done.stderr.split("submitted as ")[1].split(";")[0]
    assert "ppo (stage 1 of 1): iteration 1 of 1 done\n" in head.run("status", first).stdout
    known = httpx.get(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30)
    assert SECRET not in known.text
    assert TOKEN not in known.text
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_stopped_run_that_is_submitted_again_is_the_run_that_was_not(tmp_path: Path, head: Head) -> None:
    whole, stopped = (write_pipeline(tmp_path, run=run, iterations=4) for run in ("whole", "stopped"))
    assert head.run("submit", str(whole)).returncode == 0
    job = head.run("submit", str(stopped), "--detach").stdout.strip()
    deadline = time.monotonic() + DEADLINE_S
    run_dir = tmp_path / "stopped"
    while not (run_dir / "metrics.jsonl").exists() or len(read_metrics(run_dir)) < 2:
        assert time.monotonic() < deadline, head.run("logs", job).stdout
        time.sleep(0.05)
    for said in (head.run("status", job).stdout, local_status(run_dir)):
        lines = dict(line.split(maxsplit=1) for line in said.splitlines())
        assert re.match(r"ppo \(stage 1 of 1\): iteration 1 of 4 done; now ", lines["phase"]), said
        assert re.match(r"[0-9]+ s ago \| reward 0\.[0-9]+", lines["progress"]), said
        assert re.match(r"(policy|generator) rank 0: ", lines["slowest"]), said
    ended = head.run("stop", job)
    assert (ended.returncode, ended.stdout) == (0, f"{job}: STOPPED\n")
    said = head.run("logs", job, "--follow")
    assert said.returncode == 143
    assert "then saving" in said.stdout
    assert not (run_dir / "ppo" / "done.json").exists()
    assert len(list((run_dir / "ppo" / "checkpoints").glob("iteration_*"))) == 1

    again = head.run("submit", str(stopped))
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{run_dir} holds this run; going on with it" in again.stdout
    assert weights_digest(run_dir) == weights_digest(tmp_path / "whole")
    assert comparable(read_metrics(run_dir)) == comparable(read_metrics(tmp_path / "whole"))
    assert json.loads((run_dir / "ppo" / "done.json").read_text())["iteration"] == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_quickstart_that_was_stopped_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    """The shipped pipeline, vLLM and all, with fewer steps."""
    fewer = ("sft.steps=40", "reward_model.steps=20", "ppo.iterations=5", "ppo.checkpoints.every=2")
    quickstart = (str(ROOT / "pipelines" / "quickstart.yaml"), *fewer)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with started({}) as head:
        done = head.run("submit", *quickstart, "--run-dir", str(whole), timeout_s=600)
        assert done.returncode == 0, done.stdout + done.stderr
        job = head.run("submit", *quickstart, "--run-dir", str(stopped), "--detach").stdout.strip()
        deadline = time.monotonic() + 600
        while not (stopped / "metrics.jsonl").exists() or len(read_metrics(stopped, "ppo")) < 3:
            assert time.monotonic() < deadline, head.run("logs", job).stdout
            time.sleep(0.05)
        assert head.run("stop", job, timeout_s=600).stdout == f"{job}: STOPPED\n"
        assert not (stopped / "ppo" / "done.json").exists()
        again = head.run("submit", *quickstart, "--run-dir", str(stopped), timeout_s=600)
        assert again.returncode == 0, again.stdout + again.stderr
    for stage in ("sft", "reward_model", "ppo"):
        assert weights_digest(stopped, stage) == weights_digest(whole, stage)
    assert comparable(read_metrics(stopped)) == comparable(read_metrics(whole))


def test_a_plan_sees_the_clusters_nodes(head: Head) -> None:
    planned = head.run("plan", "pipelines/quickstart.yaml")
    assert planned.returncode == 0, planned.stderr
    assert "of 4 CPUs and 0 of 0 GPUs are free." in planned.stdout
    refused = head.run("plan", "pipelines/quickstart.yaml", token=None)
    assert refused.returncode == 2
    assert "wants a token" in refused.stderr
