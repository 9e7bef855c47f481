"""The pipelines on helpful dialogues, whole, on two CPU cores: a small model and the pairs below ../shared/data.

    python benchmarks/hh.py rlhf_hh dpo_hh --json benchmarks/results/hh.json

For each pipeline: the share of the test pairs that the reward model, or DPO's implicit reward, orders as people did,
with a 95 % interval (Wilson, 1927), beside the share that preferring the longer answer gets right; for PPO the learned
reward of held-out prompts before and after, and the KL per sequence. The model knows children's stories only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlhf_ray.config import schema
from rlhf_ray.config.load import load_pipeline
from rlhf_ray.data.preferences import PreferenceSet
from rlhf_ray.stages.site import load_data
from rlhf_ray.trainers.metric_rows import read_metrics
from rlhf_ray.trainers.preference_report import wilson_interval

ROOT = Path(__file__).parents[1]
MODEL = "../shared/data/models/stories260k-llama-hd32"
PAIRS = "../shared/data/preference/hh-helpful-base"
SPLITS = (("train", "train"), ("evaluation", "test"))


def overrides(pipeline: str) -> list[str]:
    """What makes a pipeline small: model, data, sizes; relative to the project's folder."""
    stages = {"rlhf_hh": ("sft", "reward_model", "ppo"), "dpo_hh": ("sft", "dpo")}[pipeline]
    found = [
        f"sft.policy={{model: {MODEL}, optimizer: {{learning_rate: 1e-3, schedule: cosine}}}}",
        "sft.batch_size=32",
        "sft.evaluation.every=25",
    ]
    for stage in stages:
        found += [f"{stage}.data.{what}={{path: {PAIRS}.{split}.jsonl.gz}}" for what, split in SPLITS]
    if pipeline == "dpo_hh":
        return [
            *found,
            "dpo.policy={model: stage:sft, optimizer: {learning_rate: 1e-4, schedule: linear}}",
            "dpo.reference={}",
            "dpo.generator={}",
            "dpo.batch_size=32",
            "dpo.evaluation={every: 25, prompts: 32, temperature: 1.0, max_new_tokens: 64}",
        ]
    return [
        *found,
        "reward_model.policy={model: stage:sft, optimizer: {learning_rate: 5e-4, schedule: cosine}}",
        "reward_model.batch_size=32",
        "reward_model.evaluation.every=25",
        "ppo.policy={model: stage:sft, optimizer: {learning_rate: 1e-4}}",
        "ppo.critic={optimizer: {learning_rate: 1e-3}}",
        "ppo.reference={}",
        "ppo.generator={}",
        "ppo.reward.0.dtype=float32",
        "ppo.iterations=20",
        "ppo.prompts_per_iteration=64",
        "ppo.sampling.max_new_tokens=64",
        "ppo.kl.horizon=640",
        "ppo.evaluation.every=10",
    ]


def judge(run: Path, config: schema.Pipeline) -> list[dict[str, Any]]:
    """The figures of each stage of a finished run."""
    found: list[dict[str, Any]] = []
    for stage in config.stages:
        rows = read_metrics(run, stage.name)
        first, last = rows[0], rows[-1]
        figures: dict[str, Any] = {"pipeline": run.name, "stage": stage.name, "steps": last["iteration"]}
        figures["seconds"] = sum(row.get("time/iteration_s", 0.0) for row in rows)
        if isinstance(stage, schema.Ppo):
            for name in ("reward_mean", "distinct_bigram_share"):
                figures |= {f"{name}_before": first[f"evaluation/{name}"], f"{name}_after": last[f"evaluation/{name}"]}
            figures["kl_per_sequence"] = last["kl/per_sequence"]
        elif isinstance(stage, schema.Sft):
            figures["loss"] = last["evaluation/loss"]
        else:
            pairs = load_data(stage, str(run / "sft/model"), config.seed).held_out
            assert isinstance(pairs, PreferenceSet), "the stage learns from pairs"
            low, high = wilson_interval(last["evaluation/accuracy"], len(pairs))
            figures |= {"pairs": len(pairs), "accuracy": last["evaluation/accuracy"], "low": low, "high": high}
            figures["accuracy_of_the_longer"] = longer_is_preferred(pairs)
        found.append(figures)
    return found


def longer_is_preferred(pairs: PreferenceSet) -> float:
    """The share of pairs whose chosen answer has more tokens; equal lengths count half."""
    both = pairs.all()
    difference = (both.chosen.response_mask.sum(1) - both.rejected.response_mask.sum(1)).sign()
    return float((difference + 1).double().mean() / 2)


def main() -> None:
    """Runs the pipelines asked for and prints a line for each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="*", default=["rlhf_hh", "dpo_hh"])
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    figures = []
    for name in arguments.pipelines:
        file, small = f"pipelines/{name}.yaml", overrides(name)
        subprocess.run([sys.executable, "-m", "rlhf_ray", "run", file, *small], cwd=ROOT, check=True)
        config = load_pipeline(ROOT / file, small)
        figures += judge(ROOT / config.run_dir, config)
    for row in figures:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
