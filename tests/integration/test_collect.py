"""Collecting on the real stack: texts for fine-tuning, pairs for a reward model, and a kill in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet as pq
import pytest

from rlhf_ray.config import schema
from rlhf_ray.config.load import dump_pipeline
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.distributed.faults import VARIABLE
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.trainers.metric_rows import read_metrics
from tests.integration.tiny_runs import comparable, run, tiny_ppo

ROOT = Path(__file__).parents[2]


def stages(base: schema.Pipeline, *, engines: int) -> list[dict[str, Any]]:
    """Texts for sft, and pairs of what that makes for a reward model."""
    ppo = base.stages[0].model_dump()
    model, prompts = ppo["policy"]["model"], ppo["data"]["train"][0]["path"]
    learner = {"optimizer": {"learning_rate": 1e-3}}
    sampled = {
        "method": "collect",
        "reward": ppo["reward"],
        "data": {"train": prompts},
        "sampling": {"max_new_tokens": 12},
        "unfinished": "keep",
    }
    texts = {"name": "texts", "policy": {"model": model}, "keep": "best_of_n", "prompts_per_batch": 20}
    pairs = {"name": "pairs", "policy": {"model": "stage:sft"}, "keep": "threshold", "min_margin": 0.1, "prompts": 24}
    return [
        sampled | texts | {"generator": {"workers": engines}},
        {"method": "sft", "policy": {"model": model, **learner}, "data": {"train": "stage:texts"}, "steps": 3},
        sampled | pairs,
        {
            "method": "reward_model",
            "policy": {"model": "stage:sft", **learner},
            "data": {"train": {"path": "stage:pairs", "rows": 30}, "columns": {"margin": "margin"}},
            "steps": 2,
        },
    ]


def pipeline(folder: Path, *, name: str, count: int, engines: int) -> schema.Pipeline:
    """The first so many of the stages, the texts sampled by so many engines."""
    base = tiny_ppo(folder, run=name)
    return schema.Pipeline.model_validate(base.model_dump() | {"stages": stages(base, engines=engines)[:count]})


def written(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    return [row for part in sorted((run_dir / stage / "data").iterdir()) for row in pq.read_table(part).to_pylist()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Path:
    """A folder with a run of all four stages."""
    folder = tmp_path_factory.mktemp("collect")
    run(pipeline(folder, name="whole", count=4, engines=2), folder)
    return folder


def test_the_best_of_n_trains_the_policy(whole: Path) -> None:
    rows = written(whole / "whole", "texts")
    metrics = read_metrics(whole / "whole", "texts")
    assert [row["collect/samples"] for row in metrics] == [80, 80, 56]
    assert sum(row["collect/kept"] for row in metrics) == len(rows) > 50
    journal = pandas.concat(map(pandas.read_parquet, sorted((whole / "whole/texts/rollouts").iterdir())))
    tokenizer = load_tokenizer(str(whole / "llama"))
    encoder = Encoder.of(tokenizer)
    changed = 0
    for row in rows:
        own = journal[journal["prompt_id"] == row["prompt_id"]]
        best = own[own["response"].str.strip() != ""].sort_values("score", ascending=False, kind="stable").iloc[0]
        assert row["score"] == pytest.approx(best["score"])
        assert row["prompt"] == best["prompt"]
        [(head, answer)] = encoder.answers([row["prompt"]], [row["response"]], [""])
        changed += [*head, *answer] != best["tokens"].tolist()
    assert sum(row["collect/changed"] for row in metrics) == changed
    learnt = read_metrics(whole / "whole", "sft")
    assert [row["iteration"] for row in learnt] == [1, 2, 3]
    assert (whole / "whole/sft/model/config.json").exists()


def test_pairs_of_a_trained_policy_train_a_reward_model(whole: Path) -> None:
    rows = written(whole / "whole", "pairs")
    assert {(row["policy"], row["policy_version"]) for row in rows} == {("stage:sft", 3)}
    assert len({row["prompt_id"] for row in rows}) > 12
    assert all(row["margin"] >= 0.1 for row in rows)
    assert max(sum(row["prompt_id"] == other["prompt_id"] for other in rows) for row in rows) <= 4
    journal = pandas.concat(map(pandas.read_parquet, sorted((whole / "whole/pairs/rollouts").iterdir())))
    scores = {(row.prompt_id, row.response): row.score for row in journal.itertuples()}
    for row in rows:
        assert scores[row["prompt_id"], row["chosen"]] == pytest.approx(row["chosen_score"])
        assert scores[row["prompt_id"], row["rejected"]] == pytest.approx(row["rejected_score"])
    assert len(read_metrics(whole / "whole", "reward_model")) >= 2


def test_kill_9_then_resume_writes_the_same_rows_with_another_number_of_engines(whole: Path, cluster: Cluster) -> None:
    killed = pipeline(whole, name="killed", count=1, engines=1)
    file = whole / "killed.yaml"
    file.write_text(dump_pipeline(killed))
    command = [sys.executable, "-m", "rlhf_ray", "run", str(file)]
    environment = os.environ | {VARIABLE: "commit:driver:0:2:kill", "RAY_ADDRESS": cluster.address}
    process = subprocess.run(command, cwd=ROOT, env=environment, timeout=240, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert [row["iteration"] for row in read_metrics(whole / "killed")] == [1]
    run(killed, whole, resume=True)
    assert written(whole / "killed", "texts") == written(whole / "whole", "texts")
    rows = comparable(read_metrics(whole / "killed"))
    assert rows == comparable(read_metrics(whole / "whole", "texts"))
