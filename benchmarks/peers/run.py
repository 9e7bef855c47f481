"""The same work by rlhf_ray and by TRL, in turn, on one thread per process: one table of ratios per CPU-second.

    python benchmarks/peers/install.py              # once: TRL's own environment
    python benchmarks/peers/run.py [--quick] [--only dpo sft] [--json peers.json]

What is compared, and how each side is set, is told in benchmarks/peers/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from install import OLD_TRL, PYTHON
from ours import ROOT, measured_run
from rich.console import Console
from rich.table import Table

from pipelines import STAGES, write_inputs
from rlhf_ray.bench.figures import Figure, from_pairs
from rlhf_ray.bench.results import collect, write
from rlhf_ray.bench.suite import Outcome

SINGLE, HALF = "float32", "bfloat16"


@dataclass(frozen=True)
class Peer:
    """A run of TRL.

    Args:
        name: in the names of figures.
        script: which one.
        micro: rows of a forward pass by our dtype: the fastest of those tried, unless the name says otherwise.
        variant: of the script.
        half: how TRL is told bfloat16: the faster of `bfloat16` and `autocast`.
    """

    name: str
    script: str
    micro: dict[str, int]
    variant: str = ""
    half: str = HALF


@dataclass(frozen=True)
class Group:
    """Runs that are measured in turn.

    Args:
        name: of the work.
        unit: what is counted.
        batch: rows of an optimizer step.
        warm: steps before the measured ones.
        steps: measured ones.
        peers: runs of TRL.
        ratios: (one of STAGES, a peer's name, the ratio that ours should have at least).
    """

    name: str
    unit: str
    batch: int
    warm: int
    steps: int
    peers: tuple[Peer, ...]
    ratios: tuple[tuple[str, str, dict[str, float]], ...]


def both(number: float) -> dict[str, float]:
    """The same for both types."""
    return {SINGLE: number, HALF: number}


GROUPS = (
    Group(
        "dpo",
        "pairs",
        batch=32,
        warm=2,
        steps=2,
        peers=(Peer("trl", "trl_dpo", both(4), "plain"), Peer("trl_precomputed", "trl_dpo", both(4), "precomputed")),
        ratios=(
            ("dpo", "trl", both(1.9)),
            ("dpo_cached", "trl", both(2.6)),
            ("dpo_cached", "trl_precomputed", {}),
        ),
    ),
    Group(
        "sft",
        "tokens",
        batch=32,
        warm=2,
        steps=2,
        peers=(
            Peer("trl_padded", "trl_sft", both(8), "padded"),
            Peer("trl_padded_4", "trl_sft", both(4), "padded"),
            Peer("trl_padded_32", "trl_sft", both(32), "padded"),
            Peer("trl_grouped", "trl_sft", both(4), "grouped"),
            Peer("trl_packed", "trl_sft", both(1), "packed"),
        ),
        ratios=(
            ("sft", "trl_padded", both(1.9)),
            ("sft", "trl_packed", both(1.15)),
            ("sft", "trl_grouped", {}),
            ("sft", "trl_padded_4", {}),
            ("sft", "trl_padded_32", {}),
        ),
    ),
    Group(
        "reward_model",
        "pairs",
        batch=32,
        warm=2,
        steps=2,
        peers=(Peer("trl", "trl_reward", both(4)),),
        ratios=(("reward_model", "trl", both(1.7)),),
    ),
    Group(
        "ppo",
        "samples",
        batch=64,
        warm=1,
        steps=2,
        peers=(Peer("trl", "trl_ppo", both(16)),),
        ratios=(("ppo", "trl", {SINGLE: 1.55, HALF: 1.5}),),
    ),
    Group(
        "grpo",
        "samples",
        batch=64,
        warm=1,
        steps=2,
        peers=(Peer("trl", "trl_grpo", both(16)),),
        ratios=(("grpo", "trl", {}),),
    ),
)


@dataclass(frozen=True)
class Rate:
    """Work per CPU-second and per second, and what Ray's own processes took beside, as a share of ours."""

    per_cpu_second: float
    per_second: float
    daemons: float = 0.0


def ours(group: Group, stage: str, dtype: str, folder: Path) -> Rate:
    """Our rate in one run."""
    place = folder / "runs" / stage
    shutil.rmtree(place, ignore_errors=True)
    total = group.warm + group.steps + 1
    found = measured_run(STAGES[stage](folder, dtype, total), place, warm=group.warm, steps=group.steps)
    units = sum(row["policy/tokens"] for row in found.rows) if group.unit == "tokens" else group.steps * group.batch
    return Rate(units / found.cpu_s, units / found.wall_s, found.daemons_cpu_s / found.cpu_s)


def theirs(group: Group, peer: Peer, dtype: str, folder: Path) -> Rate:
    """TRL's rate in one run."""
    # A step of packs has as many rows as the batch would have, as near as packs of 512 tokens come.
    batch = 8 if peer.variant == "packed" else group.batch
    command = [str(PYTHON), str(Path(__file__).parent / f"{peer.script}.py")]
    given = {
        "model": folder / "model",
        "folder": folder,
        "dtype": SINGLE if dtype == SINGLE else peer.half,
        "batch": batch,
        "micro": peer.micro[dtype],
        "warm": group.warm,
        "steps": group.steps,
        "variant": peer.variant,
    }
    for name, value in given.items():
        command += [f"--{name}", str(value)]
    path = os.pathsep.join([*([str(OLD_TRL)] if peer.script == "trl_ppo" else []), str(ROOT)])
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{run.stderr[-3000:]}")
    found = json.loads(run.stdout.splitlines()[-1])
    units = found["units"][group.unit]
    return Rate(units / found["cpu_s"], units / found["wall_s"])


def measure(group: Group, dtype: str, folder: Path, *, repeats: int, console: Console) -> list[Figure]:
    """The group's figures, each run measured `repeats` times in turn with the others."""
    runs = {("ours", stage): stage for stage in dict.fromkeys(stage for stage, _, _ in group.ratios)}
    jobs = [*runs, *(("theirs", peer.name) for peer in group.peers)]
    peers = {peer.name: peer for peer in group.peers}
    rates: dict[tuple[str, str], list[Rate]] = {job: [] for job in jobs}
    for repeat in range(repeats):
        for job in jobs if repeat % 2 == 0 else reversed(jobs):
            side, name = job
            rate = ours(group, name, dtype, folder) if side == "ours" else theirs(group, peers[name], dtype, folder)
            rates[job].append(rate)
            extra = f", Ray's own processes {rate.daemons:.1%} of that beside" if side == "ours" else ""
            console.print(
                f"{group.name} {dtype} {side} {name}: {rate.per_cpu_second:.2f} {group.unit} per CPU-second, "
                f"{rate.per_second:.2f} per second{extra}"
            )
    figures = []
    for stage, peer, bounds in group.ratios:
        pairs = list(zip(rates["ours", stage], rates["theirs", peer], strict=True))
        name = f"peers/{stage}/{peer}/{dtype}"
        figures.append(
            from_pairs(
                name,
                [(mine.per_cpu_second, other.per_cpu_second) for mine, other in pairs],
                unit=f"{group.unit}/cpu-s",
                at_least=bounds.get(dtype),
            )
        )
        if group.unit == "samples":
            walls = [(mine.per_second, other.per_second) for mine, other in pairs]
            figures.append(from_pairs(f"{name}/wall", walls, unit=f"{group.unit}/s"))
    return figures


def show(figures: list[Figure], console: Console) -> None:
    """Prints the table."""
    table = Table("figure", "rlhf_ray", "TRL", "unit", "ratio", "at least", "spread")
    for figure in figures:
        bound = "" if figure.at_least is None else f"{figure.at_least:g}{' MISSED' if figure.missed else ''}"
        table.add_row(
            figure.name,
            f"{figure.value:.2f}",
            f"{figure.floor:.2f}",
            figure.unit,
            f"{figure.ratio:.2f}",
            bound,
            f"{figure.spread:.0%}",
        )
    console.print(table)


def main() -> int:
    """Measures what is asked for; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat of each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=[group.name for group in GROUPS], help="these alone")
    parser.add_argument("--dtype", nargs="*", choices=[SINGLE, HALF], default=[SINGLE, HALF])
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if not PYTHON.exists():
        raise SystemExit(f"{PYTHON} is missing; make it with: python {Path(__file__).parent / 'install.py'}")
    console = Console(width=140)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    figures: list[Figure] = []
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="peers_") as name:
        folder = Path(name)
        write_inputs(folder)
        for dtype in arguments.dtype:
            for group in GROUPS:
                if arguments.only is None or group.name in arguments.only:
                    repeats = 1 if arguments.quick else arguments.repeats
                    figures += measure(group, dtype, folder, repeats=repeats, console=console)
    show(figures, console)
    if arguments.json:
        outcome = Outcome("peers", figures=tuple(figures))
        results = collect([outcome], quick=arguments.quick, load_before=load)
        write(arguments.json, replace(results, versions=results.versions | {"trl": "1.16, PPO 1.12"}))
    return int(any(figure.missed for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
