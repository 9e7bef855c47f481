"""The pipeline files that name models of the hub, run with small local stand-ins of the same types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas
import pytest

from benchmarks.hh import overrides
from benchmarks.online_dpo import judge
from rlhf_ray.config.load import load_pipeline
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.pipeline import run_pipeline
from rlhf_ray.trainers.metric_rows import read_metrics
from tests.tiny_models import TEXTS, make_classifier, make_gpt2, make_llama

PIPELINES = Path(__file__).parents[2] / "pipelines"
SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def run_shipped(name: str, overrides: list[str]) -> list[dict[str, Any]]:
    config = load_pipeline(PIPELINES / name, overrides)
    run_pipeline(config, pipeline_dir=PIPELINES, resume=False)
    return read_metrics(Path(config.run_dir))


def shared(path: str) -> Path:
    if not (SHARED / path).exists():
        pytest.skip(f"needs the shared data set {path}, which is not beside this checkout")
    return SHARED / path


def test_ppo_imdb(tmp_path: Path, cluster: Cluster) -> None:
    reviews = tmp_path / "imdb.parquet"
    labels = [i % 2 for i in range(len(TEXTS))]
    pandas.DataFrame({"text": TEXTS, "label": labels}).to_parquet(reviews)
    rows = run_shipped(
        "ppo_imdb.yaml",
        [
            f"run_dir={tmp_path / 'run'}",
            "iterations=2",
            "prompts_per_iteration=8",
            "epochs=2",
            f"policy.model={make_gpt2(tmp_path / 'gpt2')}",
            f"reward.0.model={make_classifier(tmp_path / 'classifier')}",
            f"data.train={{path: {reviews}}}",
            f"data.evaluation={{path: {reviews}, rows: 6}}",
        ],
    )
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert all(row["sync/probe_diff_mean"] < 1e-4 for row in rows[1:])
    journal = pandas.read_parquet(tmp_path / "run/ppo/rollouts/iteration_000001.parquet")
    assert (journal["tokens"].map(len) - journal["length"]).between(2, 8).all()
    assert journal["length"].between(4, 16).all()


def test_grpo_gsm8k(tmp_path: Path, cluster: Cluster) -> None:
    questions = shared("math/gsm8k.test.jsonl.gz")
    rows = run_shipped(
        "grpo_gsm8k.yaml",
        [
            f"run_dir={tmp_path / 'run'}",
            "iterations=1",
            "prompts_per_iteration=2",
            f"policy={{model: {make_llama(tmp_path / 'llama')}, workers: 2, zero: 2}}",
            "reference={}",
            "generator={}",
            f"data.train={{path: {questions}, rows: 60}}",
            f"data.evaluation={{path: {questions}, rows: 60}}",
            "data.chat_template=false",
            "data.max_prompt_tokens=200",
            "sampling={max_new_tokens: 8, samples_per_prompt: 4}",
        ],
    )
    assert rows[-1]["reward/mean"] >= 0
    journal = pandas.read_parquet(tmp_path / "run/ppo/rollouts/iteration_000001.parquet")
    assert len(journal) == 8
    assert "####" in journal["answer"][0]


def test_ppo_stories(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    shared("models/stories260k-llama-hd32/config.json")
    monkeypatch.chdir(PIPELINES.parent)
    rows = run_shipped(
        "ppo_stories.yaml",
        [f"run_dir={tmp_path / 'run'}", "iterations=1", "prompts_per_iteration=8", "mini_batches=1"],
    )
    assert [row["iteration"] for row in rows] == [0, 1]
    assert rows[0]["evaluation/reward_mean"] == pytest.approx(0.12, abs=0.03)
    assert rows[1]["generator/logprob_diff_mean"] < 1e-4


def test_rlhf_hh(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    shared("preference/hh-helpful-base.train.jsonl.gz")
    monkeypatch.chdir(PIPELINES.parent)
    run = tmp_path / "run"
    rows = run_shipped(
        "rlhf_hh.yaml",
        [
            *overrides("rlhf_hh"),
            f"run_dir={run}",
            *few_steps("sft", "reward_model"),
            "ppo.data.evaluation.rows=8",
            "ppo.iterations=1",
            "ppo.prompts_per_iteration=8",
            "ppo.mini_batches=1",
            "ppo.sampling.max_new_tokens=16",
        ],
    )
    by_stage = {row["stage"]: row for row in rows}
    assert list(by_stage) == ["sft", "reward_model", "ppo"]
    assert 0 < by_stage["reward_model"]["evaluation/accuracy"] < 1
    assert by_stage["ppo"]["generator/logprob_diff_mean"] < 1e-4
    journal = pandas.read_parquet(run / "ppo/rollouts/iteration_000001.parquet")
    assert journal["prompt"].str.endswith("Assistant:").all()
    (scores,) = [journal[name] for name in journal.columns if name.startswith("score_")]
    assert scores.nunique() > 1


def test_dpo_hh(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    shared("preference/hh-helpful-base.train.jsonl.gz")
    monkeypatch.chdir(PIPELINES.parent)
    rows = run_shipped(
        "dpo_hh.yaml",
        [
            *overrides("dpo_hh"),
            f"run_dir={tmp_path / 'run'}",
            *few_steps("sft", "dpo"),
            "dpo.evaluation={every: 0, prompts: 4, temperature: 1.0, max_new_tokens: 16}",
            f"dpo.cache_dir={tmp_path / 'cache'}",
        ],
    )
    before, *_, after = [row for row in rows if row["stage"] == "dpo"]
    assert before["evaluation/kl_k1"] == pytest.approx(0, abs=1e-3)
    assert after["iteration"] == 2
    assert 0 < after["evaluation/accuracy"] < 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_dpo(tmp_path: Path, cluster: Cluster) -> None:
    """As a user runs it, held against what the file says to expect."""
    rows = run_shipped("quickstart_dpo.yaml", [f"run_dir={tmp_path / 'run'}", f"dpo.cache_dir={tmp_path / 'cache'}"])
    before, *_, after = [row for row in rows if row["stage"] == "dpo"]
    assert (before["iteration"], after["iteration"]) == (0, 140)
    assert after["evaluation/accuracy"] > 0.9
    assert before["evaluation/kl_k1"] == pytest.approx(0, abs=1e-3)
    assert 2 < after["evaluation/kl_k1"] < 4.5
    sampled = [
        pandas.read_parquet(tmp_path / f"run/dpo/evaluation/iteration_{row['iteration']:06}.parquet")
        for row in (before, after)
    ]
    assert [len(samples) for samples in sampled] == [200, 200]
    assert before["evaluation/reward_mean"] == pytest.approx(sampled[0]["score"].mean()) == pytest.approx(0, abs=0.15)
    assert after["evaluation/reward_mean"] == pytest.approx(sampled[1]["score"].mean())
    assert after["evaluation/reward_mean"] > 0.9
    assert len(set(sampled[1]["response"])) > 150


def few_steps(*stages: str) -> list[str]:
    """Overrides that leave two steps of eight rows to each stage, and 16 rows to its evaluation."""
    sizes = ("batch_size=8", "data.train.rows=16", "data.evaluation.rows=16")
    return [f"{stage}.{size}" for stage in stages for size in sizes]


@pytest.mark.slow
def test_ppo_lora(tmp_path: Path, cluster: Cluster) -> None:
    reviews = tmp_path / "imdb.parquet"
    pandas.DataFrame({"text": TEXTS, "label": [i % 2 for i in range(len(TEXTS))]}).to_parquet(reviews)
    learner = "lora: {rank: 2, alpha: 4}, optimizer: {learning_rate: 1e-3}"
    rows = run_shipped(
        "ppo_lora.yaml",
        [
            f"run_dir={tmp_path / 'run'}",
            "iterations=1",
            "prompts_per_iteration=8",
            f"policy={{model: {make_llama(tmp_path / 'llama')}, {learner}}}",
            f"critic={{{learner}}}",
            "generator={}",
            f"reward.0.model={make_classifier(tmp_path / 'classifier')}",
            f"data.train={{path: {reviews}}}",
            f"data.evaluation={{path: {reviews}, rows: 6}}",
        ],
    )
    assert [row["iteration"] for row in rows] == [0, 1]
    assert rows[1]["kl/per_sequence"] == pytest.approx(0, abs=1e-3)
    assert rows[1]["sync/probe_diff_mean"] < 1e-4


def test_online_dpo(tmp_path: Path, cluster: Cluster) -> None:
    """Each round samples the model of the round before, learns from just those pairs, and goes on from that model."""
    run = tmp_path / "run"
    rounds = [
        f"{name}_{number}.{change}"
        for number in (1, 2)
        for name, change in (
            ("collect", "data.train.rows=32"),
            ("dpo", "epochs=1"),
            ("dpo", "batch_size=8"),
            ("dpo", "evaluation.prompts=16"),
            ("dpo", "data.evaluation.rows=16"),
            ("dpo", f"cache_dir={tmp_path / 'cache'}"),
        )
    ]
    rows = run_shipped("online_dpo.yaml", [f"run_dir={run}", "sft.steps=40", "sft.data.evaluation.rows=20", *rounds])
    stages = ["sft", "collect_1", "dpo_1", "collect_2", "dpo_2"]
    assert list(dict.fromkeys(row["stage"] for row in rows)) == stages
    first, second = (pandas.read_parquet(run / f"collect_{number}/data") for number in (1, 2))
    steps = {stage: [row["iteration"] for row in rows if row["stage"] == stage] for stage in stages}
    for pairs, name, sampled in ((first, "dpo_1", ("stage:sft", 40)), (second, "dpo_2", ("stage:dpo_1", 4))):
        assert 24 < len(pairs) <= 32
        assert (pairs["chosen_score"] > pairs["rejected_score"]).all()
        assert set(zip(pairs["policy"], pairs["policy_version"], strict=True)) == {sampled}
        assert steps[name] == [0, 1, 2, 3, 4]
    # The same prompts with other seeds: four small steps alone would leave most responses as they were.
    both = first.merge(second, on="prompt_id")
    for side in ("chosen", "rejected"):
        assert not set(first[f"{side}_seed"]) & set(second[f"{side}_seed"])
        assert (both[f"{side}_x"] == both[f"{side}_y"]).mean() < 0.1
    # Where the first round ended the second starts: the same seeds give the same samples.
    ended, started = (
        pandas.read_parquet(run / f"{stage}/evaluation/iteration_{step:06}.parquet")
        for stage, step in (("dpo_1", 4), ("dpo_2", 0))
    )
    before = pandas.read_parquet(run / "dpo_1/evaluation/iteration_000000.parquet")
    assert started["response"].tolist() == ended["response"].tolist() != before["response"].tolist()
    figures = judge(run)
    assert figures["prompts"] == 16
    assert figures["reward_before"] == pytest.approx(0, abs=0.5)
