"""From `rlhf-ray run` to the first generated token, beside Ray, one engine and one learner started one after the other.

The run is a PPO with everything on: policy, critic, reference, a reward function and a generator, five processes. Every
start is a fresh process; a first round, which is not counted, warms the caches of files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from rlhf_ray.bench import workload
from rlhf_ray.bench.end_to_end import write_prompts
from rlhf_ray.bench.figures import Figure, Settings, alone, from_pairs
from rlhf_ray.bench.workload import save_model
from rlhf_ray.config import schema
from rlhf_ray.trainers import trace

_DEADLINE_S = 300.0
_READY = "ready"
_LENGTH = 65
_REWARD = '''
def lengths(prompts, responses, answers):
    """Number of characters of each response."""
    return [float(len(response)) for response in responses]
'''


def measure(settings: Settings) -> list[Figure]:
    """Seconds to the first token against the sum of the floors, and the floors by themselves."""
    model = save_model(settings.folder / "model_s")
    (settings.folder / "startup_rewards.py").write_text(_REWARD)
    prompts = write_prompts(settings.folder / "prompts.jsonl", workload.prompts(64))
    starts: dict[str, list[float]] = {part: [] for part in _PARTS}
    pairs = []
    for repeat in range(settings.repeats + 1):
        settings.say(f"startup, round {repeat} of {settings.repeats}")
        own = _first_token(settings.folder, repeat, model, prompts)
        parts = {part: _start_alone(part, model) for part in _PARTS}
        if repeat:
            pairs.append((own, sum(parts.values())))
            for part, seconds in parts.items():
                starts[part].append(seconds)
    return [
        from_pairs("startup/first_token", pairs, unit="s", at_most=1.5),
        *(alone(f"startup/{part}_alone", seconds, unit="s") for part, seconds in starts.items()),
    ]


def _first_token(folder: Path, number: int, model: Path, prompts: Path) -> float:
    """Seconds from the start of the command to the end of the call that gave the first token."""
    run_dir = folder / f"startup_{number}"
    settings = {
        "run_dir": str(run_dir),
        "method": "ppo",
        "iterations": 1,
        "prompts_per_iteration": 8,
        "policy": {"model": str(model)},
        "reward": [{"kind": "function", "function": "startup_rewards:lengths"}],
        "data": {"train": str(prompts)},
        "sampling": {"max_new_tokens": 1},
        "checkpoints": {"every": 0},
    }
    file = folder / "startup.yaml"
    file.write_text(yaml.safe_dump(settings))
    began = time.time()
    subprocess.run(
        [sys.executable, "-m", "rlhf_ray", "run", str(file)], check=True, stdout=subprocess.DEVNULL, timeout=_DEADLINE_S
    )
    events = json.loads((run_dir / trace.FILE).read_text())
    roles = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    tokens = [event for event in events if event["ph"] == "X" and event["args"].get("tokens")]
    ends = [float(call["ts"] + call["dur"]) for call in tokens if roles[call["pid"]] == "generator"]
    return min(ends) / 1e6 - began


def _start_alone(part: str, model: Path) -> float:
    """Seconds until one part stands in a process of its own."""
    began = time.time()
    command = [sys.executable, "-m", "rlhf_ray.bench.startup", part, str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None, "a pipe was asked for"
        ready = [float(line.split()[1]) for line in process.stdout if line.startswith(_READY)]
    if process.returncode or not ready:
        raise RuntimeError(f"{part} did not start; exit code {process.returncode}")
    return ready[0] - began


def _ray(model: str) -> None:
    from rlhf_ray.distributed.placement import Cluster

    assert Cluster("local").__enter__().address


def _engine(model: str) -> None:
    from rlhf_ray.engines.vllm_generation import VllmEngine, engine_environment

    config = schema.Generator()
    os.environ.update(engine_environment(config, gpu=False))
    VllmEngine(config=config, model=model, revision=None, tokenizer=model, max_model_len=_LENGTH)


def _learner(model: str) -> None:
    from rlhf_ray.distributed.place import Place
    from rlhf_ray.workers.learner import Learner

    os.environ["DS_ACCELERATOR"] = "cpu"
    place = Place("policy", 0, 1)
    Learner(place, config=schema.Learner(), model=model, revision=None, head="none", seed=1, total_steps=1)


_PARTS: dict[str, Callable[[str], None]] = {"ray": _ray, "engine": _engine, "learner": _learner}


if __name__ == "__main__":
    _PARTS[sys.argv[1]](sys.argv[2])
    print(_READY, time.time(), flush=True)
    # What was started is not to be taken down in order; it ends with the process.
    sys.stdout.flush()
