"""README's tables and plot are those of benchmarks/results/."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from rlhf_ray.bench.figures import Figure
from rlhf_ray.bench.results import collect
from rlhf_ray.bench.show import drawing
from rlhf_ray.bench.suite import Outcome

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_readme", REPOSITORY / "benchmarks" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_the_figures_of_the_files(script: ModuleType) -> None:
    readme = script.README.read_text()
    for name in script.TABLES:
        assert script.with_block(readme, name, script.results(name)) == readme, "run: python benchmarks/readme.py"
    assert script.PLOT.read_text() == drawing(script.main_figures(script.results("bench")))


@pytest.mark.parametrize("name", ["bench", "peers"])
def test_the_block_has_what_has_a_bound(script: ModuleType, name: str) -> None:
    bounded = Figure("learn/tokens", 9.0, "u", floor=10.0, ratio=0.9, repeats=5, at_least=0.8)
    others = [Figure("learn/alone", 3.0, "s"), replace(bounded, name="scale/two", at_least=None)]
    calls = Figure("sync/calls", 3.0, "calls", at_most=5.0)
    found = collect([Outcome("learn", figures=(bounded, *others, calls))], quick=False, load_before=(0, 0, 0))
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    readme = script.with_block(f"before\n{begin}old\n{end}\nafter\n", name, [found])
    assert "`learn/tokens`" in readme
    assert "`sync/calls`" in readme
    assert "learn/alone" not in readme
    assert "scale/two" not in readme
    assert readme.startswith("before\n")
    assert readme.endswith(f"{end}\nafter\n")
    assert script.with_block(readme, name, [found]) == readme
