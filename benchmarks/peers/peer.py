"""What the benchmarks of TRL share: their arguments, the data, and how a trainer's steps are measured.

Runs in the peers' environment, which has no rlhf_ray; of that only `rlhf_ray.bench.workload` is read from the folder.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, TrainerCallback


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Args:
        model: directory of the model.
        folder: where the data is, and where the trainer may write.
        dtype: `float32`; `bfloat16` keeps the weights in bfloat16; `autocast` keeps them in float32.
        batch: rows of an optimizer step.
        micro: rows of a forward pass.
        warm: steps before the measured ones.
        steps: measured steps.
        variant: what the script says about it.
    """

    model: Path
    folder: Path
    dtype: str
    batch: int
    micro: int
    warm: int
    steps: int
    variant: str

    def tokenizer(self) -> Any:
        """The model's."""
        return AutoTokenizer.from_pretrained(self.model)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of `<name>.jsonl`, those that both sides read."""
        lines = (self.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def settings(self) -> dict[str, Any]:
        """Arguments that all trainers take: nothing is logged, saved or evaluated, and no activation recomputed."""
        return {
            "output_dir": str(self.folder / "trl"),
            "use_cpu": True,
            "bf16": self.dtype == "autocast",
            "per_device_train_batch_size": self.micro,
            "gradient_accumulation_steps": self.batch // self.micro,
            "gradient_checkpointing": False,
            "max_steps": self.warm + self.steps,
            "learning_rate": 1e-6,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": False,
            "seed": 1,
        }

    def model_settings(self) -> dict[str, Any]:
        """How the model is loaded."""
        return {"dtype": "bfloat16" if self.dtype == "bfloat16" else "float32"}


def arguments() -> Work:
    """Those of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "autocast"])
    for name in ("batch", "micro", "warm", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--variant", default="")
    return Work(**vars(parser.parse_args()))


class Clock(TrainerCallback):
    """Notes units, CPU seconds and seconds of this process at the end of each step."""

    def __init__(self) -> None:
        self.units: dict[str, float] = {}
        self.marks: list[tuple[dict[str, float], float, float]] = []

    def add(self, **units: float) -> None:
        """Counts work that is about to be done."""
        for name, number in units.items():
            self.units[name] = self.units.get(name, 0.0) + number

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called by the trainer."""
        self.marks.append((dict(self.units), time.process_time(), time.perf_counter()))

    def report(self, work: Work) -> None:
        """Prints what the steps after the first `work.warm` did and took, as one line of JSON."""
        (before, cpu, wall), (after, cpu_end, wall_end) = (
            self.marks[work.warm - 1],
            self.marks[work.warm + work.steps - 1],
        )
        found = {
            "units": {name: total - before.get(name, 0.0) for name, total in after.items()},
            "cpu_s": cpu_end - cpu,
            "wall_s": wall_end - wall,
            "versions": {name: version(name) for name in ("transformers", "torch")},
        }
        print(json.dumps(found), flush=True)


def counting(trainer: type[Any], clock: Clock, count: Any) -> type[Any]:
    """The trainer, adding `count(inputs)` of each micro-batch to the clock."""

    class Counting(trainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            clock.add(**count(inputs))
            return super().training_step(model, inputs, *rest, **named)

    return Counting
