"""The real driver with stand-ins for 64 generators, 16 scorers and 32 learners, on a Ray of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray.bench.figures import Figure
from rlhf_ray.trainers.journal import read_rollouts
from rlhf_ray.trainers.metric_rows import read_metrics

ITERATIONS = 10
SAMPLES = 2048
SCRIPT = f"""
import json, sys
from pathlib import Path
from rlhf_ray.bench.driver import Scale, figures, simulate
from rlhf_ray.bench.results import as_object
if __name__ == "__main__":
    seen = simulate(Path(sys.argv[1]), iterations={ITERATIONS}, scale=Scale(samples={SAMPLES}), speed=50.0)
    Path(sys.argv[2]).write_text(json.dumps([as_object(figure) for figure in figures(seen)]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Figure]]:
    """The run's folder and its figures by name; an eighth of the samples."""
    folder = tmp_path_factory.mktemp("driver")
    found = folder / "figures.json"
    command = [sys.executable, "-c", SCRIPT, str(folder / "run"), str(found)]
    # The driver's own environment: the memory allocator is set for workers alone.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, timeout=240, stdout=subprocess.DEVNULL)
    figures = [Figure(**values) for values in json.loads(found.read_text())]
    return folder / "run", {figure.name: figure for figure in figures}


def test_the_driver_keeps_up_and_stays_as_small_as_it_is(run: tuple[Path, dict[str, Figure]]) -> None:
    """Its work is held against the time of all samples' work, so a slow machine passes; calls and memory are exact."""
    _, figures = run
    assert [figure for figure in figures.values() if figure.missed] == []
    assert figures["driver/overhead"].at_most == 0.05
    assert figures["driver/memory"].at_most == 1.1
    assert figures["driver/object_store"].value == 0
    # 64 starts and 2 x 64 chunks, in 8 pieces for 48 workers each; 32 updates; to sync, 3 x 64 calls to generators and
    # 2 x 16 to learners; and 112 + 8 questions.
    assert figures["driver/calls"].value == 64 + 128 + 8 * 48 + 32 + 192 + 32 + 120


def test_the_loop_did_its_work(run: tuple[Path, dict[str, Figure]]) -> None:
    folder, _ = run
    rows = read_metrics(folder)
    assert [row["iteration"] for row in rows] == list(range(1, ITERATIONS + 1))
    assert all(row["generator/attested_share"] == 1.0 for row in rows)
    assert all(row["generator/policy_version_lag"] == 0 for row in rows)
    kept = read_rollouts(folder / f"ppo/rollouts/iteration_{ITERATIONS:06}.parquet").rollouts
    assert len(kept) == SAMPLES
    assert kept.oldest_versions().tolist() == [ITERATIONS - 1] * SAMPLES
