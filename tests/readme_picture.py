"""Draws the README's picture: what a terminal shows at the end of a run's last stage, from the run's folder.

python -m tests.readme_picture runs/quickstart pipelines/quickstart.svg
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console

from rlhf_ray.distributed.tracing import Recorder
from rlhf_ray.trainers.checkpoints import folder_name
from rlhf_ray.trainers.metric_rows import read_metrics
from rlhf_ray.trainers.view import LiveView, SamplePair, Summary

COLUMNS = 100
SAMPLES = 2


def draw(run_dir: Path, *, command: str) -> str:
    """The last stage's live view after its last iteration, and its summary, as an SVG."""
    stage = read_metrics(run_dir)[-1]["stage"]
    folder = run_dir / stage
    done = json.loads((folder / "done.json").read_text())
    console = Console(record=True, width=COLUMNS, force_terminal=True, highlight=False, file=io.StringIO())
    console.print(f"[bold green]$[/] {command}\n")
    view = LiveView(stage, done["iteration"], Recorder(), unit="iteration", console=console)
    for row in read_metrics(run_dir, stage):
        numbers = {name: value for name, value in row.items() if name not in ("stage", "iteration")}
        view.iteration(row["iteration"], numbers)
    console.print(view)
    view.summary(
        Summary(
            outputs={"model": folder / done["output"]}
            | ({"best model": folder / done["best"]} if done["best"] else {}),
            before=done["before"],
            after=done["after"],
            samples=_samples(folder / "evaluation", done["iteration"]),
            elapsed_s=done["elapsed_s"],
        )
    )
    return console.export_svg(title=command, unique_id="quickstart")


def _samples(folder: Path, last: int) -> list[SamplePair]:
    columns = ["prompt", "response", "score"]
    before, after = (
        pq.read_table(folder / f"{folder_name(iteration)}.parquet", columns=columns).slice(0, SAMPLES).to_pylist()
        for iteration in (0, last)
    )
    return [
        SamplePair(old["prompt"], old["response"], new["response"], old["score"], new["score"])
        for old, new in zip(before, after, strict=True)
    ]


if __name__ == "__main__":
    run, picture = map(Path, sys.argv[1:])
    picture.write_text(draw(run, command="make quickstart") + "\n")
