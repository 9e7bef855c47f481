"""Tables and drawings of figures."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import pytest
from rich.console import Console, RenderableType

from rlhf_ray.bench.figures import Figure
from rlhf_ray.bench.results import collect, compare
from rlhf_ray.bench.show import comparison_table, drawing, markdown_table, number, results_table
from rlhf_ray.bench.suite import Outcome

TOKENS = "tokens per CPU-second"
HELD = Figure("a/held", 1432.4, TOKENS, floor=1656.0, ratio=0.865, at_least=0.8, repeats=5, spread=0.04)
MISSED = Figure("b/missed", 3.0, "ms", floor=1.0, ratio=3.0, at_most=2.0, repeats=5, spread=0.1)
ALONE = Figure("c/alone", 7.25, "s")


def shown(what: RenderableType, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def table_of(*outcomes: Outcome) -> RenderableType:
    return results_table(collect(outcomes, quick=False, load_before=(0.5, 0.0, 0.0)))


@pytest.mark.parametrize(
    ("value", "text"), [(1461.3, "1,461"), (99.94, "99.9"), (0.93213, "0.932"), (0.0, "0"), (-250.0, "-250")]
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_the_table_says_everything() -> None:
    outcomes = [
        Outcome("a", figures=(HELD, MISSED, ALONE)),
        Outcome("x", skipped="no GPU"),
        Outcome("y", failed="no\nat"),
    ]
    text = shown(results_table(collect(outcomes, quick=False, load_before=(0.5, 0.0, 0.0))))
    rows = {words[0]: words[1:] for line in text.splitlines() if len(words := line.split()) > 2}
    assert rows["a/held"] == ["1,432", "1,656", "tokens/CPU-s", "0.865", ">=", "0.8", "4%", "ok"]
    assert rows["b/missed"] == ["3", "1", "ms", "3.000", "<=", "2", "10%", "missed"]
    assert rows["c/alone"] == ["7.25", "s"]
    for words in ("x: skipped, no GPU", "y: FAILED, no\n", "missed: b/missed\n", "load 0.5 before"):
        assert words in text


def test_a_narrow_terminal_keeps_the_numbers() -> None:
    long = Figure("benchmark/figure/with/a/long/name", 1432.0, TOKENS, floor=1656.0, ratio=0.865, at_least=0.8)
    text = shown(table_of(Outcome("a", figures=(long,))), width=80)
    assert text.splitlines()[3].split()[1:] == ["1,432", "1,656", "tokens/CPU-s", "0.865", ">=", "0.8", "ok"]
    assert "benchmark/figure/" in text


def test_the_comparison_says_everything() -> None:
    slower = Figure("a/held", 1200.0, TOKENS, floor=1656.0, ratio=0.725, repeats=5, spread=0.02)
    text = shown(comparison_table(compare([HELD, ALONE], [slower])))
    rows = {words[0]: words[1:] for line in text.splitlines() if len(words := line.split()) > 2}
    assert rows["a/held"] == ["0.865", "0.725", "-16.2%", "3.0%", "regression"]
    assert rows["c/alone"] == ["7.25", "s", "only", "in", "the", "first"]


def test_a_markdown_row_for_each_figure() -> None:
    assert markdown_table([HELD, MISSED, ALONE]).splitlines()[2:] == [
        "| `a/held` | 1,432 | 1,656 | tokens per CPU-second | 0.86 | >= 0.8 |",
        "| `b/missed` | 3 | 1 | ms | 3.00 | **<= 2 missed** |",
        "| `c/alone` | 7.25 |  | s |  |  |",
    ]


def test_the_drawing_has_a_bar_for_each_ratio() -> None:
    root = ElementTree.fromstring(drawing([HELD, MISSED, ALONE]))
    space = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in root.iter(f"{space}text")]
    assert texts[1:] == ["a/held", "0.86", "b/missed", "3.00"]
    _, held, missed = root.iter(f"{space}rect")
    assert float(missed.get("width", "0")) / float(held.get("width", "1")) == pytest.approx(3.0 / 0.865, rel=1e-3)
    assert held.get("fill") != missed.get("fill")
