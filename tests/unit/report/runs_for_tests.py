"""A small run's folder, written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from rlhf_ray.data.batches import Rollouts, make_sequences, one_version
from rlhf_ray.distributed.tracing import DRIVER, Span
from rlhf_ray.trainers.journal import write_rollouts
from rlhf_ray.trainers.trace import TraceFile

HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"></div></script>"
SETTINGS = {
    "run_dir": "runs/small",
    "stages": [{"name": "sft", "method": "sft"}, {"name": "ppo", "method": "ppo", "kl": {"target": 6.0}}],
}


def write_samples(path: Path, prompts: dict[int, str], responses: list[str], scores: list[float]) -> None:
    sequences = make_sequences([[5, 6]] * len(prompts), [[7]] * len(prompts))
    rollouts = Rollouts(
        sequences=sequences,
        generator_logprobs=torch.zeros(len(prompts), 3),
        finished=torch.ones(len(prompts), dtype=torch.bool),
        prompts=list(prompts.values()),
        responses=responses,
        answers=[None] * len(prompts),
        prompt_ids=torch.tensor(list(prompts)),
        policy_versions=one_version(sequences, 0),
    )
    write_rollouts(path, rollouts, scores=torch.tensor(scores))


def write_run(folder: Path, *, response: str = "fine", settings: dict[str, object] | None = None) -> Path:
    """Two stages, the second one at iteration 2 of a run that goes on."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS | (settings or {})))
    rows = [
        {"stage": "sft", "iteration": 1, "policy/loss": 2.0, "time/iteration_s": 1.0},
        {"stage": "ppo", "iteration": 0, "evaluation/reward_mean": -0.25},
        *(
            {
                "stage": "ppo",
                "iteration": iteration,
                "reward/mean": 0.5 * iteration,
                "reward/std": 0.1,
                "kl/per_sequence": 1.5,
                "evaluation/reward_mean": 0.5 * iteration,
                "time/iteration_s": 10.0,
                "time/generate_s": 4.0,
                "time/policy_update_s": 5.0,
                "generator/busy_share": 0.4,
                "policy/busy_share": 0.5,
                "policy/tokens_per_s": 1200.0,
                "policy/peak_memory_gib": 0.5,
                "time/idle_share": 0.1,
                "driver/cpu_share": 0.02,
            }
            for iteration in (1, 2)
        ),
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sft").mkdir()
    (folder / "sft" / "done.json").write_text(json.dumps({"elapsed_s": 65.0}))
    samples = folder / "ppo" / "evaluation"
    write_samples(samples / "iteration_000000.parquet", {3: "a", 4: "b"}, ["dull", "bad"], [-1.0, 0.5])
    write_samples(samples / "iteration_000002.parquet", {4: "b", 3: "a", 9: "c"}, [response] * 3, [0.25, 1.0, 0.0])
    trace = TraceFile(folder / "trace.json")
    trace.write("ppo", [Span("generator", 0, "start", 1000.0, 1003.0)])
    # Iteration 1 was repeated after a kill: the first time it took 50 seconds.
    trace.write("ppo", [Span(DRIVER, 0, "iteration", 1010.0, 1060.0, 1)])
    for iteration, start in ((1, 1100.0), (2, 1110.0)):
        trace.write(
            "ppo",
            [
                Span("generator", 0, "next_finished", start, start + 4, iteration, tokens=40),
                Span("policy", 0, "update", start + 4, start + 9, iteration, tokens=100),
                Span("policy", 1, "update", start + 4, start + 8, iteration, tokens=100),
                Span(DRIVER, 0, "iteration", start, start + 10, iteration),
            ],
        )
    trace.close()
    return folder
