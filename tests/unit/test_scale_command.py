"""`rlhf-ray scale`: what it refuses, what it asks a run for, and what it says of the answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.cli import main
from rlhf_ray.trainers.run import RunFolder
from rlhf_ray.trainers.scale_file import Standing, Wish, read_wish, remove_standing, write_standing
from tests.unit.dashboard import TOKEN, Dashboard, job, serving

BEFORE = Standing("ppo", 2, 1, "", True, "")


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """The folder of a run that is under way, in a stage that follows wishes."""
    with RunFolder.create(tmp_path / "run", {"config.yaml": "run_dir: run\n"}) as folder:
        write_standing(folder.path, BEFORE)
        yield folder.path


def exit_code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main(("scale", *arguments))
    return stopped.value.code


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert exit_code(*arguments) == 2
    said = capsys.readouterr()
    assert (said.out, "Traceback" in said.err) == ("", False)
    return said.err


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("generator", "got 'generator', wanted generator=NUMBER"),
        ("4", "got '4', wanted generator=NUMBER"),
        ("generators=4", "did you mean `generator`?"),
        ("policy=4", "policy: got 4, but only the number of generators can change while a run goes on"),
        ("reward=2", "only the number of generators"),
        ("generator=0", "generator: got '0', wanted a whole number above 0"),
        ("generator=-1", "wanted a whole number above 0"),
        ("generator=1.5", "wanted a whole number above 0"),
    ],
)
def test_what_cannot_be_asked_for(wanted: str, said: str, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refusal(capsys, str(run_dir), wanted)
    assert read_wish(run_dir) is None


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no run (there is no config.yaml)" in refusal(capsys, str(tmp_path), "generator=2")
    assert "is not a folder" in refusal(capsys, str(tmp_path / "absent"), "generator=2")
    with RunFolder.create(tmp_path / "run", {"config.yaml": ""}):
        pass
    assert "no run is under way in it" in refusal(capsys, str(tmp_path / "run"), "generator=2")


def test_a_stage_without_generators(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remove_standing(run_dir)
    assert "its stage has no generators that can be scaled" in refusal(capsys, str(run_dir), "generator=2")


def test_the_wish_alone(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(str(run_dir), "generator=4", "--detach") == 0
    wish = read_wish(run_dir)
    assert wish is not None
    assert (wish.stage, wish.generator) == ("ppo", 4)
    assert "ppo: 2 generators; 4 are asked for" in capsys.readouterr().err


class Answering(threading.Thread):
    """A run that answers the next wish with these standings; None: it leaves the stage."""

    def __init__(self, folder: Path, *answers: dict[str, Any] | None) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.answers = answers
        self.start()

    def run(self) -> None:
        while (wish := read_wish(self.folder)) is None:
            time.sleep(0.01)
        for answer in self.answers:
            if answer is None:
                remove_standing(self.folder)
            else:
                write_standing(self.folder, Standing(**{"stage": "ppo", "wish": wish.number, "since": 7} | answer))
                time.sleep(0.5)


def test_it_waits_until_the_wish_is_true(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waits = {"generator": 3, "settled": False, "note": "no room for 1 more"}
    Answering(run_dir, waits, {"generator": 4, "settled": True, "note": ""})
    assert exit_code(str(run_dir), "generator=4") == 0
    said = capsys.readouterr()
    assert said.out == "ppo: 4 generators from iteration 7\n"
    assert said.err.splitlines()[1:] == ["no room for 1 more"]


def test_a_shortage_is_exit_code_1(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Answering(run_dir, {"generator": 3, "settled": True, "note": "no room for 1 more"})
    assert exit_code(str(run_dir), "generator=4") == 1
    said = capsys.readouterr()
    assert said.out == "ppo: 3 generators from iteration 7\n"
    assert said.err.splitlines()[1:] == ["no room for 1 more"]


def test_a_stage_that_ends_and_a_deadline(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Answering(run_dir, None)
    assert exit_code(str(run_dir), "generator=4") == 1
    assert "ppo has ended before" in capsys.readouterr().err
    write_standing(run_dir, BEFORE)
    assert exit_code(str(run_dir), "generator=4", "--timeout-s", "1") == 1
    assert "not done after 1 s; the wish stands" in capsys.readouterr().err


def test_a_newer_wish(run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    newer = Wish("ppo", 3, "0123")
    monkeypatch.setattr("rlhf_ray.trainers.scale_file.read_wish", lambda folder: newer)
    assert exit_code(str(run_dir), "generator=4") == 1
    assert "another wish has taken the place of this one" in capsys.readouterr().err


def test_a_submitted_run_that_cannot_be_scaled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with serving(Dashboard(token=TOKEN, jobs=[job("a-1", "SUCCEEDED")])) as dashboard:
        at = ("generator=3", "--address", dashboard.address)
        assert "a-1 has ended: SUCCEEDED" in refusal(capsys, "/runs/a-1", *at)
        assert "has no run 'a-2'; did you mean `a-1`?" in refusal(capsys, "a-2", *at)
        dashboard.jobs[0]["metadata"]["run_dir"] = "~/runs/a"
        assert "a-1 has ended: SUCCEEDED" in refusal(capsys, "runs/a", *at)


def test_a_job_asks_a_submitted_run_on_its_own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder need not be seen here; the command ends with the job's exit code."""
    sent: list[tuple[str, str]] = []

    def submit(self: object, job_id: str, command: str, folder: Path, **further: Any) -> None:
        assert list(folder.iterdir()) == []
        assert further == {"variables": {}, "metadata": {}}
        sent.append((job_id, command))

    def follow(self: object, job_id: str, write: object) -> SimpleNamespace:
        assert job_id == sent[0][0]
        return SimpleNamespace(exit_code=1)

    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr("rlhf_ray.distributed.jobs.JobServer.submit", submit)
    monkeypatch.setattr("rlhf_ray.distributed.jobs.JobServer.follow", follow)
    running = job("a-1", "RUNNING")
    running["metadata"]["run_dir"] = "/mnt/my runs/a"
    with serving(Dashboard(token=TOKEN, jobs=[running])) as dashboard:
        assert exit_code("a-1", "generator=3", "--detach", "--address", dashboard.address) == 1
    words = "python -m rlhf_ray scale '/mnt/my runs/a' generator=3 --timeout-s 3600 --detach"
    assert sent[0][1] == f"exec {words}"
    assert sent[0][0].startswith("scale-a-1-")
