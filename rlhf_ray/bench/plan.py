"""What a plan says before a run, over what the run then takes: peak memory of every role, seconds of an iteration.

PPO with prompts and responses that are all as long as the settings allow, so that the plan's longest rows are there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_ray.bench import end_to_end, workload
from rlhf_ray.bench.figures import Figure, Settings, from_pairs
from rlhf_ray.bench.ppo import save_reward_model
from rlhf_ray.trainers.metric_rows import PLAN_FILE

SIZES: dict[workload.Size, dict[str, Any]] = {
    "s": {},
    "sm": {},
    # Without a critic, whose memory is that of a second policy: 200 M parameters then run in 16 GiB.
    "l": {"advantages": {"estimator": "leave_one_out"}, "prompts_per_iteration": 16},
}
"""Models by size, and what is set differently for them."""
WITHIN = 0.2
"""By how much a role's planned memory may differ from its measured one."""
PROMPT, RESPONSE = 64, 128
_PROMPTS = 32
_ITERATIONS = 3


def measure(settings: Settings) -> list[Figure]:
    """Planned over measured, one run for each size: a process's peak is the same in every run."""
    sizes = list(SIZES)[:1] if settings.quick else SIZES
    return [figure for size in sizes for figure in of_size(settings, size)]


def of_size(settings: Settings, size: workload.Size) -> list[Figure]:
    """One run with networks of this size in all roles."""
    settings.say(f"PPO with models of size {size}")
    folder = settings.folder / size
    folder.mkdir()
    model = workload.save_model(folder / "model", size)
    reward = save_reward_model(model, folder / "reward_model")
    end_to_end.write_prompts(folder / "prompts.jsonl", workload.prompts(64, shortest=PROMPT, longest=PROMPT))
    different = dict(SIZES[size])
    grouped = "advantages" in different
    stage = {
        "method": "ppo",
        "iterations": _ITERATIONS,
        "prompts_per_iteration": _PROMPTS,
        "policy": {"model": str(model)},
        "reward": [{"kind": "model", "model": str(reward)}],
        "sampling": {
            "min_new_tokens": RESPONSE,
            "max_new_tokens": RESPONSE,
            "samples_per_prompt": 2 if grouped else 1,
        },
        "data": {"train": str(folder / "prompts.jsonl"), "max_prompt_tokens": PROMPT},
        **different,
    }
    # A Ray of its own for each size, so that no process has had a larger model before.
    with end_to_end.local_ray():
        course = end_to_end.run(stage, folder / "run")
    return figures(size, folder / "run", course.peak_memory_gib(), course.rows)


def figures(size: str, run_dir: Path, peaks: dict[str, float], rows: Any) -> list[Figure]:
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
