"""Benchmarks on the real stack: what a run costs is that of its actors as well."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from rlhf_ray.bench import workload
from rlhf_ray.bench.end_to_end import write_texts
from rlhf_ray.bench.figures import cpu_seconds
from rlhf_ray.bench.sft import fine_tune
from rlhf_ray.distributed.placement import Cluster


def test_the_steps_of_a_run_are_watched(cluster: Cluster, tmp_path: Path) -> None:
    model = workload.save_model(tmp_path / "model")
    texts = write_texts(tmp_path / "texts.jsonl", 20)
    course = fine_tune(model, texts, tmp_path / "run", dtype="float32", steps=5, batch_size=4)
    assert [row["iteration"] for row in course.rows] == [1, 2, 3, 4, 5]
    assert len(course.ends) == 5
    assert all(before < after for before, after in itertools.pairwise(course.ends))
    done = course.cost("policy/tokens", first=2)
    assert done.units == sum(row["policy/tokens"] for row in course.rows[1:4])
    # Ray and the learner are counted: its imports alone take seconds.
    assert course.ends[-1][1] > cpu_seconds([os.getpid()]) + 1
