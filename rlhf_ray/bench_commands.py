"""`rlhf-ray bench NAME...` and `rlhf-ray bench compare FIRST SECOND`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rlhf_ray.bench.suite import BENCHMARKS
from rlhf_ray.config.problems import suggestion
from rlhf_ray.errors import ConfigError
from rlhf_ray.options import check_target
from rlhf_ray.terminal import exit_codes, show, sigterm_exits

ALL = "all"
REPEATS = 5
QUICK_REPEATS = 2
DEADLINE_S = 7200.0
QUICK_DEADLINE_S = 1200.0


class _RunIsTheDefault(TyperGroup):
    """`bench learn` is `bench run learn`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        found: list[str] = super().parse_args(ctx, args)
        return found


app = typer.Typer(
    cls=_RunIsTheDefault,
    help="Measure this machine, each figure beside its floor in the same run. `bench learn` is short for "
    "`bench run learn`.",
    no_args_is_help=True,
)

Names = Annotated[
    list[str],
    typer.Argument(metavar="NAME...", help=f"{', '.join(BENCHMARKS)}, or {ALL}.", show_default=False),
]


@app.command("run")
def run_command(
    names: Names,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repeats, the main sizes alone.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write machine, versions, load and figures as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.html", help="Write a plot as a page by itself.")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Repeats of each figure; {REPEATS}, or {QUICK_REPEATS} with --quick.", show_default=False
        ),
    ] = None,
) -> None:
    """Run benchmarks, print their table; exit code 1 where a bound is missed, or one fails or none can run."""
    with exit_codes():
        chosen = _chosen(names)
        check_target("--json", json_file, ".json")
        check_target("--plot", plot, ".html")
        if plot is not None:
            from rlhf_ray.bench.show import check_plotly

            check_plotly()
        if repeats is None:
            repeats = QUICK_REPEATS if quick else REPEATS
        with sigterm_exits():
            passed = _run(chosen, quick=quick, repeats=repeats, json_file=json_file, plot=plot)
        if not passed:
            raise SystemExit(1)


@app.command("compare")
def compare_command(
    first: Annotated[Path, typer.Argument(metavar="FIRST.json", help="Of an earlier `bench --json`.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND.json", help="Of a later one.")],
) -> None:
    """Compare two files of `bench --json`; exit code 1 where a figure got worse by more than the spreads allow."""
    with exit_codes():
        from rlhf_ray.bench.results import compare, read, same_machine
        from rlhf_ray.bench.show import comparison_table, machine_line

        before, after = read(first), read(second)
        if not same_machine(before, after):
            print(
                f"warning: {first} and {second} are of different machines, so nothing is compared:\n"
                f"  {machine_line(before)}\n  {machine_line(after)}",
                file=sys.stderr,
                flush=True,
            )
            return
        comparisons = compare(before.figures, after.figures)
        show(comparison_table(comparisons))
        worse = [each.name for each in comparisons if each.verdict == "regression"]
        show(f"regressions: {', '.join(worse)}" if worse else "no regression")
        if worse:
            raise SystemExit(1)


def _chosen(names: Sequence[str]) -> list[str]:
    """The benchmarks to run, each once, in the order asked for.

    Raises:
        ConfigError: there is no such benchmark.
    """
    for name in names:
        if name not in BENCHMARKS and name != ALL:
            known = [*BENCHMARKS, ALL]
            raise ConfigError(f"bench: got {name!r}, wanted one of {', '.join(known)}{suggestion(name, known)}")
    return list(dict.fromkeys(each for name in names for each in (BENCHMARKS if name == ALL else [name])))


def _run(names: Sequence[str], *, quick: bool, repeats: int, json_file: Path | None, plot: Path | None) -> bool:
    """Runs them one after the other, shows and writes what they found; whether nothing failed and no bound is missed.

    A file is written anew after each benchmark, so that a long run that is stopped leaves what it has.
    """
    from rich.console import Console

    from rlhf_ray.bench.results import collect, write
    from rlhf_ray.bench.show import results_table, write_plot
    from rlhf_ray.bench.suite import Outcome, run_benchmark

    load_before = os.getloadavg()
    outcomes: list[Outcome] = []
    progress = Console(stderr=True, highlight=False, markup=False)
    folder = Path(tempfile.mkdtemp(prefix="rlhf_ray_bench_"))
    try:
        for place, name in enumerate(names, start=1):
            own = folder / name
            own.mkdir()
            heading = f"[{place}/{len(names)}] {name}"
            progress.print(f"{heading}: {BENCHMARKS[name].about}")
            outcome = run_benchmark(
                name,
                folder=own,
                repeats=repeats,
                quick=quick,
                deadline_s=QUICK_DEADLINE_S if quick else DEADLINE_S,
                say=_sayer(progress, heading),
            )
            shutil.rmtree(own, ignore_errors=True)
            outcomes.append(outcome)
            if outcome.skipped is not None:
                progress.print(f"{heading}: skipped, {outcome.skipped}")
            if outcome.failed is not None:
                progress.print(f"{heading}: FAILED, {outcome.failed}")
            results = collect(outcomes, quick=quick, load_before=load_before)
            if json_file is not None:
                write(json_file, results)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(results_table(results))
    if plot is not None:
        write_plot(plot, results)
    return bool(results.figures) and not results.missed and not results.failed


def _sayer(console: Any, heading: str) -> Callable[[str], None]:
    return lambda text: console.print(f"{heading}: {text}")
