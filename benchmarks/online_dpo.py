"""Does the true reward of held-out prompts rise with each round of collect and dpo? pipelines/online_dpo.yaml by seed.

    python benchmarks/online_dpo.py --seeds 1 2 3 --json benchmarks/results/online_dpo.json
    python benchmarks/online_dpo.py --runs runs/online_dpo_1        # judge runs that are there

For each seed: the mean sentiment, by the grammar's own judge, of reviews to the same held-out openings before the first
round, after it and after the second, with standard errors over openings; the gain of each round and of both, also in
standard errors of the openings' differences; and distinct bigrams.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from rlhf_ray.trainers.metric_rows import read_metrics
from rlhf_ray.trainers.metrics import distinct_bigram_share

ROOT = Path(__file__).parents[1]
PIPELINE = "pipelines/online_dpo.yaml"
ROUNDS = ("dpo_1", "dpo_2")


def judge(run: Path) -> dict[str, Any]:
    """The figures of one run."""
    last = {stage: read_metrics(run, stage)[-1]["iteration"] for stage in ROUNDS}
    samples = {
        "before": _samples(run, "dpo_1", 0),
        "round_1": _samples(run, "dpo_1", last["dpo_1"]),
        "round_2": _samples(run, "dpo_2", last["dpo_2"]),
    }
    figures: dict[str, float] = {}
    for name, frame in samples.items():
        figures[f"reward_{name}"] = float(frame["score"].mean())
        figures[f"error_{name}"] = standard_error(frame["score"])
        figures[f"bigrams_{name}"] = distinct_bigram_share(list(frame["response"]))
    for name, (start, end) in {
        "round_1": ("before", "round_1"),
        "round_2": ("round_1", "round_2"),
        "both": ("before", "round_2"),
    }.items():
        gain = samples[end]["score"] - samples[start]["score"]
        figures[f"gain_{name}"] = float(gain.mean())
        figures[f"gain_{name}_in_errors"] = float(gain.mean() / standard_error(gain))
    return {"run": run.name, "prompts": len(samples["before"])} | figures


def _samples(run: Path, stage: str, step: int) -> pandas.DataFrame:
    """The samples of an evaluation by prompt, one row each."""
    frame = pandas.read_parquet(run / f"{stage}/evaluation/iteration_{step:06}.parquet")
    return frame.set_index("prompt_id").sort_index()


def standard_error(values: pandas.Series) -> float:
    """Of the mean of independent values."""
    return float(values.std() / np.sqrt(len(values)))


def main() -> None:
    """Runs what is asked for and prints one line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, nargs="*", help="judge these run folders instead of running")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    runs = arguments.runs or []
    if not arguments.runs:
        for seed in arguments.seeds:
            run = Path(f"runs/online_dpo_{seed}")
            command = [sys.executable, "-m", "rlhf_ray", "run", PIPELINE, f"run_dir={run}", f"seed={seed}"]
            subprocess.run(command, cwd=ROOT, check=True)
            runs.append(ROOT / run)
    figures = [judge(run) for run in runs]
    print(pandas.DataFrame(figures).T.to_string(header=False, float_format="{:.4g}".format))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
