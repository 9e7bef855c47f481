"""What two workers give over one, and how cost grows with model, batch, response length and samples of a prompt.

Workers are compared in seconds, the rest in CPU-seconds of all processes. Each setting is one run; the value of a
figure is the changed setting's, its floor the plain one's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.bench import workload
from rlhf_ray.bench.end_to_end import Course, local_ray, run, write_prompts, write_texts
from rlhf_ray.bench.figures import Cost, Figure, Settings, alone, from_pairs
from rlhf_ray.bench.sft import fine_tune

SAMPLES = 32
LENGTH = 64
STEPS = 4
FIRST = 2
LARGE_BATCH = 128
REWARD = '''
def length(prompts, responses, answers):
    """Share of the longest response."""
    longest = max(len(response) for response in responses) or 1
    return [len(response) / longest for response in responses]
'''


@dataclass(frozen=True)
class Work:
    """A PPO run's settings; as many samples in an iteration, however many of them share a prompt."""

    workers: int = 1
    samples_per_prompt: int = 1
    length: int = LENGTH
    samples: int = SAMPLES


PLAIN = Work()


def measure(settings: Settings) -> list[Figure]:
    """Ratios to the plain run, and the peak memory of each role in it."""
    small = workload.save_model(settings.folder / "model_s")
    with local_ray():
        return [*_fine_tuning(settings, small), *_ppo(settings, small)]


def _fine_tuning(settings: Settings, small: Path) -> list[Figure]:
    texts = write_texts(settings.folder / "texts.jsonl", LARGE_BATCH * STEPS)

    def tokens(name: str, model: Path, **changes: int) -> Cost:
        settings.say(f"fine-tuning, {name}")
        course = fine_tune(model, texts, settings.folder / f"sft_{name}", dtype="float32", steps=STEPS, **changes)
        return course.cost("policy/tokens", first=FIRST)

    plain = tokens("plain", small)
    two = tokens("two_workers", small, workers=2)
    figures = [from_pairs("scale/sft/workers/2", [(two.per_second, plain.per_second)], unit="tokens per second")]
    if settings.quick:
        return figures
    changed = {
        f"batch/{LARGE_BATCH}": tokens("large_batch", small, batch_size=LARGE_BATCH),
        "model/m": tokens("model_m", workload.save_model(settings.folder / "model_m", "m"), batch_size=8),
    }
    for name, cost in changed.items():
        pair = (cost.per_cpu_second, plain.per_cpu_second)
        figures.append(from_pairs(f"scale/sft/{name}", [pair], unit="tokens per CPU-second"))
    return figures


def _ppo(settings: Settings, model: Path) -> list[Figure]:
    (settings.folder / "scale_rewards.py").write_text(REWARD)
    prompts = write_prompts(settings.folder / "prompts.jsonl", workload.prompts(512))

    def samples(name: str, work: Work) -> tuple[Course, Cost]:
        settings.say(f"PPO, {name}")
        course = run(_stage(model, prompts, work), settings.folder / f"ppo_{name.replace('/', '_')}")
        rows = [{**row, "samples": work.samples} for row in course.rows]
        return course, Course(rows, course.ends).cost("samples", first=FIRST)

    course, plain = samples("plain", PLAIN)
    memory = course.peak_memory_gib()
    figures = [alone(f"scale/memory/{role}", [most], unit="GiB") for role, most in memory.items()]
    changes = {"samples_per_prompt/8": Work(samples_per_prompt=8)}
    if not settings.quick:
        _, two = samples("two_workers", Work(workers=2))
        pair = (two.per_second, plain.per_second)
        figures.append(from_pairs("scale/ppo/workers/2", [pair], unit="samples per second"))
        changes |= {f"length/{2 * LENGTH}": Work(length=2 * LENGTH), f"batch/{4 * SAMPLES}": Work(samples=4 * SAMPLES)}
    for name, work in changes.items():
        _, changed = samples(name, work)
        pair = (changed.per_cpu_second, plain.per_cpu_second)
        figures.append(from_pairs(f"scale/ppo/{name}", [pair], unit="samples per CPU-second"))
    return figures


def _stage(model: Path, prompts: Path, work: Work) -> dict[str, Any]:
    workers = {"workers": work.workers}
    return {
        "method": "ppo",
        "iterations": STEPS,
        "prompts_per_iteration": work.samples // work.samples_per_prompt,
        "policy": {"model": str(model), **workers},
        "critic": workers,
        "reference": workers,
        "generator": workers,
        "reward": [{"kind": "function", "function": "scale_rewards:length"}],
        "sampling": {"max_new_tokens": work.length, "samples_per_prompt": work.samples_per_prompt},
        "data": {"train": str(prompts)},
    }
