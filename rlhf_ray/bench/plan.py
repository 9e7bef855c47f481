"""What a plan says before a run, over what the run then takes: peak memory of every role, seconds of an iteration.

PPO with prompts and responses that are all as long as the settings allow, so that the plan's longest rows are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rlhf_ray.bench import end_to_end, workload
from rlhf_ray.bench.figures import Figure, Settings, from_pairs
from rlhf_ray.bench.ppo import save_reward_model
from rlhf_ray.trainers.metric_rows import PLAN_FILE


@dataclass(frozen=True)
class Size:
    """A run with networks of one size.

    Args:
        needs_gib: memory without which it is left out.
        prompts: in an iteration.
        changes: of the stage's settings.
    """

    needs_gib: float
    prompts: int
    changes: Mapping[str, Any]


SIZES: dict[workload.Size, Size] = {
    "s": Size(needs_gib=5, prompts=32, changes={}),
    "sm": Size(needs_gib=8, prompts=12, changes={}),
    # Without a critic, whose memory is that of a second policy.
    "l": Size(needs_gib=12, prompts=2, changes={"advantages": {"estimator": "leave_one_out"}}),
}
WITHIN = 0.2
"""By how much a role's planned memory may differ from its measured one."""
PROMPT, RESPONSE = 64, 128
_ITERATIONS = 2


def measure(settings: Settings) -> list[Figure]:
    """Planned over measured, one run for each size: a process's peak is the same in every run."""
    found = []
    for name, size in list(SIZES.items())[: 1 if settings.quick else None]:
        free = psutil.virtual_memory().available / 2**30
        if free < size.needs_gib:
            settings.say(f"size {name} needs {size.needs_gib:g} GiB, {free:.1f} are free: left out")
        else:
            found += of_size(settings, name, size)
    return found


def of_size(settings: Settings, name: workload.Size, size: Size) -> list[Figure]:
    """One run with networks of this size in all roles."""
    settings.say(f"PPO with models of size {name}")
    folder = settings.folder / name
    folder.mkdir()
    model = workload.save_model(folder / "model", name)
    reward = save_reward_model(model, folder / "reward_model")
    end_to_end.write_prompts(folder / "prompts.jsonl", workload.prompts(64, shortest=PROMPT, longest=PROMPT))
    lengths = {"min_new_tokens": RESPONSE, "max_new_tokens": RESPONSE}
    stage = {
        "method": "ppo",
        "iterations": _ITERATIONS,
        "prompts_per_iteration": size.prompts,
        "policy": {"model": str(model)},
        "reward": [{"kind": "model", "model": str(reward)}],
        "sampling": {**lengths, "samples_per_prompt": 2 if "advantages" in size.changes else 1},
        "data": {"train": str(folder / "prompts.jsonl"), "max_prompt_tokens": PROMPT},
        **size.changes,
    }
    # A Ray of its own for each size, so that no process has had a larger model before.
    with end_to_end.local_ray():
        course = end_to_end.run(stage, folder / "run")
    return figures(name, folder / "run", course.peak_memory_gib(), course.rows)


def figures(size: str, run_dir: Path, peaks: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Planned over measured memory of each role, with its bounds, and seconds of an iteration, without."""
    planned = json.loads((run_dir / PLAN_FILE).read_text(encoding="utf-8"))["stages"]["ppo"]
    found = [
        from_pairs(
            f"plan/memory/{size}/{role.removesuffix('/model')}",
            [(planned["memory_gib"][role], peak)],
            unit="GiB",
            at_least=1 - WITHIN,
            at_most=1 + WITHIN,
        )
        for role, peak in peaks.items()
    ]
    seconds = [(planned["iteration_s"], float(row["time/iteration_s"])) for row in rows[1:]]
    return [*found, from_pairs(f"plan/seconds/{size}/iteration", seconds, unit="s")]
