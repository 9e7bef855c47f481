"""What the steps of a run cost, and the data that the runs read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_ray.bench import workload
from rlhf_ray.bench.end_to_end import Course, write_pairs, write_texts
from rlhf_ray.data.encoding import Encoder

ROWS = [{"iteration": step, "policy/tokens": 100.0 * step} for step in range(1, 6)]
# Seconds, and CPU seconds, at the end of each step.
ENDS = [(10.0, 1.0), (20.0, 4.0), (40.0, 9.0), (70.0, 16.0), (110.0, 25.0)]


def test_the_cost_of_the_steps_after_the_warm_up() -> None:
    """Steps 3 and 4: from the end of step 2 to the end of step 4; the last one is left out."""
    done = Course(ROWS, ENDS).cost("policy/tokens", first=3)
    assert (done.units, done.cpu_s, done.wall_s) == (700.0, 12.0, 50.0)
    assert done.per_cpu_second == pytest.approx(700 / 12)
    assert done.per_second == 14.0


def test_too_few_steps() -> None:
    with pytest.raises(ValueError, match="2 steps leave none after the warm-up of 1"):
        Course(ROWS[:2], ENDS[:2]).cost("policy/tokens")


def test_the_peak_memory_of_each_role() -> None:
    rows = [{"policy/peak_memory_gib": 1.5}, {"policy/peak_memory_gib": 2.0, "reward/a/peak_memory_gib": 0.5}]
    assert Course(rows, ENDS[:2]).peak_memory_gib() == {"policy": 2.0, "reward/a": 0.5}


def test_texts_are_read_as_the_tokens_that_were_drawn(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write_texts(tmp_path / "texts.jsonl", 50).read_text().splitlines()]
    encoder = Encoder.of(workload.tokenizer())
    found = encoder.answers([row["prompt"] for row in rows], [row["response"] for row in rows], [""] * 50)
    prompts, responses = workload.prompts(50), workload.responses(50)
    assert [prompt for prompt, _ in found] == prompts
    # A response of the end alone has one more token; one that was cut gets an end here.
    expected = [answer if answer[-1] == 0 else [*answer, 0] for answer in responses]
    assert [answer for _, answer in found] == [answer if len(answer) > 1 else [1, 0] for answer in expected]


def test_pairs_are_read_as_the_tokens_that_were_drawn(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write_pairs(tmp_path / "pairs.jsonl", 20).read_text().splitlines()]
    encoder = Encoder.of(workload.tokenizer())
    for side, place in (("chosen", 1), ("rejected", 2)):
        found = encoder.answers([row["prompt"] for row in rows], [row[side] for row in rows], [""] * 20)
        assert found == [(pair[0], pair[place]) for pair in workload.pairs(20)]
