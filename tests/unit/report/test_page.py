"""The page: what it says, and that no text of a model or a file becomes a part of it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_ray.cli import main
from rlhf_ray.report.charts import MOST_POINTS, learning_charts
from rlhf_ray.report.history import StageHistory, read_run
from rlhf_ray.report.page import report_page, run_names
from rlhf_ray.report.timeline import timelines
from tests.unit.report.runs_for_tests import HOSTILE, write_run


class Outline(HTMLParser):
    """The elements of a page, and its text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, text):
        if self._inside not in ("script", "style"):
            self.text += text + " "


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report_page([read_run(write_run(tmp_path_factory.mktemp("runs") / "small", response=HOSTILE))])


def test_it_says_what_a_reader_wants_first(page):
    text = Outline(page).text
    for words in ("small", "-0.250 → 1.000", "1.50", "1 min 25 s", "so far; not finished", "10.0%", "at 2", "0.50 GiB"):
        assert words in text, words


def test_planned_memory_stands_beside_the_measured(tmp_path):
    run = write_run(tmp_path / "small")
    (run / "plan.json").write_text(json.dumps({"stages": {"ppo": {"memory_gib": {"policy": 0.47}}}}))
    assert "0.50 GiB, planned 0.47" in Outline(report_page([read_run(run)])).text
    (run / "plan.json").write_text('{"stages"')
    assert "planned 0.47" not in Outline(report_page([read_run(run)])).text


def test_texts_of_a_model_stay_text(page):
    outline = Outline(page)
    assert HOSTILE in outline.text
    assert [tag for tag, _ in outline.tags if tag in ("img", "iframe", "object", "link")] == []
    assert sum(tag == "script" for tag, _ in outline.tags) == 3


def test_names_of_stages_and_runs_stay_text(tmp_path):
    stage = "</script><b>x"
    run_dir = write_run(tmp_path / "<b>y", settings={"stages": [{"name": stage, "method": "ppo"}], "note": "</pre><b>"})
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"ppo"', json.dumps(stage)))
    page = report_page([read_run(run_dir)])
    outline = Outline(page)
    assert not any(tag == "b" for tag, _ in outline.tags)
    assert "<b>y · rlhf_ray" in outline.text
    assert embedded(page)["stages"][1]["name"] == stage


def test_it_loads_nothing_and_runs_only_its_own_scripts(page):
    outline = Outline(page)
    assert not any({"src", "href"} & attributes.keys() for _, attributes in outline.tags)
    (policy,) = [attributes["content"] for _, attributes in outline.tags if "http-equiv" in attributes]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy.split("style-src")[0]


def test_curves_of_two_runs_lie_over_each_other(tmp_path):
    other = {"stages": [{"name": "sft", "method": "sft"}, {"name": "ppo", "method": "ppo", "kl": {"target": 3.0}}]}
    runs = [read_run(write_run(tmp_path / "one")), read_run(write_run(tmp_path / "two", settings=other))]
    page = report_page(runs)
    data = embedded(page)
    charts = {(stage["name"], chart["title"]): chart for stage in data["stages"] for chart in stage["charts"]}
    reward = charts["ppo", "Reward"]
    assert [(s["run"], s["label"], s["x"], s["y"]) for s in reward["series"]] == [
        (run, label, x, y)
        for run in (0, 1)
        for label, x, y in (
            ("training samples", [1, 2], [0.5, 1.0]),
            ("held-out prompts", [0, 1, 2], [-0.25, 0.5, 1.0]),
        )
    ]
    assert reward["series"][0]["spread"] == [0.1, 0.1]
    assert [run["name"] for run in data["runs"]] == ["one", "two"]
    text = Outline(page).text
    assert re.search(r"ppo\.kl\.target +6\.0 +3\.0", text)
    assert "ppo.name" not in text


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [read_run(write_run(tmp_path / folder / "run")) for folder in ("a", "b")]
    assert run_names(runs) == ["a/run", "b/run"]


def test_the_timeline_has_the_last_attempt_of_each_iteration(tmp_path):
    shown = timelines(read_run(write_run(tmp_path / "small")))
    assert shown["sft"] == []
    start, first, second = shown["ppo"]
    assert (start["label"], start["rows"], start["calls"]) == (
        "start",
        ["generator"],
        [[0, "start", 0.0, 3.0, 0, 0, 0, 0]],
    )
    assert (first["label"], first["seconds"], first["idle"]) == ("1", 10.0, 0.1)
    assert first["rows"] == ["generator", "policy 0", "policy 1"]
    assert first["calls"] == [
        [0, "generate", 0.0, 4.0, 40, 0, 0, 1],
        [1, "update", 4.0, 5.0, 100, 0, 0, 1],
        [2, "update", 4.0, 4.0, 100, 0, 0, 1],
    ]
    assert second["label"] == "2"


def test_long_lines_are_thinned_and_end_where_they_end():
    rows = [{"stage": "sft", "iteration": i, "policy/loss": float(i) or None} for i in range(10_001)]
    (loss,) = learning_charts([(0, StageHistory("sft", "sft", rows, None, None, {}))])
    (series,) = loss["series"]
    assert MOST_POINTS / 2 < len(series["x"]) <= MOST_POINTS
    assert (series["x"][-1], series["y"][-1]) == (10_000, 10_000.0)


def exit_code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code


def test_the_command_writes_the_page_into_the_first_run(tmp_path, capsys):
    run_dir = write_run(tmp_path / "small")
    assert exit_code("report", str(run_dir)) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    assert (run_dir / "report.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing is no folder"),
        (["small", "missing"], "missing is no folder"),
        (["small", "--output", "page.txt"], "wanted a file that ends in .html"),
        (["small", "--output", "nowhere/page.html"], "in a folder that does not exist"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, monkeypatch, capsys, arguments, message):
    write_run(tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    assert exit_code("report", *arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
