"""The quickstart, run once as a user runs it but for fewer steps, and what it promises."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas
import psutil
import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.cli import main
from rlhf_ray.distributed.gauges import OWN, gauge_name
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.trainers.metric_rows import read_metrics
from rlhf_ray.trainers.metrics import distinct_bigram_share
from tests.browser import PROGRAMS, find_browser, show
from tests.cluster_files import own_metrics_named
from tests.test_readme import commands

ROOT = Path(__file__).parents[2]
LIMIT_S = 900
SHORTER = ("sft.steps=180", "reward_model.steps=60", "ppo.iterations=8")


@dataclass(frozen=True)
class Quickstart:
    """A finished run: its folder, what it printed, and its peak memory over all its processes, shared pages once."""

    folder: Path
    output: str
    peak_gib: float

    def evaluation(self, iteration: int) -> pandas.DataFrame:
        return pandas.read_parquet(self.folder / f"ppo/evaluation/iteration_{iteration:06}.parquet")

    def rollouts(self, iteration: int) -> pandas.DataFrame:
        return pandas.read_parquet(self.folder / f"ppo/rollouts/iteration_{iteration:06}.parquet")


def tree_memory_gib(root: psutil.Process) -> float:
    """Proportional memory of a process and its descendants."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / 2**30


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    command = [sys.executable, "-m", "rlhf_ray", "run", "pipelines/quickstart.yaml", f"run_dir={folder}", *SHORTER]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines: list[str] = []
        assert process.stdout is not None
        reader = threading.Thread(target=lambda out: lines.extend(out), args=(process.stdout,))
        reader.start()
        root, peak, deadline = psutil.Process(process.pid), 0.0, time.monotonic() + LIMIT_S
        while process.poll() is None:
            with suppress(psutil.Error):
                peak = max(peak, tree_memory_gib(root))
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(5)
        reader.join(timeout=10)
    output = "".join(lines)
    assert process.returncode == 0, output[-5000:]
    return Quickstart(folder, output, peak)


pytestmark = pytest.mark.timeout(LIMIT_S + 60)


def test_the_reward_model_tells_better_reviews(quickstart: Quickstart) -> None:
    rows = read_metrics(quickstart.folder, "reward_model")
    assert rows[0]["evaluation/accuracy"] == pytest.approx(0.5)
    assert rows[-1]["evaluation/accuracy"] > 0.9
    assert rows[-1]["evaluation/accuracy_chosen_shorter"] > 0.85


def test_the_true_sentiment_rises_with_the_learned_reward(quickstart: Quickstart) -> None:
    last = read_metrics(quickstart.folder, "ppo")[-1]["iteration"]
    before, after = quickstart.evaluation(0), quickstart.evaluation(last)
    assert len(before) == len(after) == 200
    assert after["score_learned"].mean() > before["score_learned"].mean() + 0.5
    assert (before["score_sentiment"] > 0).mean() == pytest.approx(0.5, abs=0.1)
    assert (after["score_sentiment"] > 0).mean() >= 0.7
    assert distinct_bigram_share(list(after["response"])) >= 0.5 * distinct_bigram_share(list(before["response"]))


def test_the_true_sentiment_is_reported_only(quickstart: Quickstart) -> None:
    rows = [row for row in read_metrics(quickstart.folder, "ppo") if row["iteration"] > 0]
    assert all(row["reward/mean"] == pytest.approx(row["reward/learned_mean"]) for row in rows)
    assert all(abs(row["reward/sentiment_mean"]) <= 1 for row in rows)
    assert "held-out sentiment mean" in quickstart.output
    samples = quickstart.evaluation(0)
    assert samples["score"].equals(samples["score_learned"])


def test_kl_is_visible_and_bounded(quickstart: Quickstart) -> None:
    rows = [row for row in read_metrics(quickstart.folder, "ppo") if row["iteration"] > 0]
    assert all(-1 < row["kl/per_sequence"] < 20 for row in rows)
    assert rows[-1]["kl/per_sequence"] > 0.5
    assert all(row["generator/logprob_diff_mean"] < 1e-4 for row in rows)
    assert "KL" in quickstart.output


def test_it_fits_into_six_gib(quickstart: Quickstart) -> None:
    assert 0.5 < quickstart.peak_gib <= 6


def test_alerts_and_dashboard_of_a_cluster_find_its_metrics(quickstart: Quickstart) -> None:
    rows = [row for stage in ("sft", "reward_model", "ppo") for row in read_metrics(quickstart.folder, stage)]
    published = {f"ray_{gauge_name(name)}" for row in rows for name in [*row, *OWN]}
    named, patterns = own_metrics_named()
    assert len(named) >= 15
    assert named - published == set()
    for pattern in patterns:
        assert len([name for name in published if re.fullmatch(pattern, name)]) >= 4, pattern


def test_the_result_is_a_hugging_face_directory(quickstart: Quickstart) -> None:
    model = quickstart.folder / "ppo/model"
    assert str(model) in quickstart.output.replace("\n", "")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = AutoModelForCausalLM.from_pretrained(model).generate(
        **tokenizer("The new film seemed", return_tensors="pt"), max_new_tokens=5
    )
    assert tokens.shape[1] > 5
    assert "library_name: transformers" in (model / "README.md").read_text()


def test_the_run_folder_has_what_the_readme_says(quickstart: Quickstart) -> None:
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
        "sft/model/config.json",
        "reward_model/model/config.json",
        "ppo/done.json",
    ):
        assert (quickstart.folder / name).exists(), name
    assert (
        len(list((quickstart.folder / "ppo/rollouts").glob("*.parquet")))
        == (read_metrics(quickstart.folder, "ppo")[-1]["iteration"])
    )


def run_from_readme(quickstart: Quickstart, command: str, *options: str) -> None:
    """The README's one line of this command, on this run in place of its own, with some options more."""
    (line,) = [line for line in commands() if line.startswith(f"rlhf-ray {command} ")]
    _, *arguments = shlex.split(line.replace("runs/quickstart", str(quickstart.folder)))
    with pytest.raises(SystemExit) as done:
        main([*arguments, *options])
    assert done.value.code == 0


def test_the_readme_generates_with_its_models(
    quickstart: Quickstart, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--samples", "1", "--max-new-tokens", "16", "--output", str(tmp_path / "found.parquet"))
    run_from_readme(quickstart, "generate", *options)
    found = pandas.read_parquet(tmp_path / "found.parquet")
    assert found["model"].tolist() == [str(quickstart.folder), str(quickstart.folder / "sft")]
    assert found["prompt"].tolist() == ["The new film was"] * 2
    assert found["response"].nunique() == 2
    assert found["score"].notna().all()
    assert "second less first" in capsys.readouterr().out


def test_the_readme_reports_on_it(quickstart: Quickstart, tmp_path: Path) -> None:
    run_from_readme(quickstart, "report", "--output", str(tmp_path / "report.html"))
    if find_browser() is None:
        pytest.skip(f"none of {', '.join(PROGRAMS)} is on the PATH")
    shown = show(tmp_path / "report.html", tmp_path / "report.png", width=1280, height=1338)
    assert shown.console == []
    text = shown.document.split('<script type="application/json"')[0]
    assert text.count('class="main-svg"') > 10
    for words in ("held-out reward", "KL to the reference", "send_weights", "reward/learned", "The new romance"):
        assert words in text, words
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.size == (1280, 1338)
        colors = {color for count, color in picture.convert("RGB").getcolors(1 << 20) or () if count > 500}
    # Ground, cards, text and the colours of the timeline's bars: generate, update, logprobs.
    assert {(246, 247, 249), (255, 255, 255), (91, 108, 240), (180, 85, 201), (22, 163, 127)} <= colors


def test_the_trace_says_who_did_what(quickstart: Quickstart) -> None:
    events = json.loads((quickstart.folder / "trace.json").read_text())
    roles = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    calls = [event for event in events if event["ph"] == "X" and event["cat"] == "ppo"]
    last = [event for event in calls if event["args"]["iteration"] == 8]
    did = {(roles[event["pid"]], event["name"]) for event in last}
    expected = {("generator", "next_finished"), ("policy", "update"), ("critic", "values"), ("driver", "evaluation")}
    assert expected | {("reference", "logprobs"), ("reward/learned", "score"), ("driver", "iteration")} <= did
    (sent,) = {event["args"]["bytes"] for event in last if event["name"] == "send_weights"}
    assert {event["args"]["bytes"] for event in last if event["name"] == "receive_weights"} == {sent}
    rows = {row["iteration"]: row for row in read_metrics(quickstart.folder, "ppo")}
    sampled = sum(event["args"]["tokens"] for event in last if event["name"] == "next_finished")
    assert sampled == pytest.approx(rows[8]["response/length_mean"] * len(quickstart.rollouts(8)))
    assert all(row["driver/cpu_share"] < 0.2 for iteration, row in rows.items() if iteration)
    assert all(0 <= row["time/idle_share"] < 0.5 for iteration, row in rows.items() if iteration)


def test_the_readme_evaluates_its_reward_model(quickstart: Quickstart, cluster: Cluster, tmp_path: Path) -> None:
    run_from_readme(quickstart, "evaluate", "--json", str(tmp_path / "found.json"))
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["pairs"] >= 100
    assert report["metrics"]["accuracy"] > 0.9
