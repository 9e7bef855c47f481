"""Our pipelines, by name, and the models and data that both sides read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from rlhf_ray.bench.workload import pairs, prompts, save_model, text, tokenizer

PAIRS, PROMPTS, VOCABULARY = 64, 256, 4095
"""Pairs are two optimizer steps. The last token of the vocabulary is in no text, so that TRL may pad with it."""

_REWARD = '''
def length(prompts, responses, answers):
    """The number of characters."""
    return [float(len(response)) for response in responses]
'''

_SUPERVISED: dict[str, Any] = {"batch_size": 32, "checkpoints": {"every": 0}}


def write_inputs(folder: Path) -> None:
    """`model/`, `reward/`, and the rows of each kind of data."""
    model = save_model(folder / "model")
    torch.manual_seed(1)
    judge = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    judge.save_pretrained(folder / "reward")
    tokenizer().save_pretrained(folder / "reward")
    answers = pairs(PAIRS, vocab_size=VOCABULARY)
    # Both sides end an answer themselves; the space keeps its first word apart from the prompt's last one.
    rows = [(text(prompt), " " + text(chosen[:-1]), " " + text(other[:-1])) for prompt, chosen, other in answers]
    _write(folder / "pairs.jsonl", [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows])
    _write(folder / "sft.jsonl", [{"prompt": p, "completion": c} for p, c, _ in rows])
    _write(folder / "prompts.jsonl", [{"prompt": text(row)} for row in prompts(PROMPTS, vocab_size=VOCABULARY)])


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sft(folder: Path, dtype: str, steps: int) -> dict[str, Any]:
    """Prompts and answers, the loss on the answers."""
    return {
        "method": "sft",
        "steps": steps,
        "policy": _policy(folder, dtype),
        "data": {"train": str(folder / "sft.jsonl"), "columns": {"response": "completion"}},
        **_SUPERVISED,
    }


def reward_model(folder: Path, dtype: str, steps: int) -> dict[str, Any]:
    """A score read at the end of each answer."""
    return {
        "method": "reward_model",
        "steps": steps,
        "policy": _policy(folder, dtype),
        "data": {"train": str(folder / "pairs.jsonl")},
        **_SUPERVISED,
    }


def dpo(folder: Path, dtype: str, steps: int) -> dict[str, Any]:
    """The reference asked in every epoch."""
    return {
        "method": "dpo",
        "steps": steps,
        "policy": _policy(folder, dtype),
        "reference": {"dtype": dtype},
        "data": {"train": str(folder / "pairs.jsonl")},
        "cache": False,
        **_SUPERVISED,
    }


def dpo_cached(folder: Path, dtype: str, steps: int) -> dict[str, Any]:
    """The reference asked in the first epoch, which is not measured."""
    cache = folder / "runs" / "dpo_cached" / "cache"
    return dpo(folder, dtype, steps) | {"cache": True, "cache_dir": str(cache)}


def ppo(folder: Path, dtype: str, steps: int) -> dict[str, Any]:
    """Policy, critic, reference and reward model of one size; one optimizer step on 64 samples."""
    return _sampling(folder, dtype, steps) | {
        "prompts_per_iteration": 64,
        "critic": {"dtype": dtype},
        "reward": [{"kind": "model", "model": str(folder / "reward"), "dtype": dtype}],
        "sampling": {"max_new_tokens": 128},
    }


def grpo(folder: Path, dtype: str, steps: int) -> dict[str, Any]:
    """Eight samples of each of eight prompts; no critic, a function as reward, the KL as a term of the loss."""
    (folder / "runs" / "grpo").mkdir(parents=True, exist_ok=True)
    (folder / "runs" / "grpo" / "peer_rewards.py").write_text(_REWARD, encoding="utf-8")
    return _sampling(folder, dtype, steps) | {
        "prompts_per_iteration": 8,
        "reward": [{"kind": "function", "function": "peer_rewards:length"}],
        "advantages": {"estimator": "group_relative"},
        "kl": {"place": "loss", "estimator": "k3", "coefficient": 0.001},
        "scores": {"clip": 0.0},
        "sampling": {"max_new_tokens": 128, "samples_per_prompt": 8},
    }


def _sampling(folder: Path, dtype: str, steps: int) -> dict[str, Any]:
    return {
        "method": "ppo",
        "iterations": steps,
        "policy": _policy(folder, dtype),
        "reference": {"dtype": dtype},
        "generator": {"dtype": dtype, "max_sequences": 128},
        "data": {"train": str(folder / "prompts.jsonl")},
        "checkpoints": {"every": 0},
    }


def _policy(folder: Path, dtype: str) -> dict[str, Any]:
    return {"model": str(folder / "model"), "dtype": dtype, "optimizer": {"learning_rate": 1e-6}}


STAGES: dict[str, Callable[[Path, str, int], dict[str, Any]]] = {
    stage.__name__: stage for stage in (sft, reward_model, dpo, dpo_cached, ppo, grpo)
}
"""A stage of a pipeline file of the inputs' folder, the dtype and the number of steps."""
