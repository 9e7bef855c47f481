"""Golden runs: the losses, rewards, KL and gradient norms of two tiny runs of the whole stack, as they were recorded.

Every other test says what is right; this one says that nothing has changed, and finds the change that nobody meant.
The tolerance is for other CPUs, whose vector units add in another order (float32: about 1e-7 at each sum, a few 1e-5
after some optimizer steps); a changed formula, seed or order of rows moves these numbers by more than that.

After a change that is meant to change them, record them anew, read the difference, and commit it with the change:

    RLHF_RAY_RECORD_GOLDEN=1 python -m pytest tests/integration/test_golden.py -rs
    git diff tests/integration/golden
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import schema
from rlhf_ray.distributed.placement import Cluster
from tests.integration.tiny_runs import run, tiny_ppo

RECORD = "RLHF_RAY_RECORD_GOLDEN"
GOLDEN = Path(__file__).parent / "golden"

PPO_METRICS = (
    "reward/mean",
    "reward/std",
    "response/length_mean",
    "kl/per_sequence",
    "kl/k3",
    "advantage/std",
    "policy/loss",
    "policy/approx_kl",
    "policy/entropy",
    "policy/grad_norm",
    "critic/loss",
    "critic/value_mean",
    "critic/grad_norm",
    "evaluation/reward_mean",
)
SFT_METRICS = (
    "policy/loss",
    "policy/grad_norm",
    "policy/learning_rate",
    "policy/tokens",
    "evaluation/loss",
)


def tiny_sft(folder: Path) -> schema.Pipeline:
    """Six steps of a fresh Llama on film reviews."""
    stage = {
        "method": "sft",
        "steps": 6,
        "batch_size": 8,
        "policy": {
            "model": {"family": "llama", "vocab_size": 320, "max_length": 128},
            "optimizer": {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 2},
        },
        "data": {
            "train": {"path": "synthetic:reviews", "rows": 48},
            "evaluation": {"path": "synthetic:reviews", "split": "test", "rows": 8},
            "max_length": 96,
        },
        "evaluation": {"every": 3},
        "checkpoints": {"every": 0},
    }
    return schema.Pipeline.model_validate({"run_dir": str(folder / "run"), "seed": 5, "stages": [stage]})


def check(name: str, rows: list[dict[str, Any]], metrics: tuple[str, ...]) -> None:
    """Compares the metrics with the recorded ones; records them, and skips, where that is asked for."""
    found = [{key: row[key] for key in ("iteration", *metrics) if key in row} for row in rows]
    assert {key for row in found for key in row} == {"iteration", *metrics}
    path = GOLDEN / f"{name}.json"
    if os.environ.get(RECORD) == "1":
        path.write_text(json.dumps(found, indent=1) + "\n")
        pytest.skip(f"{RECORD} is set: recorded {path}, compared nothing")
    recorded = json.loads(path.read_text())
    assert [row.keys() for row in found] == [row.keys() for row in recorded]
    different = [
        f"iteration {row['iteration']}, {key}: {row[key]!r}, recorded {before[key]!r}"
        for row, before in zip(found, recorded, strict=True)
        for key in row
        if row[key] != pytest.approx(before[key], rel=1e-4, abs=1e-6)
    ]
    assert not different, "\n".join([*different, f"If this is meant: {RECORD}=1, see {__name__}"])


def test_ppo(tmp_path: Path, cluster: Cluster) -> None:
    """GAE with a critic, two mini-batches, KL in the reward; sampled by vLLM."""
    config = tiny_ppo(
        tmp_path,
        kl={"coefficient": 0.1},
        critic={"optimizer": {"learning_rate": 1e-3}},
        evaluation={"temperature": 1.0},
    )
    check("ppo", run(config, tmp_path), PPO_METRICS)


def test_sft(tmp_path: Path, cluster: Cluster) -> None:
    """A fresh model and its tokenizer, packed rows, warm-up and cosine schedule."""
    check("sft", run(tiny_sft(tmp_path), tmp_path), SFT_METRICS)
