"""Figures to look at: tables for the terminal, Markdown, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_ray.bench.figures import Figure
from rlhf_ray.bench.results import Comparison, Results
from rlhf_ray.errors import InstallError

_STYLES = {"regression": "bold red", "improvement": "green"}
_HELD, _MISSED, _UNBOUND, _BOUND, _INK = "#2f7d5b", "#c2452d", "#5b7083", "#111111", "#24292f"


def number(value: float) -> str:
    """Three digits, large numbers with thousands apart: 1461.3 -> `1,461`, 0.93213 -> `0.932`."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def short(unit: str) -> str:
    """`tokens per CPU-second` -> `tokens/CPU-s`."""
    return unit.replace(" per ", "/").replace("second", "s")


def bound(figure: Figure) -> str:
    """`>= 0.8`, `<= 1.25`, or nothing."""
    parts = [f">= {figure.at_least:g}"] if figure.at_least is not None else []
    return ", ".join([*parts, f"<= {figure.at_most:g}"] if figure.at_most is not None else parts)


def verdict(figure: Figure) -> str:
    """`ok`, `missed`, or nothing where there is no bound."""
    return ("missed" if figure.missed else "ok") if bound(figure) else ""


def results_table(results: Results) -> RenderableType:
    """Every figure beside its floor; what was skipped or failed; the machine."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("figure", overflow="fold")
    for heading in ("ours", "floor"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    for heading in ("ratio", "bound", "spread"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for figure in results.figures:
        table.add_row(
            figure.name,
            number(figure.value),
            "" if figure.floor is None else number(figure.floor),
            short(figure.unit),
            "" if figure.ratio is None else f"{figure.ratio:.3f}",
            bound(figure),
            f"{figure.spread:.0%}" if figure.repeats > 1 else "",
            Text(verdict(figure), style="bold red" if figure.missed else "green"),
        )
    lines = [f"{name}: skipped, {why}" for name, why in results.skipped.items()]
    lines += [f"{name}: FAILED, {why.splitlines()[0]}" for name, why in results.failed.items()]
    if results.missed:
        lines.append(f"missed: {', '.join(results.missed)}")
    lines.append(machine_line(results))
    return Group(table, *(Text(line) for line in lines))


def machine_line(results: Results) -> str:
    """Processor, cores, memory, GPUs, load, versions, date."""
    machine = results.machine
    gpus = f", {', '.join(machine['gpus'])}" if machine["gpus"] else ""
    load = f"load {results.load['before'][0]:g} before, {results.load['after'][0]:g} after"
    libraries = ", ".join(f"{name} {number}" for name, number in results.versions.items())
    hardware = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB{gpus}"
    return f"{hardware}; {load}; {libraries}; {results.date}"


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Each figure before and after, and what that means."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("figure", overflow="fold")
    for heading in ("first", "second", "change", "allowed"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for each in comparisons:
        table.add_row(
            each.name,
            _judged(each.before),
            _judged(each.after),
            "" if each.change is None else f"{each.change:+.1%}",
            "" if each.change is None else f"{each.allowed:.1%}",
            Text(each.verdict, style=_STYLES.get(each.verdict, "")),
        )
    return table


def _judged(figure: Figure | None) -> str:
    if figure is None:
        return ""
    return f"{number(figure.value)} {short(figure.unit)}" if figure.ratio is None else f"{figure.ratio:.3f}"


def markdown_table(figures: Sequence[Figure], *, floor: str = "floor") -> str:
    """The figures as a Markdown table; `floor` is the heading of what stands beside ours."""
    lines = [f"| figure | ours | {floor} | unit | ratio | bound |", "|---|---:|---:|---|---:|---:|"]
    for figure in figures:
        beside = "" if figure.floor is None else number(figure.floor)
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
        held = f"**{bound(figure)} missed**" if figure.missed else bound(figure)
        lines.append(f"| `{figure.name}` | {number(figure.value)} | {beside} | {figure.unit} | {ratio} | {held} |")
    return "\n".join(lines) + "\n"


def drawing(figures: Sequence[Figure]) -> str:
    """The ratios as bars, their bounds as ticks: an SVG that stands by itself.

    Of figures that have a ratio; a bar that holds its bound is green, one that misses it red.
    """
    shown = [figure for figure in figures if figure.ratio is not None]
    top, row, left, width = 42, 22, 270, 460
    most = max([1.0, *(max(_bar(figure), _tick(figure)) for figure in shown)]) * 1.05
    height = top + row * len(shown) + 14
    svg = ElementTree.Element(
        "svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {left + width + 70} {height}", role="img"
    )
    _element(svg, "rect", x=0, y=0, width=left + width + 70, height=height, fill="#ffffff")
    note = "ratio to what was measured beside it in the same run; | is the bound"
    _text(svg, note, x=10, y=20, weight="600")
    one = left + width / most
    _element(svg, "line", x1=one, x2=one, y1=top - 8, y2=height - 8, stroke="#b8c0c8", stroke_dasharray="3 3")
    for place, figure in enumerate(shown):
        y = top + row * place
        colour = _MISSED if figure.missed else _HELD if bound(figure) else _UNBOUND
        _text(svg, figure.name, x=left - 8, y=y + 12, anchor="end")
        _element(svg, "rect", x=left, y=y, width=width * _bar(figure) / most, height=row - 8, fill=colour, rx=2)
        _text(svg, f"{_bar(figure):.2f}", x=left + width * _bar(figure) / most + 5, y=y + 12)
        if _tick(figure):
            at = left + width * _tick(figure) / most
            _element(svg, "line", x1=at, x2=at, y1=y - 3, y2=y + row - 5, stroke=_BOUND, stroke_width=2)
    ElementTree.indent(svg)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def _bar(figure: Figure) -> float:
    return figure.ratio or 0.0


def _tick(figure: Figure) -> float:
    return (figure.at_least if figure.at_most is None else figure.at_most) or 0.0


def _element(parent: ElementTree.Element, tag: str, **attributes: str | float) -> ElementTree.Element:
    values = {
        name.replace("_", "-"): value if isinstance(value, str) else f"{value:.5g}"
        for name, value in attributes.items()
    }
    return ElementTree.SubElement(parent, tag, values)


def _text(
    parent: ElementTree.Element, text: str, *, x: float, y: float, anchor: str = "start", weight: str = "400"
) -> None:
    font = {"font_family": "sans-serif", "font_size": "12", "font_weight": weight, "text_anchor": anchor}
    _element(parent, "text", x=x, y=y, fill=_INK, **font).text = text


def write_plot(path: Path, results: Results) -> None:
    """Writes a page that needs nothing else: the ratios with their bounds, and the figures without a floor.

    Raises:
        InstallError: plotly is not installed.
    """
    check_plotly()
    from plotly.graph_objects import Bar, Scatter
    from plotly.graph_objects import Figure as Page
    from plotly.subplots import make_subplots

    rated = [figure for figure in results.figures if figure.ratio is not None]
    plain = [figure for figure in results.figures if figure.ratio is None]
    heights = [max(1, len(rated)), max(1, len(plain))]
    page: Any = make_subplots(
        rows=2,
        cols=1,
        row_heights=[part / sum(heights) for part in heights],
        specs=[[{"type": "xy"}], [{"type": "table"}]],
        subplot_titles=("ratio to the floor measured in the same run, with the bounds", "figures without a floor"),
        vertical_spacing=0.06,
    )
    assert isinstance(page, Page)
    page.add_trace(
        Bar(
            x=[figure.ratio for figure in rated],
            y=[figure.name for figure in rated],
            orientation="h",
            marker_color=[_MISSED if figure.missed else _HELD if bound(figure) else _UNBOUND for figure in rated],
            customdata=[
                [number(figure.value), number(figure.floor or 0), figure.unit, f"{figure.spread:.0%}", figure.repeats]
                for figure in rated
            ],
            hovertemplate="%{y}<br>%{customdata[0]} beside %{customdata[1]} %{customdata[2]}<br>"
            "ratio %{x:.3f}, spread %{customdata[3]} of %{customdata[4]}<extra></extra>",
            showlegend=False,
        ),
        row=1,
        col=1,
    )
    bounded = [figure for figure in rated if _tick(figure)]
    page.add_trace(
        Scatter(
            x=[_tick(figure) for figure in bounded],
            y=[figure.name for figure in bounded],
            mode="markers",
            marker={"symbol": "line-ns-open", "size": 16, "color": _BOUND, "line": {"width": 2}},
            hovertext=[bound(figure) for figure in bounded],
            hoverinfo="text",
            showlegend=False,
        ),
        row=1,
        col=1,
    )
    rows = [[figure.name, number(figure.value), figure.unit, bound(figure), verdict(figure)] for figure in plain]
    page.add_table(
        header={"values": ["figure", "value", "unit", "bound", ""], "align": "left"},
        cells={"values": [list(column) for column in zip(*rows, strict=True)] or [[]] * 5, "align": "left"},
        row=2,
        col=1,
    )
    page.update_yaxes(autorange="reversed", automargin=True)
    page.update_layout(height=220 + 26 * sum(heights), title=f"rlhf_ray: {machine_line(results)}", title_font_size=12)
    page.write_html(path, include_plotlyjs=True)


def check_plotly() -> None:
    """Raises InstallError where plotly is not installed."""
    from importlib.util import find_spec

    if find_spec("plotly") is None:
        raise InstallError("--plot: plotly is not installed; install it with  pip install plotly")
