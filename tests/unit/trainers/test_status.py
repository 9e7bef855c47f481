"""What a run writes about itself while it goes on."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from rlhf_ray.distributed.tracing import DRIVER, Activity, Recorder, Span
from rlhf_ray.trainers.status import FILE, Slowest, Status, StatusFile, read_status, slowest_worker


def status_file(folder: Path, recorder: Recorder) -> StatusFile:
    return StatusFile(folder / FILE, stage="ppo", stages=["sft", "ppo"], unit="iteration", total=9, recorder=recorder)


def now_in(folder: Path) -> Status:
    status = read_status((folder / FILE).read_text())
    assert status is not None
    return status


def test_the_worker_that_is_behind_the_others() -> None:
    spans = [
        Span("generator", 0, "generate", 0.0, 4.0),
        Span("generator", 1, "generate", 0.0, 3.0),
        Span("generator", 1, "generate", 3.0, 6.5),
        Span("generator", 2, "generate", 0.0, 5.0),
        # Longer, but nobody waits for one of them alone.
        Span("policy", 0, "update", 0.0, 9.0),
        Span("policy", 1, "update", 0.0, 8.9),
        Span("critic", 0, "update", 0.0, 30.0),
        Span("generator", 0, "memory", 0.0, 99.0),
        Span(DRIVER, 0, "iteration", 0.0, 99.0),
    ]
    assert slowest_worker(spans) == Slowest("generator", 1, "generate", 6.5, 4.5)


def test_roles_of_one_worker_each() -> None:
    spans = [Span("policy", 0, "update", 0.0, 2.0), Span("critic", 0, "update", 0.0, 3.0)]
    assert slowest_worker(spans) == Slowest("critic", 0, "update", 3.0, None)
    assert slowest_worker([]) is None


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.begin("generator", "generate", workers=2)
    before = time.time()
    with status_file(tmp_path, recorder) as file:
        first = now_in(tmp_path)
        assert (first.stage, first.stages, first.iteration, first.total) == ("ppo", ("sft", "ppo"), 0, 9)
        assert (first.progress_s, first.slowest, first.outcome) == (None, None, None)
        assert [(call.role, call.method, call.workers) for call in first.active] == [("generator", "generate", 2)]
        file.iteration(3, {"reward/mean": 0.5, "kl/k1": float("nan")}, Slowest("policy", 1, "update", 2.0, 1.0))
        deadline = time.monotonic() + 30
        while (later := now_in(tmp_path)).iteration == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert (later.iteration, later.metrics) == (3, {"reward/mean": 0.5})
    assert later.slowest == Slowest("policy", 1, "update", 2.0, 1.0)
    assert later.progress_s is not None
    assert before <= later.progress_s <= later.written_s
    file.end("done")
    assert now_in(tmp_path).outcome == "done"
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_file_of_another_form_says_nothing() -> None:
    assert read_status("") is None
    assert read_status("[]") is None
    assert read_status(json.dumps({"stage": "ppo"})) is None


def test_a_folder_that_is_gone_ends_no_run(tmp_path: Path) -> None:
    with status_file(tmp_path / "gone", Recorder()) as file:
        file.end("done")
    assert not any(thread.name == "status" for thread in threading.enumerate())


def test_active_calls_come_back_as_they_were() -> None:
    call = Activity("policy", "update", 12.5, 3)
    status = {
        "stage": "a", "stages": ["a"], "unit": "step", "iteration": 1, "total": 2, "outcome": None, "written_s": 1.0,
        "progress_s": None, "metrics": {}, "active": [call.__dict__], "slowest": None,
    }  # fmt: skip
    found = read_status(json.dumps(status))
    assert found is not None
    assert found.active == (call,)
