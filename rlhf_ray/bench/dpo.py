"""DPO, whole, its reference asked and its reference found in the cache, against the sum of the bare floors."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.bench import workload
from rlhf_ray.bench.bare_training import BareTraining, Dtype
from rlhf_ray.bench.end_to_end import Course, local_ray, run, write_pairs
from rlhf_ray.bench.figures import Figure, Settings, alone, from_pairs

BATCH = 16
STEPS, QUICK_STEPS = 8, 5
FIRST = 3


def measure(settings: Settings) -> list[Figure]:
    """Pairs per CPU-second of all processes; the floor is one training step, and one forward pass where uncached."""
    model = workload.save_model(settings.folder / "model")
    steps = QUICK_STEPS if settings.quick else STEPS
    data = write_pairs(settings.folder / "pairs.jsonl", steps * BATCH)
    figures = []
    dtypes: tuple[Dtype, ...] = ("float32",) if settings.quick else ("float32", "bfloat16")
    with local_ray():
        for dtype in dtypes:
            bare = BareTraining(model, dtype)
            bare.step()
            found: dict[str, list[tuple[float, float]]] = {"uncached": [], "cached": []}
            speeds: dict[str, list[float]] = {"uncached": [], "cached": []}
            for repeat in range(settings.repeats):
                cache = settings.folder / f"cache_{dtype}_{repeat}"
                for state in found:
                    settings.say(f"{dtype}, {state}, run {repeat + 1} of {settings.repeats}")
                    folder = settings.folder / f"{dtype}_{state}_{repeat}"
                    course = prefer(model, data, folder, dtype=dtype, steps=steps, cache=cache)
                    done = course.cost("policy/tokens", first=FIRST)
                    pairs_per_token = BATCH * len(course.rows[FIRST - 1 : -1]) / done.units
                    passes = 1 / bare.tokens_per_cpu_second()
                    if state == "uncached":
                        passes += 1 / bare.forward_tokens_per_cpu_second()
                    found[state].append((done.per_cpu_second * pairs_per_token, pairs_per_token / passes))
                    speeds[state].append(done.per_second * pairs_per_token)
            for state, pairs in found.items():
                figures.append(from_pairs(f"dpo/pairs/{dtype}/{state}", pairs, unit="pairs per CPU-second"))
                name = f"dpo/pairs_per_second/{dtype}/{state}"
                figures.append(alone(name, speeds[state], unit="pairs per second"))
    return figures


def prefer(model: Path, pairs: Path, folder: Path, *, dtype: Dtype, steps: int, cache: Path) -> Course:
    """One run of so many optimizer steps."""
    policy = {"model": str(model), "dtype": dtype, "zero": 2 if dtype == "bfloat16" else 0}
    stage = {
        "method": "dpo",
        "policy": policy,
        "reference": {"dtype": dtype},
        "steps": steps,
        "batch_size": BATCH,
        "data": {"train": str(pairs)},
        "cache_dir": str(cache),
    }
    return run(stage, folder)
