"""Puts the figures of benchmarks/results/ into README.md, and draws those of the first table as bench.svg beside them.

python benchmarks/readme.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_ray.bench.figures import Figure
from rlhf_ray.bench.results import Results, read
from rlhf_ray.bench.show import drawing, machine_line, markdown_table

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
PLOT = FOLDER / "bench.svg"
README = ROOT / "README.md"
TABLES = {
    "bench": ("floor", ("bench", "sync", "rollout", "startup_memory", "driver")),
    "peers": ("TRL", ("peers", "peers_bfloat16")),
}
"""By name: what stands beside ours, and the files, each of one run."""


def results(name: str) -> list[Results]:
    """The runs of a table."""
    return [read(FOLDER / f"{file}.json") for file in TABLES[name][1]]


def main_figures(runs: Sequence[Results]) -> list[Figure]:
    """The figures with a bound; the others are left to the files."""
    figures = [figure for run in runs for figure in run.figures]
    return [figure for figure in figures if figure.at_least is not None or figure.at_most is not None]


def block(name: str, runs: Sequence[Results]) -> str:
    """What README.md has between the two marks of this name."""
    machines = "".join(f"\n{machine_line(run)}.\n" for run in runs)
    return markdown_table(main_figures(runs), floor=TABLES[name][0]) + machines


def with_block(readme: str, name: str, runs: Sequence[Results]) -> str:
    """README.md with the block of these runs."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = readme.partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"README.md: {begin.strip()} and {end} are not there")
    return before + begin + block(name, runs) + end + after


if __name__ == "__main__":
    text = README.read_text()
    for table in TABLES:
        text = with_block(text, table, results(table))
    README.write_text(text)
    PLOT.write_text(drawing(main_figures(results("bench"))))
