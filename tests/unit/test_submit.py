"""`submit`, `status`, `logs`, `stop`, `list`, and what the job runs; the cluster is a small HTTP server."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlhf_ray.cli import main
from rlhf_ray.config.load import run_files
from rlhf_ray.config.schema import Pipeline
from rlhf_ray.distributed import jobs
from rlhf_ray.distributed.tracing import Activity
from rlhf_ray.status import status_rows
from rlhf_ray.trainers.run import RunFolder
from rlhf_ray.trainers.status import Slowest, Status
from tests.unit.dashboard import TOKEN, Dashboard, job, serving

PIPELINE = """\
run_dir: runs/test
method: sft
steps: 3
policy: {model: {size: tiny}}
data: {train: texts.jsonl}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    (tmp_path / "tiny.yaml").write_text(PIPELINE)
    (tmp_path / "texts.jsonl").write_text('{"text": "The film was a joy."}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    # How soon a silent one is given up is not the question here, and the machine may be busy.
    monkeypatch.setattr(jobs, "PROBE_S", 20.0)
    with serving(Dashboard(token=TOKEN)) as server:
        yield server


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Pipeline, Path, bool]]:
    """The runs that are started; they do nothing."""
    started: list[tuple[Pipeline, Path, bool]] = []
    module = ModuleType("rlhf_ray.pipeline")

    def run_pipeline(config: Pipeline, *, pipeline_dir: Path, resume: bool) -> None:
        started.append((config, pipeline_dir, resume))

    module.__dict__.update(run_pipeline=run_pipeline)
    monkeypatch.setitem(sys.modules, "rlhf_ray.pipeline", module)
    return started


def exit_code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that exits 2 says; it writes nothing else, and no traceback."""
    assert exit_code(*arguments) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.err


def test_a_wrong_token(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong-4711")
    with serving(Dashboard(token=TOKEN)) as dashboard:
        for command in (("submit", "tiny.yaml"), ("list",), ("status", "a"), ("logs", "a"), ("stop", "a")):
            said = refusal(capsys, *command, "--address", dashboard.address)
            assert "refuses the token of RAY_AUTH_TOKEN" in said
            assert "wrong-4711" not in said
        assert {asked.split(" ", 1)[1] for asked in dashboard.asked} == {"/api/version"}


def test_no_token(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with serving(Dashboard(token=TOKEN)) as dashboard:
        assert "there is none here" in refusal(capsys, "submit", "tiny.yaml", "--address", dashboard.address)


def test_a_cluster_without_authentication(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Dashboard()) as dashboard:
        said = refusal(capsys, "submit", "tiny.yaml", "--address", dashboard.address)
        assert "asks for no token" in said
        assert "--without-token" in said


def test_an_old_cluster(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Dashboard(token=TOKEN, ray_version="2.40.0")) as dashboard:
        said = refusal(capsys, "submit", "tiny.yaml", "--address", dashboard.address)
        assert "runs Ray 2.40.0, wanted 2.56 or newer" in said


def test_nobody_answers(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be reached" in refusal(capsys, "submit", "tiny.yaml", "--address", "http://127.0.0.1:9")
    assert "no cluster is named" in refusal(capsys, "submit", "tiny.yaml")


def test_a_wrong_file_is_found_before_the_cluster(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "steps" in refusal(capsys, "submit", "tiny.yaml", "steps=0", "--address", "http://127.0.0.1:9")


def test_data_that_is_too_large(
    project: Path, capsys: pytest.CaptureFixture[str], dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (project / "texts.jsonl").open("ab") as file:
        file.truncate(200 << 20)
    said = refusal(capsys, "submit", "tiny.yaml", "--address", dashboard.address)
    assert f"sft.data.train: {project}/texts.jsonl, 200 MiB" in said
    assert "--shared FOLDER" in said
    assert all(asked == "GET /api/version" for asked in dashboard.asked)


def test_a_secret_is_a_name(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "submit", "tiny.yaml", "--secret", "HF_TOKEN=hf_4711")
    assert "wanted the name alone" in said
    assert "hf_4711" not in said
    assert "4711" not in refusal(capsys, "submit", "tiny.yaml", "--secret", "hf-4711")


def test_a_shared_folder_is_absolute(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--shared: got 'data', wanted an absolute path" in refusal(
        capsys, "submit", "tiny.yaml", "--shared", "data", "--address", "http://127.0.0.1:9"
    )


def test_the_list(project: Path, dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("list", "--address", dashboard.address) == 0
    assert capsys.readouterr().out == "no run was submitted to this cluster\n"
    foreign = job("theirs", "RUNNING") | {"metadata": {}}
    dashboard.jobs = [job("a-1", "STOPPED", start_time=1000), job("b-2", "RUNNING", start_time=2000), foreign]
    assert exit_code("list", "--address", dashboard.address) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["run", "state", "started", "pipeline", "run_dir"]
    assert [(row[0], row[1], *row[-2:]) for row in rows[1:]] == [
        ("b-2", "RUNNING", "tiny.yaml", "/runs/b-2"),
        ("a-1", "STOPPED", "tiny.yaml", "/runs/a-1"),
    ]


def test_status_and_logs(project: Path, dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard.jobs = [job("a-1", "FAILED", driver_exit_code=3, start_time=1000)]
    dashboard.logs = {"a-1": "step 1\nstep 2\n"}
    for name in ("a-1", "/runs/a-1"):
        assert exit_code("status", name, "--address", dashboard.address) == 0
        said = capsys.readouterr().out
        assert "FAILED, exit code 3\n" in said
        assert said.endswith("last line step 2\n")
    assert exit_code("logs", "a-1", "--address", dashboard.address) == 0
    assert capsys.readouterr().out == "step 1\nstep 2\n"
    assert exit_code("logs", "a-1", "--follow", "--address", dashboard.address) == 3
    assert capsys.readouterr().out == "step 1\nstep 2\n"
    assert "has no run 'a-2'; did you mean `a-1`?" in refusal(capsys, "logs", "a-2", "--address", dashboard.address)


@pytest.mark.parametrize(
    ("noted", "asked"),
    [
        ("~/runs/a", "runs/a"),  # as it was submitted
        ("~/runs/a", "./runs/a/"),
        ("~/runs/a", "~/runs/a"),
        ("~/runs/a", "HOME/runs/a"),  # what the shell makes of ~/runs/a
        ("HOME/runs/a", "HOME/runs/a"),  # likewise when it was submitted
        ("/runs/a", "/runs/a/"),
        ("/runs/a/", "/runs/a"),
    ],
)
def test_a_run_by_its_folder(
    noted: str, asked: str, project: Path, dashboard: Dashboard, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the names that a person has for it; of several runs with that folder the newest."""
    noted, asked = (name.replace("HOME", str(project)) for name in (noted, asked))
    dashboard.jobs = [job(name, "RUNNING", start_time=start) for name, start in (("a-1", 1000), ("a-2", 2000))]
    for each in dashboard.jobs:
        each["metadata"]["run_dir"] = noted
    dashboard.jobs.append(job("b", "RUNNING", start_time=3000))
    dashboard.logs = {"a-1": "the first\n", "a-2": "the second\n", "b": "another\n"}
    assert exit_code("logs", asked, "--address", dashboard.address) == 0
    assert capsys.readouterr().out == "the second\n"


def test_no_run_by_another_folder(project: Path, dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard.jobs = [job("a-1", "RUNNING", start_time=1000)]
    dashboard.jobs[0]["metadata"]["run_dir"] = "~/runs/a"
    for other in ("a", "/runs", "runs", "runs/a/b", "~", "/"):
        assert "has no run" in refusal(capsys, "logs", other, "--address", dashboard.address)


def test_a_run_by_its_folder_as_written_goes_first(
    project: Path, dashboard: Dashboard, capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard.jobs = [job("a-1", "RUNNING", start_time=1000), job("a-2", "RUNNING", start_time=2000)]
    for each, folder in zip(dashboard.jobs, (project, "~"), strict=True):
        each["metadata"]["run_dir"] = f"{folder}/runs/a"
    dashboard.logs = {"a-1": "the first\n", "a-2": "the second\n"}
    assert exit_code("logs", f"{project}/runs/a", "--address", dashboard.address) == 0
    assert capsys.readouterr().out == "the first\n"


def written(**changes: object) -> Status:
    """A status that was written two seconds ago."""
    values: dict[str, Any] = {
        "stage": "ppo",
        "stages": ("sft", "ppo"),
        "unit": "iteration",
        "iteration": 3,
        "total": 9,
        "outcome": None,
        "written_s": time.time() - 2,
        "progress_s": time.time() - 65,
        "metrics": {"reward/mean": 0.5, "kl/per_sequence": 1.25, "kl/k1": 3.0},
        "active": (Activity("policy", "update", time.time() - 4, 2),),
        "slowest": Slowest("policy", 1, "update", 7.0, 4.5),
    }
    return Status(**values | changes)


def test_the_status_of_a_run_that_goes_on(
    project: Path, dashboard: Dashboard, capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard.jobs = [job("a-1", "RUNNING", start_time=1000, driver_node_id="n1")]
    dashboard.files = {"job-driver-a-1.note.json": json.dumps(asdict(written()))}
    assert exit_code("status", "a-1", "--address", dashboard.address) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    phase = r"ppo \(stage 2 of 2\): iteration 3 of 9 done; now policy: update for \d+ s"
    assert re.fullmatch(phase, lines["phase"])
    assert re.fullmatch(r"1 min \d+ s ago \| reward 0.500 \| KL 1.25 nats", lines["progress"])
    assert lines["slowest"] == "policy rank 1: update 7.0 s, the others of its role 4.5 s"
    # A later job of the same run has written it.
    dashboard.jobs = [job("a-1", "STOPPED", start_time=1000, end_time=2000, driver_node_id="n1")]
    assert exit_code("status", "a-1", "--address", dashboard.address) == 0
    assert "phase" not in capsys.readouterr().out


def test_a_status_in_words() -> None:
    now = time.time()
    alone = written(slowest=Slowest("critic", 0, "update", 7.0, None), active=(), progress_s=None)
    rows = status_rows(alone, now=now, running=True)
    assert rows["phase"].endswith("; now the driver")
    assert rows["slowest"] == "critic rank 0: update 7.0 s"
    assert "progress" not in rows
    silent = status_rows(written(written_s=now - 300), now=now, running=True)["silent"]
    assert silent == "the driver has written nothing for 5 min 0 s"
    for outcome, words in (("done", ""), ("stopped", "; stopped"), ("WorkerError", "; failed by WorkerError")):
        assert status_rows(written(outcome=outcome), now=now, running=False)["phase"].endswith(f" 9 done{words}")
    assert status_rows(written(), now=now, running=False)["phase"].endswith("it has ended without a word")


def test_the_status_of_a_folder(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lines() -> dict[str, str]:
        assert exit_code("status", "run") == 0
        return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())

    folder = project / "run"
    folder.mkdir()
    assert "no cluster is named" in refusal(capsys, "status", "run")
    (folder / "config.yaml").write_text("")
    assert lines()["state"] == "not running; go on with  rlhf-ray resume run"
    (folder / "metrics.jsonl").write_text('{"stage": "sft", "iteration": 7, "policy/loss": 2.5}\n')
    assert lines()["phase"] == "sft: 7 done"
    assert lines()["progress"].endswith(" s ago | loss 2.5000")
    (folder / "status.json").write_text(json.dumps(asdict(written())))
    assert lines()["phase"].endswith("it has ended without a word")
    with RunFolder.open(folder):
        assert lines()["state"] == f"going on in process {os.getpid()} on {socket.gethostname()}"
        assert "; now policy: update for " in lines()["phase"]
    (folder / "status.json").write_text(json.dumps(asdict(written(outcome="done"))))
    assert lines()["state"] == "done"
    (folder / "status.json").write_text(json.dumps(asdict(written(outcome="done", stage="sft"))))
    assert lines()["state"].startswith("not running")


def test_ctrl_c_leaves_the_run_alone(
    project: Path, dashboard: Dashboard, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object, job_id: str, write: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_ray.distributed.jobs.JobServer.follow", interrupted)
    dashboard.jobs = [job("a-1", "RUNNING")]
    assert exit_code("logs", "a-1", "--follow", "--address", dashboard.address) == 130
    said = capsys.readouterr().err
    assert "a-1 goes on" in said
    assert f"rlhf-ray logs a-1 --follow --address {dashboard.address}" in said
    assert f"rlhf-ray stop a-1 --address {dashboard.address}" in said
    assert not any(asked.startswith("POST") for asked in dashboard.asked)


def test_stop(project: Path, dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard.jobs = [job("a-1", "RUNNING", runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}})]
    assert exit_code("stop", "a-1", "--address", dashboard.address) == 0
    said = capsys.readouterr()
    assert "after 600 s it is killed" in said.err
    assert said.out == "a-1: STOPPED\n"
    assert exit_code("stop", "a-1", "--address", dashboard.address) == 0
    assert capsys.readouterr().out == "a-1 has ended before: STOPPED\n"
    assert dashboard.asked.count("POST /api/jobs/a-1/stop") == 1


# ------------------------------------------------------------------------------ on the cluster


def submitted(*arguments: str) -> int | str | None:
    return exit_code("run-submitted", "tiny.yaml", version("rlhf_ray"), *arguments)


def test_a_new_run_and_the_same_again(project: Path, runs: list[tuple[Pipeline, Path, bool]]) -> None:
    (project / "tiny.yaml").write_text(PIPELINE.replace("runs/test", "~/runs/test"))
    assert submitted() == 0
    ((config, folder, resume),) = runs
    assert (config.run_dir, folder, resume) == (str(project / "runs" / "test"), project, False)
    (project / "runs" / "test").mkdir(parents=True)
    for name, text in run_files(config, pipeline_dir=Path("/elsewhere")).items():
        (project / "runs" / "test" / name).write_text(text)
    assert submitted() == 0
    assert runs[1] == (config, project, True)
    assert "/elsewhere" not in (project / "runs" / "test" / "origin.json").read_text()


def test_what_may_change_between_submissions(
    project: Path, runs: list[tuple[Pipeline, Path, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    """More steps at a constant learning rate, another deadline; not another learning rate."""
    folder = project / "run"
    (project / "tiny.yaml").write_text(PIPELINE.replace("runs/test", str(folder)))
    assert submitted() == 0
    folder.mkdir()
    for name, text in run_files(runs[0][0], pipeline_dir=project).items():
        (folder / name).write_text(text)
    changed = PIPELINE.replace("runs/test", str(folder)).replace("steps: 3", "steps: 5")
    (project / "tiny.yaml").write_text(changed + "placement: {call_timeout_s: 60}\n")
    assert submitted() == 0
    assert runs[1][2]
    assert "steps: 5" in (folder / "config.yaml").read_text()
    (project / "tiny.yaml").write_text(changed.replace("{model:", "{optimizer: {learning_rate: 0.5}, model:"))
    capsys.readouterr()
    assert submitted() == 2
    said = capsys.readouterr().err
    assert f"{folder} holds a run with other settings:\n  sft.policy.optimizer.learning_rate: was 1e-06, is 0.5" in said
    assert len(runs) == 2


def test_another_version_of_this_program(
    project: Path, runs: list[tuple[Pipeline, Path, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "run-submitted", "tiny.yaml", "99.0")
    assert f"this cluster has rlhf_ray {version('rlhf_ray')}, and the run was submitted by 99.0" in said
    assert runs == []


def test_a_secret_that_the_cluster_has_not(
    project: Path,
    runs: list[tuple[Pipeline, Path, bool]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    assert submitted("--secret", "HOME", "--secret", "MY_KEY") == 2
    assert "MY_KEY: not set on this cluster" in capsys.readouterr().err
    monkeypatch.setenv("MY_KEY", "sesame")
    assert submitted("--secret", "MY_KEY") == 0
    said = capsys.readouterr()
    assert "sesame" not in said.out + said.err
    assert len(runs) == 1


def test_the_home_of_a_container_is_no_place_for_a_run(
    project: Path,
    runs: list[tuple[Pipeline, Path, bool]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    (project / "tiny.yaml").write_text(PIPELINE.replace("runs/test", "~/runs/test"))
    assert submitted() == 2
    assert "lost with this container" in capsys.readouterr().err
    assert runs == []
