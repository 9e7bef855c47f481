"""Tiny PPO pipelines for the tests that run them whole, and what is equal between two runs."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from rlhf_ray.config import schema
from rlhf_ray.pipeline import run_pipeline
from rlhf_ray.trainers.metric_rows import read_metrics
from tests.tiny_models import TEXTS, make_llama

REWARDS = '''
def vowels(prompts, responses, answers):
    """Share of the response's characters that are vowels."""
    return [sum(c in "aeiou" for c in response.lower()) / max(1, len(response)) for response in responses]
'''

TIME_OR_MEMORY = re.compile(r"time/|time_s$|_per_s$|busy_share$|cpu_share$|memory|elapsed")


def tiny_ppo(folder: Path, *, run: str = "run", **changes: Any) -> schema.Pipeline:
    """A PPO pipeline of a 2-layer Llama below `folder`; `changes` are settings of the stage."""
    model = make_llama(folder / "llama")
    (folder / "tiny_rewards.py").write_text(REWARDS)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": " ".join(text.split()[:6])}) + "\n" for text in TEXTS[::9]))
    stage: dict[str, Any] = {
        "method": "ppo",
        "iterations": 2,
        "prompts_per_iteration": 8,
        "mini_batches": 2,
        "policy": {"model": model, "optimizer": {"learning_rate": 1e-3}},
        "reward": [{"kind": "function", "function": "tiny_rewards:vowels"}],
        "data": {"train": str(prompts), "evaluation": {"path": str(prompts), "rows": 6}},
        "sampling": {"max_new_tokens": 12},
        "evaluation": {"every": 0},
        "checkpoints": {"every": 0},
    }
    return schema.Pipeline.model_validate(
        {
            "run_dir": str(folder / run),
            "seed": 3,
            "placement": {"call_timeout_s": 120, "start_timeout_s": 240},
            "stages": [merged(stage, changes)],
        }
    )


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` put in, sections merged."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def run(config: schema.Pipeline, folder: Path, *, resume: bool = False) -> list[dict[str, Any]]:
    """Runs the pipeline to its end; its metrics rows."""
    run_pipeline(config, pipeline_dir=folder, resume=resume)
    return read_metrics(Path(config.run_dir))


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics that two runs of the same pipeline have in common: all but times, rates and memory."""
    return [{name: value for name, value in row.items() if not TIME_OR_MEMORY.search(name)} for row in rows]


def weights_digest(run_dir: str | Path, stage: str = "ppo") -> str:
    """SHA-256 of the final model's weights."""
    files = sorted((Path(run_dir) / stage / "model").glob("*.safetensors"))
    assert files, f"no weights below {run_dir}"
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
