"""`rlhf-ray bench` and `bench compare`: exit codes, what they print and write; the measuring itself is played."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.bench import suite
from rlhf_ray.bench.figures import Figure
from rlhf_ray.bench.results import collect, read, write
from rlhf_ray.bench.suite import BENCHMARKS, Outcome
from rlhf_ray.bench_commands import QUICK_REPEATS, REPEATS
from rlhf_ray.cli import main

HELD = Figure("learn/tokens", 9.0, "tokens per CPU-second", floor=10.0, ratio=0.9, at_least=0.8, repeats=5)
MISSED = replace(HELD, name="score/tokens", ratio=0.5)


class Played:
    """Stands for the processes of the benchmarks: notes what is asked for, answers with what it has."""

    def __init__(self) -> None:
        self.answers: dict[str, Outcome] = {}
        self.asked: dict[str, tuple[int, bool]] = {}

    def run_benchmark(self, name: str, *, repeats: int, quick: bool, folder: Path, **others: Any) -> Outcome:
        assert list(folder.iterdir()) == []
        self.asked[name] = (repeats, quick)
        return self.answers.get(name, Outcome(name, skipped="no GPU"))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Played:
    found = Played()
    monkeypatch.setattr(suite, "run_benchmark", found.run_benchmark)
    monkeypatch.chdir(tmp_path)
    return found


def code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    return stopped.value.code


def test_bounds_held(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    played.answers["learn"] = Outcome("learn", figures=(HELD,))
    assert code("learn", "--quick", "--json", "f.json") == 0
    assert played.asked == {"learn": (QUICK_REPEATS, True)}
    assert "learn/tokens" in capsys.readouterr().out
    found = read(Path("f.json"))
    assert (found.figures, found.quick) == ((HELD,), True)


def test_everything_that_the_machine_can(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    played.answers["learn"] = Outcome("learn", figures=(HELD,))
    assert code("all", "learn") == 0
    assert played.asked == dict.fromkeys(BENCHMARKS, (REPEATS, False))
    assert "rollout: skipped, no GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Outcome("score", figures=(MISSED,)), "missed: score/tokens"),
        (Outcome("score", failed="ValueError: no"), "score: FAILED, ValueError: no"),
    ],
)
def test_a_bound_missed_or_a_failure_is_exit_code_1(
    answer: Outcome, words: str, played: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    played.answers = {"learn": Outcome("learn", figures=(HELD,)), "score": answer}
    assert code("score", "learn", "--repeats", "1", "--json", "f.json") == 1
    assert played.asked == {"score": (1, False), "learn": (1, False)}
    assert words in capsys.readouterr().out
    assert HELD in read(Path("f.json")).figures


def test_nothing_that_can_be_measured_is_exit_code_1(played: Played) -> None:
    assert code("rollout") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lern"], "bench: got 'lern', wanted one of rollout, "),
        (["lern"], "did you mean `learn`?"),
        (["learn", "--json", "nowhere/f.json"], "--json: got 'nowhere/f.json', which is in a folder that does not"),
        (["learn", "--json", "f.txt"], "wanted a file that ends in .json"),
        (["learn", "--plot", "f.png"], "wanted a file that ends in .html"),
        (["learn", "--repeats", "0"], "greater than or equal to 1"),
        (["--quick"], "Missing argument 'NAME...'"),
        (["compare", "a.json"], "Missing argument 'SECOND.json'"),
        (["compare", "a.json", "b.json"], "a.json: cannot be read: No such file or directory"),
    ],
)
def test_mistakes(arguments: list[str], words: str, played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    assert code(*arguments) == 2
    # typer draws a box as wide as the terminal around its own messages.
    text = capsys.readouterr().err
    assert words in text or words in " ".join(text.replace("│", " ").split())
    assert played.asked == {}


def test_a_plot_wants_plotly(
    played: Played, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert code("learn", "--plot", "f.html") == 2
    assert "pip install plotly" in capsys.readouterr().err


def files(*versions: Figure, cpu: str | None = None) -> tuple[str, str]:
    for place, figure in enumerate(versions):
        found = collect([Outcome("learn", figures=(figure,))], quick=False, load_before=(0, 0, 0))
        if place and cpu:
            found = replace(found, machine={**found.machine, "cpu": cpu})
        write(Path(f"{place}.json"), found)
    return "0.json", "1.json"


def test_a_regression_is_exit_code_1(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    assert code("compare", *files(HELD, replace(HELD, ratio=0.7))) == 1
    assert "regressions: learn/tokens" in capsys.readouterr().out
    assert code("compare", *files(HELD, HELD)) == 0
    assert "no regression" in capsys.readouterr().out


def test_other_machines_are_not_compared(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    assert code("compare", *files(HELD, replace(HELD, ratio=0.1), cpu="another")) == 0
    output = capsys.readouterr()
    assert "warning: 0.json and 1.json are of different machines" in output.err
    assert output.out == ""


def test_a_plot_is_a_page_by_itself(played: Played) -> None:
    played.answers["learn"] = Outcome("learn", figures=(HELD, MISSED, Figure("learn/alone", 3.0, "s")))
    assert code("learn", "--plot", "f.html") == 1
    page = Path("f.html").read_text()
    for words in ("learn/tokens", "score/tokens", "learn/alone"):
        assert words in page or words.replace("/", "\\u002f") in page
    assert 'src="http' not in page
