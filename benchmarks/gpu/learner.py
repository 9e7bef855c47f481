"""Learner and scorer on one GPU: model FLOPs utilisation, and what packed rows of natural lengths cost over dense ones.

    python benchmarks/gpu/learner.py --json gpu_learner.json

It needs torch, transformers, psutil, rich and jaxtyping; with DeepSpeed (and pydantic) the learner itself is measured
as well. About three minutes on one GPU. Without a GPU it runs tiny sizes, which shows that it works and nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rlhf_ray.bench.figures import Figure, alone, compared, from_pairs
from rlhf_ray.bench.results import collect, write
from rlhf_ray.bench.show import results_table
from rlhf_ray.bench.suite import Outcome
from rlhf_ray.data.batches import Sequences, make_sequences
from rlhf_ray.data.packing import plan_micro_batches
from rlhf_ray.models.forward import forward
from rlhf_ray.models.heads import LanguageModel
from rlhf_ray.terminal import show

PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "A10": 125, "L4": 121}
"""Dense bfloat16 of the makers' data sheets, by a part of the GPU's name."""


@dataclass(frozen=True)
class Size:
    """A Llama and the work that is done with it.

    Args:
        micro_batch: tokens in one forward pass.
        micro_batches: forward passes in one optimizer step.
        row: tokens in a dense row, and mean length of the natural ones.
        matrix: side of the matrices that the peak is measured with.
    """

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    micro_batch: int
    micro_batches: int
    row: int
    matrix: int


SIZES = {
    "1.3b": Size(2048, 24, 5632, 16, 8, 32000, 16384, 2, 1024, 8192),
    "0.4b": Size(1024, 24, 2816, 16, 8, 32000, 8192, 2, 1024, 8192),
    "tiny": Size(64, 2, 128, 2, 1, 256, 256, 2, 32, 128),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes; the exit code: 1 where a bound is missed on a GPU."""
    chosen = parse(arguments)
    load = os.getloadavg()
    outcomes = [measure(SIZES[chosen.size], device(), repeats=chosen.repeats)]
    outcomes.append(measure_learner(chosen.size, repeats=chosen.repeats))
    results = collect(outcomes, quick=chosen.size == "tiny", load_before=load)
    show(results_table(results))
    if chosen.json is not None:
        write(chosen.json, results)
    return 1 if results.failed or (results.missed and torch.cuda.is_available()) else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; the size fits the GPU unless told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default=fitting_size(), help="default: %(default)s, by the memory")
    parser.add_argument("--repeats", type=at_least_one, default=5, help="of each figure; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and figures")
    chosen = parser.parse_args(arguments)
    if chosen.json is not None and not chosen.json.absolute().parent.is_dir():
        parser.error(f"--json: {chosen.json.parent} is no folder")
    return chosen


def at_least_one(text: str) -> int:
    """A count from the command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number from 1")
    return int(text)


def fitting_size() -> str:
    """The largest size that the GPU's memory holds with gradients, optimizer states and activations."""
    if not torch.cuda.is_available():
        return "tiny"
    return "1.3b" if torch.cuda.get_device_properties(0).total_memory > 70 * 2**30 else "0.4b"


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Measuring


def measure(size: Size, where: torch.device, *, repeats: int) -> Outcome:
    """Peak, dense step and pass, and our packed step and pass over natural lengths."""
    peak = matrix_flops(size.matrix, where)
    figures = [alone("gpu/matmul", [peak() / 1e12 for _ in range(repeats)], unit="TFLOP/s")]
    network = model(size, where)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=where.type == "cuda")
    random = torch.Generator().manual_seed(0)
    dense = torch.randint(1, size.vocabulary, (size.micro_batch // size.row, size.row), generator=random).to(where)
    natural = natural_rows(size, random)

    def speed(work: Callable[[], int]) -> Callable[[], float]:
        return lambda: per_second(work, where)

    def dense_step() -> int:
        for _ in range(size.micro_batches):
            logits = network(input_ids=dense, use_cache=False).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), dense[:, 1:].flatten())
            torch.autograd.backward(loss / size.micro_batches)
        finish(network, optimizer)
        return dense.numel() * size.micro_batches

    def packed_step() -> int:
        units = sum(int(rows.response_mask.sum()) for rows in natural)
        for rows in natural:
            outputs = forward(LanguageModel(network), rows, layout="packed", device=where)
            torch.autograd.backward(-outputs.logprobs.sum() / units)
        finish(network, optimizer)
        return sum(int(rows.attention_mask.sum()) for rows in natural)

    @torch.no_grad()
    def dense_pass() -> int:
        logits = network(input_ids=dense, use_cache=False).logits[:, :-1]
        logits.float().log_softmax(-1).gather(-1, dense[:, 1:, None])
        return dense.numel()

    @torch.no_grad()
    def packed_pass() -> int:
        for rows in natural:
            forward(LanguageModel(network), rows, layout="packed", device=where)
        return sum(int(rows.attention_mask.sum()) for rows in natural)

    unit = "tokens per second"
    learnt = compared("gpu/learn/packed", speed(packed_step), speed(dense_step), unit=unit, repeats=repeats)
    figures.append(learnt)
    figures.append(compared("gpu/score/packed", speed(packed_pass), speed(dense_pass), unit=unit, repeats=repeats))
    if learnt.floor is not None:
        figures += utilisation(size, network, tokens_per_second=learnt.floor, peak=figures[0].value * 1e12)
    if where.type == "cuda":
        figures.append(alone("gpu/learn/peak_memory", [torch.cuda.max_memory_allocated() / 2**30], unit="GiB"))
    return Outcome("learner", figures=tuple(figures))


def utilisation(size: Size, network: LlamaForCausalLM, *, tokens_per_second: float, peak: float) -> list[Figure]:
    """Model FLOPs of the dense step against the measured peak, and against the data sheet where the GPU is known.

    A token costs 6 operations for each weight of a matrix that multiplies it, and 12 x layers x hidden x length of
    attention, halved because it is causal (arXiv:2204.02311, appendix B).
    """
    table = network.get_input_embeddings().weight.numel()
    weights = sum(parameter.numel() for parameter in network.parameters()) - table
    operations = 6 * weights + 6 * size.layers * size.hidden * size.row
    used = operations * tokens_per_second
    figures = [from_pairs("gpu/learn/of_measured_peak", [(used / 1e12, peak / 1e12)], unit="TFLOP/s")]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    known = [tflops for part, tflops in PEAK_TFLOPS.items() if part in name]
    if known:
        figures.append(from_pairs("gpu/learn/utilisation", [(used / 1e12, known[0])], unit="TFLOP/s"))
    return figures


def measure_learner(size: str, *, repeats: int) -> Outcome:
    """The learner itself with DeepSpeed, ZeRO 2 in bfloat16, against the dense step in the same process."""
    needed = ("deepspeed", "pydantic", "httpx")
    missing = [library for library in needed if importlib.util.find_spec(library) is None]
    if missing:
        return Outcome("learner with DeepSpeed", skipped=f"{' and '.join(missing)} not installed")
    from rlhf_ray.config import schema
    from rlhf_ray.distributed.place import Place
    from rlhf_ray.workers.learner import Learner
    from rlhf_ray.workers.objectives import LanguageObjective

    shape, where = SIZES[size], device()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save(shape, path)
        learner = Learner(
            Place("policy", 0, 1),
            config=schema.Learner(dtype="bfloat16", zero=2, micro_batch_tokens=shape.micro_batch),
            model=str(path),
            revision=None,
            head="none",
            seed=1,
            total_steps=10**6,
        )
    natural = Sequences.concat(natural_rows(shape, torch.Generator().manual_seed(0)))

    def step() -> float:
        def work() -> int:
            learner.update(natural, LanguageObjective(), epochs=1, mini_batches=1, iteration=1)
            return int(natural.attention_mask.sum())

        return per_second(work, where)

    @torch.no_grad()
    def judge() -> float:
        def work() -> int:
            learner.logprobs(natural)
            return int(natural.attention_mask.sum())

        return per_second(work, where)

    step(), judge()
    unit = "tokens per second"
    return Outcome(
        "learner with DeepSpeed",
        figures=(
            alone("gpu/learner/update", [step() for _ in range(repeats)], unit=unit),
            alone("gpu/learner/logprobs", [judge() for _ in range(repeats)], unit=unit),
        ),
    )


def per_second(work: Callable[[], int], where: torch.device) -> float:
    """Units of work in a second, waiting for the GPU at both ends."""
    settle(where)
    start = time.perf_counter()
    units = work()
    settle(where)
    return units / (time.perf_counter() - start)


def settle(where: torch.device) -> None:
    """Waits until the GPU has done what it was asked."""
    if where.type == "cuda":
        torch.cuda.synchronize()


def matrix_flops(side: int, where: torch.device) -> Callable[[], float]:
    """What measures the operations per second of a bfloat16 matrix product."""
    first, second = (torch.randn(side, side, device=where, dtype=torch.bfloat16) for _ in range(2))
    times = 20

    def work() -> int:
        for _ in range(times):
            first @ second
        return 2 * side**3 * times

    per_second(work, where)
    return lambda: per_second(work, where)


def finish(network: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    """Clips, steps and clears."""
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def model(size: Size, where: torch.device) -> LlamaForCausalLM:
    """Random weights in bfloat16."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        intermediate_size=size.intermediate,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=4 * size.row,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(where):
        made = LlamaForCausalLM(config)
    return made.to(torch.bfloat16)


def save(size: Size, path: Path) -> None:
    """Writes such a model with a tokenizer of one word a token."""
    from rlhf_ray.bench import workload

    model(size, torch.device("cpu")).save_pretrained(path)
    workload.tokenizer(size.vocabulary).save_pretrained(path)


def natural_rows(size: Size, random: torch.Generator) -> list[Sequences]:
    """Micro-batches of rows with log-normal lengths: a quarter prompt, then the response; as many tokens as dense."""
    budget, lengths = size.micro_batch * size.micro_batches, []
    while sum(lengths) < budget:
        draw = float(torch.randn(1, generator=random)) * 0.7 + math.log(size.row * 0.78)
        lengths.append(min(max(int(math.exp(draw)), 8), 4 * size.row, size.micro_batch))
    groups = plan_micro_batches(lengths, max_tokens=size.micro_batch)
    return [_rows([lengths[row] for row in group], size.vocabulary, random) for group in groups]


def _rows(lengths: Sequence[int], vocabulary: int, random: torch.Generator) -> Sequences:
    tokens = [torch.randint(1, vocabulary, (length,), generator=random).tolist() for length in lengths]
    return make_sequences([row[: len(row) // 4] for row in tokens], [row[len(row) // 4 :] for row in tokens])


if __name__ == "__main__":
    raise SystemExit(main())
