"""Supervised fine-tuning, whole: `rlhf-ray run` with its driver, Ray and learner, against a bare dense step."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.bench import workload
from rlhf_ray.bench.bare_training import BareTraining, Dtype
from rlhf_ray.bench.end_to_end import Course, local_ray, run, write_texts
from rlhf_ray.bench.figures import Figure, Settings, alone, from_pairs

BATCH = 32
STEPS, QUICK_STEPS = 8, 5
FIRST = 3


def measure(settings: Settings) -> list[Figure]:
    """Tokens per CPU-second of all processes, in float32 and bfloat16; per second beside it."""
    model = workload.save_model(settings.folder / "model")
    steps = QUICK_STEPS if settings.quick else STEPS
    texts = write_texts(settings.folder / "texts.jsonl", steps * BATCH)
    figures = []
    dtypes: tuple[Dtype, ...] = ("float32",) if settings.quick else ("float32", "bfloat16")
    with local_ray():
        for dtype in dtypes:
            bare = BareTraining(model, dtype)
            bare.step()
            pairs, speeds = [], []
            for repeat in range(settings.repeats):
                settings.say(f"{dtype}, run {repeat + 1} of {settings.repeats}")
                course = fine_tune(model, texts, settings.folder / f"{dtype}_{repeat}", dtype=dtype, steps=steps)
                done = course.cost("policy/tokens", first=FIRST)
                pairs.append((done.per_cpu_second, bare.tokens_per_cpu_second()))
                speeds.append(done.per_second)
            figures.append(from_pairs(f"sft/tokens/{dtype}", pairs, unit="tokens per CPU-second"))
            figures.append(alone(f"sft/tokens_per_second/{dtype}", speeds, unit="tokens per second"))
    return figures


def fine_tune(
    model: Path, texts: Path, folder: Path, *, dtype: Dtype, steps: int, batch_size: int = BATCH, workers: int = 1
) -> Course:
    """One run of so many optimizer steps."""
    policy = {"model": str(model), "dtype": dtype, "workers": workers, "zero": 2 if dtype == "bfloat16" else 0}
    stage = {"method": "sft", "policy": policy, "steps": steps, "batch_size": batch_size, "data": {"train": str(texts)}}
    return run(stage, folder)
