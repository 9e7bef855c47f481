"""Peak memory: of a learner's logits, and of DPO on many pairs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

from rlhf_ray.algorithms.logprobs import projected_logprobs, token_logprobs
from rlhf_ray.bench import workload
from rlhf_ray.bench.end_to_end import local_ray, run, write_pairs
from rlhf_ray.bench.figures import Figure, Settings, from_pairs
from rlhf_ray.config import schema
from rlhf_ray.data.batches import make_sequences
from rlhf_ray.distributed.place import Place
from rlhf_ray.models.heads import LanguageModel
from rlhf_ray.workers.learner import Learner
from rlhf_ray.workers.objectives import LanguageObjective

T = TypeVar("T")

VOCABULARY = 32_000
ROWS, LENGTH = 8, 512
"""Of the one micro-batch: 4,096 tokens."""
MOST_LOGITS = 0.35
"""Bound of the learner's memory above its resting state, over that with all logits at once."""
FEW, MANY = 1_000, 100_000
"""Preference pairs; the many are the few again and again."""


def measure(settings: Settings) -> list[Figure]:
    """MiB, each in fresh processes; the floor is what all logits at once, or a small data set, take."""
    return [*logits(settings), *dpo_pairs(settings)]


def logits(settings: Settings) -> list[Figure]:
    """A training step on 4,096 tokens: in chunks of logits, over all logits at once.

    `learner` is judged: what a step takes beyond weights, gradients and optimizer state. `process` is the worker's
    whole peak with libraries and model, `projection` the output layer's part alone.
    """
    model = workload.save_model(settings.folder / "model_32000", vocab_size=VOCABULARY)
    found: dict[str, list[tuple[float, float]]] = {"learner": [], "process": [], "projection": []}
    for repeat in range(settings.repeats):
        settings.say(f"logits, repeat {repeat + 1} of {settings.repeats}")
        steps = [apart(learner_peak, str(model), chunks) for chunks in (True, False)]
        found["learner"].append((steps[0][0], steps[1][0]))
        found["process"].append((steps[0][1], steps[1][1]))
        found["projection"].append((apart(projection_peak, True), apart(projection_peak, False)))
    return [
        from_pairs(f"memory/logits/{name}", pairs, unit="MiB", at_most=MOST_LOGITS if name == "learner" else None)
        for name, pairs in found.items()
    ]


def dpo_pairs(settings: Settings) -> list[Figure]:
    """A few steps of DPO on 100,000 pairs, over the same on 1,000; of the driver, the policy and the reference."""
    model = workload.save_model(settings.folder / "model")
    few, many = settings.folder / "few.jsonl", settings.folder / "many.jsonl"
    write_pairs(few, FEW)
    many.write_bytes(few.read_bytes() * (MANY // FEW))
    found: dict[str, list[tuple[float, float]]] = {}
    for repeat in range(settings.repeats):
        settings.say(f"DPO on {MANY:,} pairs, repeat {repeat + 1} of {settings.repeats}")
        folders = [settings.folder / f"{data.stem}_{repeat}" for data in (many, few)]
        peaks = [
            apart(preference_peaks, str(model), str(data), str(folder))
            for data, folder in zip((many, few), folders, strict=True)
        ]
        for role in peaks[0]:
            found.setdefault(role, []).append((peaks[0][role], peaks[1][role]))
    return [from_pairs(f"memory/dpo_pairs/{role}", pairs, unit="MiB", at_most=1.1) for role, pairs in found.items()]


def preference_peaks(model: str, data: str, folder: str) -> dict[str, float]:
    """Role -> MiB that its largest worker, or the driver, has had at most in a run of a few steps."""
    stage = {
        "method": "dpo",
        "policy": {"model": model},
        "steps": 3,
        "batch_size": 8,
        "data": {"train": data},
        "cache_dir": f"{folder}_cache",
    }
    with local_ray():
        course = run(stage, Path(folder))
    return {"driver": _peak()} | {role: 1024 * gib for role, gib in course.peak_memory_gib().items()}


def apart(work: Callable[..., T], *arguments: object) -> T:
    """Calls it in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def learner_peak(model: str, chunks: bool) -> tuple[float, float]:
    """MiB of a training step beyond those of a learner that has taken one, and of the process at its peak.

    Args:
        model: directory.
        chunks: as learners do it; else with all logits at once.
    """
    learner = Learner(
        Place("policy", 0, 1),
        config=schema.Learner(micro_batch_tokens=ROWS * LENGTH),
        model=model,
        revision=None,
        head="none",
        seed=0,
        total_steps=2,
    )
    network = learner.engine.module
    assert isinstance(network, LanguageModel), "a learner without a value head"
    network.projects = chunks
    objective = LanguageObjective()
    learner.update(make_sequences([[1]], [[2, 3]]), objective, epochs=1, mini_batches=1, iteration=1)
    resting = _resident()
    _forget_peak()
    rows = workload.prompts(ROWS, shortest=LENGTH, longest=LENGTH, vocab_size=VOCABULARY)
    batch = make_sequences([row[:1] for row in rows], [row[1:] for row in rows])
    learner.update(batch, objective, epochs=1, mini_batches=1, iteration=2)
    return _peak() - resting, _peak()


def projection_peak(chunks: bool) -> float:
    """MiB that the output layer takes by itself, forward and backward, beyond its weight and states."""
    hidden = workload.SHAPES["s"].hidden
    torch.manual_seed(0)
    states = torch.randn(ROWS, LENGTH, hidden, requires_grad=True)
    weight = torch.randn(VOCABULARY, hidden, requires_grad=True)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH))
    wanted = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    wanted[:, 0] = False
    torch.autograd.backward(states.sum() + weight.sum())
    resting = _resident()
    _forget_peak()
    if chunks:
        logprobs = projected_logprobs(states, weight, None, tokens, wanted)[0]
    else:
        logprobs = token_logprobs(torch.nn.functional.linear(states, weight), tokens)
    torch.autograd.backward(logprobs.sum())
    return _peak() - resting


def _resident() -> float:
    """MiB that this process has now."""
    return _status("VmRSS")


def _peak() -> float:
    """MiB that it has had at most since `_forget_peak`."""
    return _status("VmHWM")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
