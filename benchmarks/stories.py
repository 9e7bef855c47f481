"""What PPO does to a small real model: pipelines/ppo_stories.yaml over several seeds, judged on held-out openings.

    python benchmarks/stories.py --seeds 1 2 3 --json benchmarks/results/stories.json
    python benchmarks/stories.py --runs runs/stories_1 runs/stories_2       # judge runs that are there

For each seed: how far the mean reward rose, in standard deviations of the untrained model's samples, with a 95 %
interval over openings; KL per sequence; distinct bigrams against the untrained model's; and the share of words that
occur in the training stories (a response's last word may be cut by the length limit and is left out).
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from scipy.stats import t as student

from rlhf_ray.trainers.metric_rows import read_metrics
from rlhf_ray.trainers.metrics import distinct_bigram_share

ROOT = Path(__file__).parents[1]
PIPELINE = ROOT / "pipelines/ppo_stories.yaml"
STORIES = ROOT.parent / "shared/data/instructions/tinystories.train.jsonl.gz"
WORD = re.compile(r"[a-z']+")


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return WORD.findall(text.lower())


def vocabulary() -> set[str]:
    """Every word of the training stories."""
    with gzip.open(STORIES, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return {word for row in rows for word in words(row["prompt"] + " " + row["response"])}


def judge(run: Path, known: set[str]) -> dict[str, Any]:
    """The figures of one run."""
    rows = [row for row in read_metrics(run, "ppo") if row["iteration"] > 0]
    before, after = (
        pandas.read_parquet(run / f"ppo/evaluation/iteration_{iteration:06}.parquet")
        for iteration in (0, rows[-1]["iteration"])
    )
    by_opening = after.groupby("prompt_id")["score"].mean() - before.groupby("prompt_id")["score"].mean()
    half = student.ppf(0.975, len(by_opening) - 1) * by_opening.std() / np.sqrt(len(by_opening))
    deviation = before["score"].std()
    whole = [
        word
        for text, finished in zip(after["response"], after["finished"], strict=True)
        for word in (words(text) if finished else words(text)[:-1])
    ]
    figures = {
        "iterations": rows[-1]["iteration"],
        "reward_before": before["score"].mean(),
        "reward_after": after["score"].mean(),
        "untrained_std": deviation,
        "gain_in_std": by_opening.mean() / deviation,
        "gain_low": by_opening.mean() - half,
        "gain_high": by_opening.mean() + half,
        "kl_last": rows[-1]["kl/per_sequence"],
        "kl_max": max(row["kl/per_sequence"] for row in rows),
        "bigrams_against_untrained": distinct_bigram_share(list(after["response"]))
        / distinct_bigram_share(list(before["response"])),
        "words_known": float(np.mean([word in known for word in whole])),
        "logprob_diff_mean_max": max(row["generator/logprob_diff_mean"] for row in rows),
        "seconds": sum(row["time/iteration_s"] for row in rows),
    }
    return {"run": run.name} | {name: float(value) for name, value in figures.items()}


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
            run = ROOT / f"runs/stories_{seed}"
            command = [sys.executable, "-m", "rlhf_ray", "run", str(PIPELINE), f"run_dir={run}", f"seed={seed}"]
            subprocess.run(command, cwd=ROOT, check=True)
            runs.append(run)
    figures = [judge(run, vocabulary()) for run in runs]
    print(pandas.DataFrame(figures).to_string(index=False, float_format="{:.4g}".format))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
