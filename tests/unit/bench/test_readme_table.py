"""README's table and plot are those of benchmarks/results/bench.json."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from rlhf_ray.bench.figures import Figure
from rlhf_ray.bench.results import collect, read
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


def test_the_readme_has_the_figures_of_the_file(script: ModuleType) -> None:
    found = read(script.RESULTS)
    readme = script.README.read_text()
    assert script.with_block(readme, found) == readme, "run: python benchmarks/readme.py"
    assert script.PLOT.read_text() == drawing(script.main_figures(found))


def test_the_block_has_what_stands_beside_a_floor(script: ModuleType) -> None:
    rated = Figure("learn/tokens", 9.0, "u", floor=10.0, ratio=0.9, repeats=5)
    others = [Figure("learn/alone", 3.0, "s"), replace(rated, name="scale/two"), Figure("sync/calls", 3.0, "calls")]
    bounded = replace(others[2], at_most=5.0)
    found = collect([Outcome("learn", figures=(rated, *others[:2], bounded))], quick=False, load_before=(0, 0, 0))
    readme = script.with_block(f"before\n{script.BEGIN}old\n{script.END}\nafter\n", found)
    assert "`learn/tokens`" in readme
    assert "`sync/calls`" in readme
    assert "learn/alone" not in readme
    assert "scale/two" not in readme
    assert readme.startswith("before\n")
    assert readme.endswith(f"{script.END}\nafter\n")
    assert script.with_block(readme, found) == readme
