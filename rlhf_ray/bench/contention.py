"""PPO beside a foreign process that keeps one core busy, against PPO alone: iterations of one run, in turns."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rlhf_ray.bench import end_to_end, workload
from rlhf_ray.bench.figures import Figure, Settings, from_pairs
from rlhf_ray.bench.ppo import save_reward_model, stage

_SAMPLES = 32
_WARM_UP = 2
_LENGTH = "response/length_mean"


class Neighbour:
    """A process that computes without end, and is halted before every other step of a run."""

    def __init__(self, process_id: int) -> None:
        self._process_id = process_id
        self._busy = False

    def look(self) -> Mapping[str, float]:
        """Whether it was busy during the step that has just ended; changes that for the next."""
        before, self._busy = self._busy, not self._busy
        os.kill(self._process_id, signal.SIGCONT if self._busy else signal.SIGSTOP)
        return {"busy": float(before)}


@contextmanager
def neighbour() -> Iterator[Neighbour]:
    """Such a process, halted at first; gone at the end."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            process.send_signal(signal.SIGSTOP)
            yield Neighbour(process.pid)
        finally:
            process.kill()


def measure(settings: Settings) -> list[Figure]:
    """Response tokens per second beside the busy process and alone; with two cores a fair share is half or more."""
    model = workload.save_model(settings.folder / "model")
    save_reward_model(model, settings.folder / "reward_model")
    steps = _WARM_UP + 2 * settings.repeats + 1
    end_to_end.write_prompts(settings.folder / "prompts.jsonl", workload.prompts(steps * _SAMPLES))
    work = {**stage(settings, model, samples=_SAMPLES), "iterations": steps}
    settings.say(f"PPO, {steps} iterations, every other one beside a busy process")
    with neighbour() as beside:
        course = end_to_end.run(work, settings.folder / "run", look=beside.look)
    speeds: dict[bool, list[float]] = {True: [], False: []}
    moments = [ended for ended, _ in course.ends]
    for index, (before, after) in enumerate(itertools.pairwise(moments), start=1):
        if _WARM_UP <= index < len(moments) - 1:
            speed = _SAMPLES * float(course.rows[index][_LENGTH]) / (after - before)
            speeds[bool(course.looks[index]["busy"])].append(speed)
    pairs = list(zip(speeds[True], speeds[False], strict=True))
    return [from_pairs("contention/busy_neighbour", pairs, unit="response tokens per second", at_least=0.45)]
