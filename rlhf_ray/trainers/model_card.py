"""The model card: what a model is, how it was made and how it did, as the README.md of its directory."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.config.paths import ADAPTER_CONFIG
from rlhf_ray.trainers.durable import write_text

_METHODS = {"sft": "supervised fine-tuning", "reward_model": "the Bradley-Terry loss on preferences", "ppo": "PPO"}
_PREFERENCE_LOSSES = {"sigmoid": "DPO", "ipo": "IPO", "simpo": "SimPO", "orpo": "ORPO"}
_SECRET_NAME = re.compile(r"(^|_)(key|secret|password|passwd|token|credentials?|auth)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|AKIA[A-Z0-9]{12,})|(?<=://)[^/@\s]*:[^/@\s]*(?=@)"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def write_model_card(
    model_dir: Path,
    *,
    title: str,
    method: str,
    base_model: str | None,
    settings: Mapping[str, Any],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> None:
    """Writes README.md with the hub's front matter, the metrics and the resolved settings, secrets taken out.

    Args:
        model_dir: the model's directory.
        title: heading, such as the names of run and stage.
        method: method of the stage that made it.
        base_model: what it was trained from; named in the front matter where it is a hub name. None: a fresh model.
        settings: the stage's settings, nested.
        before: metrics before training; may be empty.
        after: metrics at the end.
    """
    front: dict[str, Any] = {
        "library_name": "peft" if (model_dir / ADAPTER_CONFIG).exists() else "transformers",
        "pipeline_tag": "text-classification" if method == "reward_model" else "text-generation",
        "tags": ["rlhf_ray", "rlhf", method],
    }
    if base_model and _HUB_NAME.fullmatch(base_model) and not Path(base_model).exists():
        front["base_model"] = base_model
    rows = [f"| `{name}` | {_value(before.get(name))} | {_value(value)} |" for name, value in sorted(after.items())]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {title}",
        "",
        f"Trained with rlhf_ray by {_made_by(method, settings)}"
        + (f" from `{base_model}`." if base_model else " from a fresh model."),
        "",
        "## Metrics",
        "",
        *(["| metric | before | after |", "|---|---|---|", *rows] if rows else ["None were measured."]),
        "",
        "## Settings",
        "",
        "```yaml",
        yaml.safe_dump(redact(dict(settings)), sort_keys=False, allow_unicode=True).strip(),
        "```",
        "",
    ]
    write_text(model_dir / "README.md", "\n".join(lines))


def redact(value: Any, name: str = "") -> Any:
    """Settings with every string that looks like a secret, by its name or by its form, replaced by `(removed)`."""
    if isinstance(value, Mapping):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, name) for item in value]
    if not isinstance(value, str):
        return value
    return "(removed)" if _SECRET_NAME.search(name) else _SECRET_VALUE.sub("(removed)", value)


def _made_by(method: str, settings: Mapping[str, Any]) -> str:
    if method == "dpo":
        return f"{_PREFERENCE_LOSSES[settings['loss']['kind']]} on preferences"
    return _METHODS[method]


def _value(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if math.isfinite(value) else "not a number"
