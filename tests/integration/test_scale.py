"""Generators that come and go while a run goes on: the result is that of a run with a constant number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import schema
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.trainers.trace import read_trace
from tests.integration.tiny_runs import comparable, merged, run, tiny_ppo, weights_digest

# Counts its calls, one for each iteration, and writes the wish that is due.
REWARDS = """
from pathlib import Path

from rlhf_ray.trainers.scale_file import wish_for

calls = 0


def vowels_and_wishes(prompts, responses, answers, run_dir, wishes):
    global calls
    calls += 1
    if str(calls) in wishes:
        wish_for(Path(run_dir), stage="ppo", generator=wishes[str(calls)])
    return [sum(c in "aeiou" for c in response.lower()) / max(1, len(response)) for response in responses]
"""
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
