"""Results as JSON, and verdicts on two of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_ray.bench.figures import Figure, from_pairs
from rlhf_ray.bench.results import Results, as_object, collect, compare, machine, read, same_machine, versions, write
from rlhf_ray.bench.suite import Outcome
from rlhf_ray.errors import DataError

HELD = Figure("a/x", 90.0, "tokens per CPU-second", floor=100.0, ratio=0.9, at_least=0.8, repeats=5, spread=0.04)
MISSED = Figure("b/y", 3.0, "ms", floor=1.0, ratio=3.0, at_most=2.0, repeats=5, spread=0.1)
ALONE = Figure("c/z", 7.0, "s")
RATE = replace(ALONE, unit="samples per second")


def results(*figures: Figure) -> Results:
    return collect([Outcome("a", figures=figures)], quick=False, load_before=(0.5, 0.25, 0.125))


def test_a_file_holds_what_was_measured(tmp_path: Path) -> None:
    outcomes = [Outcome("a", figures=(HELD, ALONE)), Outcome("b", skipped="no GPU"), Outcome("c", failed="died")]
    found = collect(outcomes, quick=True, load_before=(0.5, 0.25, 0.125))
    write(tmp_path / "f.json", found)
    assert read(tmp_path / "f.json") == found
    values = json.loads((tmp_path / "f.json").read_text())
    assert values["figures"][0] == {
        "name": "a/x",
        "value": 90.0,
        "unit": "tokens per CPU-second",
        "floor": 100.0,
        "ratio": 0.9,
        "at_least": 0.8,
        "repeats": 5,
        "spread": 0.04,
    }
    assert set(values["figures"][1]) == {"name", "value", "unit", "repeats", "spread"}
    assert (values["skipped"], values["failed"], values["quick"]) == ({"b": "no GPU"}, {"c": "died"}, True)
    assert values["load"]["before"] == [0.5, 0.25, 0.12]
    assert set(values["machine"]) == {"cpu", "cores", "memory_gib", "gpus"}
    assert values["versions"]["torch"] == versions()["torch"]


def test_numbers_have_six_digits() -> None:
    assert as_object(replace(ALONE, value=1234.56789))["value"] == 1234.57


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not JSON"), ("{}", "no results"), ('{"figures": [{"name": "a"}]}', "no results"), ("[]", "no results")],
)
def test_another_file_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        read(path)
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "none.json")


def test_missed_bounds() -> None:
    assert results(HELD, MISSED, ALONE).missed == ["b/y"]


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        # Half of both spreads, 4 % and 4 %, is 4 %.
        (HELD, replace(HELD, ratio=0.865), "same"),
        (HELD, replace(HELD, ratio=0.86), "regression"),
        (HELD, replace(HELD, ratio=0.94), "improvement"),
        # The ratio decides, not the speed of the machine on that day.
        (HELD, replace(HELD, value=45.0, floor=50.0), "same"),
        # A larger ratio of times is worse.
        (MISSED, replace(MISSED, ratio=3.4), "regression"),
        (MISSED, replace(MISSED, ratio=2.6), "improvement"),
        # Measured once: a fifth more or less says nothing. Seconds are better when fewer.
        (ALONE, replace(ALONE, value=8.3), "same"),
        (ALONE, replace(ALONE, value=8.5), "regression"),
        (
            replace(ALONE, unit="samples per second"),
            replace(ALONE, value=8.5, unit="samples per second"),
            "improvement",
        ),
        # Without a floor in one of both the values are compared.
        (HELD, replace(HELD, value=70.0, ratio=None, floor=None), "regression"),
        # Where the spreads are zero, 3 % is still nothing.
        (replace(HELD, spread=0.0), replace(HELD, ratio=0.88, spread=0.0), "same"),
    ],
)
def test_verdicts(old: Figure, new: Figure, verdict: str) -> None:
    (found,) = compare([old], [new])
    assert found.verdict == verdict


def test_figures_of_one_file_alone() -> None:
    assert [(each.name, each.verdict) for each in compare([HELD, ALONE], [MISSED, ALONE])] == [
        ("a/x", "only in the first"),
        ("c/z", "same"),
        ("b/y", "only in the second"),
    ]


def test_only_results_of_like_machines_are_compared() -> None:
    here = results(HELD)
    assert here.machine == machine()
    assert same_machine(here, replace(here, machine={**here.machine, "memory_gib": 1.0}))
    for part, other in (("cpu", "another"), ("cores", 999), ("gpus", ["H200"])):
        assert not same_machine(here, replace(here, machine={**here.machine, part: other}))


def test_a_figure_of_repeats() -> None:
    figure = from_pairs("a", [(8.0, 10.0), (9.0, 10.0), (12.0, 12.0)], unit="u", at_least=0.95)
    assert (figure.value, figure.floor, figure.ratio, figure.repeats) == (9.0, 10.0, 0.9, 3)
    assert figure.spread == pytest.approx(0.2 / 0.9)
    assert figure.missed
