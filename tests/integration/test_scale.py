"""Generators that come and go while a run goes on: the result is that of a run with a constant number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_ray.config import schema
from rlhf_ray.config.load import dump_pipeline
from rlhf_ray.distributed.groups import Place
from rlhf_ray.distributed.placement import Cluster, Growth, RoleRequest
from rlhf_ray.errors import DataError
from rlhf_ray.trainers.journal import read_rollouts
from rlhf_ray.trainers.metric_rows import read_metrics
from rlhf_ray.trainers.scale_file import read_standing
from rlhf_ray.trainers.trace import read_trace
from tests.integration.tiny_runs import comparable, merged, run, tiny_ppo, weights_digest

ROOT = Path(__file__).parents[2]
# In the iteration after the last one that has metrics it writes the wish that is due.
REWARDS = '''
from pathlib import Path

from rlhf_ray.trainers.scale_file import wish_for


def vowels_and_wishes(prompts, responses, answers, run_dir, wishes):
    """Share of the response's characters that are vowels."""
    iteration = 1 + (Path(run_dir) / "metrics.jsonl").read_text().count("\\n")
    if str(iteration) in wishes:
        wish_for(Path(run_dir), stage="ppo", generator=wishes[str(iteration)])
    return [sum(c in "aeiou" for c in response.lower()) / max(1, len(response)) for response in responses]
'''
# Wished for while iterations 1 and 3 are judged; read at the beginning of the next one, true from the one after that.
WISHES = {"1": 2, "3": 1}


def six_iterations(folder: Path, name: str, *, wishes: dict[str, int], **changes: Any) -> schema.Pipeline:
    """A run that leaves two of the tests' four cores to generators, each of one core as in other tests."""
    (folder / "tiny_wishes.py").write_text(REWARDS)
    arguments = {"run_dir": str(folder / name), "wishes": wishes}
    reward = {"kind": "function", "function": "tiny_wishes:vowels_and_wishes", "arguments": arguments, "cpus": 0.5}
    settings: dict[str, Any] = {
        "iterations": 6,
        "policy": {"cpus": 0.5},
        "generator": {"cpus": 1},
        "reward": [reward],
        "advantages": {"estimator": "leave_one_out"},
        "sampling": {"samples_per_prompt": 2},
        "kl": {"place": "off"},
        "data": {"evaluation": None},
    }
    return tiny_ppo(folder, run=name, **merged(settings, changes))


def without_number(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "generator/workers"} for row in comparable(rows)]


def test_one_comes_and_one_goes(tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    constant = run(six_iterations(tmp_path, "constant", wishes={}), tmp_path)
    capsys.readouterr()
    scaled = run(six_iterations(tmp_path, "scaled", wishes=WISHES), tmp_path)
    assert [row["generator/workers"] for row in constant] == [1, 1, 1, 1, 1, 1]
    assert [row["generator/workers"] for row in scaled] == [1, 1, 2, 2, 1, 1]
    said = capsys.readouterr().out
    assert "generator: 1 -> 2 workers from iteration 3" in said
    assert "generator: 2 -> 1 workers from iteration 5" in said

    assert weights_digest(tmp_path / "scaled") == weights_digest(tmp_path / "constant")
    assert without_number(scaled) == without_number(constant)
    assert sampled_by(tmp_path / "constant") == [{0}] * 6
    assert sampled_by(tmp_path / "scaled") == [{0}, {0}, {0, 1}, {0, 1}, {0}, {0}]
    assert not (tmp_path / "scaled/workers.json").exists()


def sampled_by(run_dir: Path) -> list[set[int]]:
    """The ranks of the generators that sampled each iteration, by the run's trace."""
    events = read_trace(run_dir / "trace.json")
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    calls = [event for event in events if event["name"] == "next_finished" and names[event["pid"]] == "generator"]
    return [{call["tid"] for call in calls if call["args"]["iteration"] == number} for number in range(1, 7)]


class Worker:
    """Says who it is; it cannot be made where the file is."""

    def __init__(self, place: Place, *, broken: Path) -> None:
        if broken.exists():
            raise DataError("no such model")
        self.place = place

    def who(self) -> tuple[int, int]:
        return self.place.rank, os.getpid()

    def echo(self, numbers: list[int]) -> list[int]:
        return numbers


def build(growth: Growth[Worker], *, missing: int) -> None:
    """Starts workers until no more are missing than these; what was given back may take Ray a while to free."""
    deadline = time.monotonic() + 60
    growth.build()
    while growth.missing > missing:
        assert time.monotonic() < deadline, growth.shortage()
        growth.build()


def test_a_group_grows_into_the_room_that_there_is(tmp_path: Path, cluster: Cluster) -> None:
    """One comes, for a second there is no room; one that cannot be made leaves the group as it was."""
    broken = tmp_path / "broken"
    with cluster.reserve([RoleRequest("worker", cpus=2, reuse=str(tmp_path))]) as placement:
        group = placement.start("worker", Worker, broken=broken)
        first = group.all(Worker.who).result()
        growth: Growth[Worker] = placement.grow("worker", 2)
        build(growth, missing=1)
        growth.join()
        assert (growth.missing, growth.waits) == (1, False)
        assert growth.shortage() == "no room for 1 more: each needs 2 CPUs; 0 of 4 CPUs are free"
        ranks, processes = zip(*group.all(Worker.who).result(), strict=True)
        assert ranks == (0, 1)
        assert (ranks[0], processes[0]) == first[0]
        assert group.split(Worker.echo, [1, 2, 3]).result() == [1, 2, 3]

        placement.shrink("worker", 1)
        assert group.all(Worker.who).result() == first
        assert not psutil.pid_exists(processes[1])

        broken.touch()
        failing: Growth[Worker] = placement.grow("worker", 1)
        build(failing, missing=0)
        with pytest.raises(DataError, match="worker rank 1, start: no such model"):
            failing.join()
        assert group.all(Worker.who).result() == first
        # Its room is free again, and that of one which nobody waits for as well.
        for _ in range(2):
            again: Growth[Worker] = placement.grow("worker", 1)
            assert again.waits
            again.close()


@pytest.mark.slow
@pytest.mark.parametrize("interrupted", ["wait", "keep", "abandon"])
def test_one_goes_and_one_comes_while_samples_are_ahead(
    interrupted: str, tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the leaving one has not finished begins anew; each sample is used once."""
    # Two at a time: when six of a generator's eight have ended, the last two have not begun.
    two = {"workers": 2, "max_sequences": 2}
    ahead = {"staleness": 1, "interrupted": interrupted, "generator": two}
    scaled = run(six_iterations(tmp_path, "scaled", wishes={"1": 1, "3": 2}, **ahead), tmp_path)
    assert [row["generator/workers"] for row in scaled] == [2, 2, 1, 1, 2, 2]
    said = capsys.readouterr().out
    assert ("2 -> 1 workers from iteration 3; 2 unfinished responses begin anew" in said) == (interrupted != "wait")
    for iteration in range(1, 7):
        rollouts = read_rollouts(tmp_path / f"scaled/ppo/rollouts/iteration_{iteration:06}.parquet").rollouts
        assert len(rollouts) == 16
        assert sorted(Counter(rollouts.prompt_ids.tolist()).values()) == [2] * 8
        assert len({tuple(row) for row in rollouts.sequences.tokens.tolist()}) == 16
        versions = rollouts.policy_versions[rollouts.sequences.response_mask]
        assert versions.min() == max(0, iteration - 2)
        assert versions.max() == (max(0, iteration - 2) if interrupted == "wait" else iteration - 1)
    if interrupted == "wait":
        constant = run(six_iterations(tmp_path, "constant", wishes={}, **ahead), tmp_path)
        assert weights_digest(tmp_path / "scaled") == weights_digest(tmp_path / "constant")
        assert without_number(scaled) == without_number(constant)


@pytest.mark.slow
def test_the_command_and_a_run_of_its_own(tmp_path: Path) -> None:
    """On a Ray of its own with two free cores there is room for two more, and for no third."""
    config = six_iterations(tmp_path, "own", wishes={}, iterations=500, generator={"engine": "hf", "cpus": 0.5})
    file = tmp_path / "own.yaml"
    file.write_text(dump_pipeline(config))
    command = [sys.executable, "-m", "rlhf_ray"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}

    def scale(wanted: str) -> subprocess.CompletedProcess[str]:
        arguments = ["scale", config.run_dir, wanted, "--timeout-s", "120"]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=180, cwd=ROOT)

    with subprocess.Popen([*command, "run", str(file)], env=environment, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 180
            while read_standing(tmp_path / "own") is None:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert scale("generator=2").returncode == 0
            short = scale("generator=99")
            assert short.returncode == 1
            assert "each needs 0.5 CPUs" in short.stderr
            fewer = scale("generator=1")
            assert fewer.returncode == 0
            assert fewer.stdout.startswith("ppo: 1 generators from iteration ")
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) == 143
    rows = read_metrics(tmp_path / "own")
    assert {row["generator/workers"] for row in rows} >= {1, 2}
    assert read_standing(tmp_path / "own") is None
