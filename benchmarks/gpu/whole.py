"""The whole of PPO with Ray, vLLM and DeepSpeed on the GPUs of this machine, beside bare vLLM and a bare copy.

    python benchmarks/gpu/whole.py --json gpu_whole.json

Measured: generated tokens per second against vLLM by itself on the same prompts; the weights' way to the generator in
GiB/s by CUDA IPC (one GPU) and NCCL (two), against a copy of as many bytes; samples per second, time by phase and
memory by role. About seven minutes on one GPU. Without a GPU it runs tiny sizes on the CPU, through shared memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from learner import SIZES, at_least_one, device, per_second, save

from rlhf_ray.bench import workload
from rlhf_ray.bench.figures import Figure, alone, from_pairs
from rlhf_ray.bench.results import collect, write
from rlhf_ray.bench.show import results_table
from rlhf_ray.bench.suite import Outcome
from rlhf_ray.terminal import show

LIBRARIES = ("ray", "vllm", "deepspeed", "pydantic")
BARE_DEADLINE_S = 300.0
FIRST = 2
REWARD = '''
def length(prompts, responses, answers):
    """Share of the longest response."""
    longest = max(len(response) for response in responses) or 1
    return [len(response) / longest for response in responses]
'''


@dataclass(frozen=True)
class Work:
    """What one iteration samples and learns from.

    Args:
        size: of the model, a name in learner.py.
        samples: prompts of an iteration, one response each.
        prompt: most tokens of a prompt; the shortest has half of it.
        response: most tokens of a response; random weights hardly ever end one earlier.
        compile: whether vLLM captures CUDA graphs.
    """

    size: str
    samples: int
    prompt: int
    response: int
    compile: bool


WORKS = {
    "gpu": Work("0.4b", samples=256, prompt=256, response=256, compile=True),
    "tiny": Work("tiny", samples=8, prompt=32, response=32, compile=False),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes; the exit code: 1 where something failed."""
    chosen = parse(arguments)
    load = os.getloadavg()
    missing = [library for library in LIBRARIES if importlib.util.find_spec(library) is None]
    if missing:
        outcomes = [Outcome("whole", skipped=f"{' and '.join(missing)} not installed")]
    else:
        with tempfile.TemporaryDirectory() as folder:
            outcomes = measure(WORKS[chosen.work], Path(folder), iterations=chosen.repeats + FIRST)
    results = collect(outcomes, quick=chosen.work == "tiny", load_before=load)
    show(results_table(results))
    if chosen.json is not None:
        write(chosen.json, results)
    return 1 if results.failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fitting = "gpu" if torch.cuda.is_available() else "tiny"
    parser.add_argument("--work", choices=WORKS, default=fitting, help="default: %(default)s, by the device")
    parser.add_argument("--repeats", type=at_least_one, default=5, help="iterations measured; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and figures")
    chosen = parser.parse_args(arguments)
    if chosen.json is not None and not chosen.json.absolute().parent.is_dir():
        parser.error(f"--json: {chosen.json.parent} is no folder")
    return chosen


def measure(work: Work, folder: Path, *, iterations: int) -> list[Outcome]:
    """Bare vLLM, then a run for each way of the weights that this machine has."""
    size = SIZES[work.size]
    save(size, folder / "model")
    prompts = workload.prompts(
        work.samples * iterations, shortest=work.prompt // 2, longest=work.prompt, vocab_size=size.vocabulary
    )
    outcomes = []
    bare: list[float] = []
    try:
        bare = bare_vllm(work, folder, prompts[: work.samples], repeats=max(1, iterations - FIRST))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        outcomes.append(Outcome("bare vLLM", failed=f"{type(error).__name__}: {error}"))
    gpus = torch.cuda.device_count()
    ways = ["cuda_ipc", "nccl"] if gpus else ["shared_memory"]
    for way in ways:
        if way == "nccl" and gpus < 2:
            outcomes.append(Outcome(way, skipped="one GPU; NCCL joins two"))
            continue
        try:
            figures = run_ppo(work, folder, prompts, way=way, iterations=iterations, gpus=gpus, bare=bare)
            outcomes.append(Outcome(way, figures=tuple(figures)))
        except Exception as error:
            outcomes.append(Outcome(way, failed=f"{type(error).__name__}: {error}"))
    return outcomes


def run_ppo(
    work: Work, folder: Path, prompts: list[list[int]], *, way: str, iterations: int, gpus: int, bare: list[float]
) -> list[Figure]:
    """One pipeline; the first iterations are its warm-up."""
    from rlhf_ray.bench.end_to_end import run, write_prompts

    (folder / "gpu_rewards.py").write_text(REWARD)
    data = write_prompts(folder / "prompts.jsonl", prompts)
    # By NCCL the generator has the second GPU to itself; else all roles share the first.
    share = {"gpus": (0.3 if way == "nccl" else 0.25) if gpus else 0}
    own = {"gpus": 1} if way == "nccl" else share
    learner = {"dtype": "bfloat16", "zero": 2, **share}
    stage = {
        "method": "ppo",
        "iterations": iterations,
        "prompts_per_iteration": work.samples,
        "policy": {"model": str(folder / "model"), **learner},
        "critic": learner,
        "reference": {"dtype": "bfloat16", **share},
        "generator": {"dtype": "bfloat16", "compile": work.compile, "max_sequences": work.samples, **own},
        "reward": [{"kind": "function", "function": "gpu_rewards:length"}],
        "sampling": {"max_new_tokens": work.response},
        "data": {"train": str(data)},
    }
    course = run(stage, folder / way, transport=way)
    rows = course.rows[FIRST - 1 :]
    named = f"gpu/{way}"
    figures = [alone(f"{named}/ppo", [work.samples / float(row["time/iteration_s"]) for row in rows], unit="samples/s")]
    rates = [float(row["generator/tokens_per_s"]) for row in rows if "generator/tokens_per_s" in row]
    if bare and rates:
        pairs = [(rate, bare[place % len(bare)]) for place, rate in enumerate(rates)]
        figures.append(from_pairs(f"{named}/rollout", pairs, unit="tokens per second"))
    moved = [(float(row["sync/gib_per_s"]), copied(int(row["sync/bytes"]))) for row in rows if "sync/bytes" in row]
    if moved:
        figures.append(from_pairs(f"{named}/sync", moved, unit="GiB/s"))
    phases = sorted({name for row in rows for name in row if name.startswith("time/") and name != "time/iteration_s"})
    for phase in phases:
        values = [float(row.get(phase) or 0.0) for row in rows]
        figures.append(alone(f"{named}/{phase.removesuffix('_s')}", values, unit="s"))
    memory = course.peak_memory_gib()
    return figures + [alone(f"{named}/memory/{role}", [most], unit="GiB") for role, most in memory.items()]


def copied(size: int) -> float:
    """GiB/s of a copy of so many bytes within the device's memory."""
    source = torch.zeros(size, dtype=torch.uint8, device=device())
    target = torch.zeros_like(source)

    def work() -> int:
        target.copy_(source)
        return size

    return max(per_second(work, device()) for _ in range(3)) / 2**30


# Bare vLLM, in a process of its own


def bare_vllm(work: Work, folder: Path, prompts: list[list[int]], *, repeats: int) -> list[float]:
    """Generated tokens per second of vLLM by itself, with the same model, prompts, lengths and engine options."""
    from rlhf_ray.config import schema
    from rlhf_ray.engines.vllm_generation import engine_environment

    order = folder / "bare.json"
    order.write_text(
        json.dumps(
            {
                "model": str(folder / "model"),
                "prompts": prompts,
                "response": work.response,
                "compile": work.compile,
                "longest": work.prompt + work.response,
                "repeats": repeats,
            }
        )
    )
    settings = schema.Generator(compile=work.compile)
    environment = {**os.environ, **engine_environment(settings, gpu=torch.cuda.is_available())}
    answer = subprocess.run(
        [sys.executable, __file__, "--bare", str(order)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=BARE_DEADLINE_S,
        check=False,
    )
    if answer.returncode:
        raise ValueError(f"vLLM by itself ended with {answer.returncode}:\n{answer.stderr[-1500:]}")
    found: list[float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def generate_bare(order: dict[str, Any]) -> list[float]:
    """Tokens per second of each repeat, after a warm-up."""
    from vllm import LLM, SamplingParams

    memory = {"gpu_memory_utilization": 0.4} if torch.cuda.is_available() else {"kv_cache_memory_bytes": 256 << 20}
    engine = LLM(
        model=order["model"],
        dtype="bfloat16",
        enforce_eager=not order["compile"],
        distributed_executor_backend="uni",
        max_model_len=order["longest"],
        max_num_seqs=len(order["prompts"]),
        disable_log_stats=True,
        **memory,
    )
    prompts = [{"prompt_token_ids": tokens} for tokens in order["prompts"]]
    rates = []
    for repeat in range(order["repeats"] + 1):
        sampling = [
            SamplingParams(temperature=1.0, max_tokens=order["response"], seed=1000 * repeat + place, logprobs=0)
            for place in range(len(prompts))
        ]
        start = time.perf_counter()
        done = engine.generate(prompts, sampling, use_tqdm=False)
        rates.append(sum(len(each.outputs[0].token_ids) for each in done) / (time.perf_counter() - start))
    return rates[1:]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        print(json.dumps(generate_bare(json.loads(Path(sys.argv[2]).read_text()))))
    else:
        raise SystemExit(main())
