"""Puts the figures of benchmarks/results/bench.json into README.md, and draws its plot, benchmarks/results/bench.svg.

python benchmarks/readme.py
"""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.bench.figures import Figure
from rlhf_ray.bench.results import Results, read
from rlhf_ray.bench.show import drawing, machine_line, markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "bench.json"
PLOT = RESULTS.with_suffix(".svg")
README = ROOT / "README.md"
BEGIN, END = "<!-- bench -->\n", "<!-- /bench -->"


def main_figures(results: Results) -> list[Figure]:
    """The figures beside a floor, and those with a bound; how cost grows is left to the file."""
    return [
        figure
        for figure in results.figures
        if not figure.name.startswith("scale/")
        and (figure.ratio is not None or figure.at_least is not None or figure.at_most is not None)
    ]


def block(results: Results) -> str:
    """What README.md has between its two marks."""
    return f"{markdown_table(main_figures(results))}\n{machine_line(results)}.\n"


def with_block(readme: str, results: Results) -> str:
    """README.md with the block of these results."""
    before, _, rest = readme.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"README.md: {BEGIN.strip()} and {END} are not there")
    return before + BEGIN + block(results) + END + after


if __name__ == "__main__":
    found = read(RESULTS)
    README.write_text(with_block(README.read_text(), found))
    PLOT.write_text(drawing(main_figures(found)))
