"""A reward model on the real stack: trained on preferences, then the reward of PPO, then read by plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.cli import main
from rlhf_ray.config import schema
from rlhf_ray.data.batches import Sequences
from rlhf_ray.data.preferences import load_preferences
from rlhf_ray.distributed.faults import VARIABLE
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.models.loading import load_tokenizer
from tests.integration.tiny_runs import comparable, merged, run, tiny_ppo, weights_digest
from tests.tiny_models import TEXTS, make_gpt2, make_llama


def reward_stage(folder: Path, model: str, **changes: Any) -> dict[str, Any]:
    """A stage that learns to prefer texts with `loved` to the same with `hated`; every fifth pair is held out."""
    rows = []
    for text in TEXTS:
        prompt, _, answer = text.partition(" I ")
        if answer.startswith("loved"):
            rows.append({"prompt": prompt, "chosen": f" I {answer}", "rejected": f" I {answer}".replace("lov", "hat")})
    for name, part in (("pairs", [row for i, row in enumerate(rows) if i % 5]), ("held_out_pairs", rows[::5])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return merged(
        {
            "method": "reward_model",
            "policy": {"model": model, "optimizer": {"learning_rate": 3e-3}},
            "data": {"train": str(folder / "pairs.jsonl"), "evaluation": str(folder / "held_out_pairs.jsonl")},
            "steps": 20,
            "batch_size": 16,
            "evaluation": {"every": 0},
            "checkpoints": {"every": 0},
        },
        changes,
    )


def pipeline(base: schema.Pipeline, stage: dict[str, Any], *, with_ppo: bool) -> schema.Pipeline:
    """The stage, and PPO on its reward model."""
    ppo = base.stages[0].model_dump() | {"reward": [{"kind": "model", "model": "stage:reward_model"}]}
    return schema.Pipeline.model_validate(base.model_dump() | {"stages": [stage, ppo] if with_ppo else [stage]})


def test_a_reward_model_scores_ppo(tmp_path: Path, cluster: Cluster) -> None:
    stage = reward_stage(tmp_path, make_llama(tmp_path / "llama"))
    rows = run(pipeline(tiny_ppo(tmp_path, generator={"engine": "hf"}), stage, with_ppo=True), tmp_path)
    learnt = [row for row in rows if row["stage"] == "reward_model"]
    assert learnt[0]["evaluation/accuracy"] == 0.5
    assert learnt[0]["evaluation/loss"] == pytest.approx(0.6931, abs=1e-4)
    assert learnt[-1]["evaluation/accuracy"] > 0.9
    assert learnt[-1]["evaluation/loss"] < 0.3
    assert learnt[-1]["evaluation/margin"] > 1
    assert 0 <= learnt[-1]["evaluation/calibration_error"] < 0.3

    directory = tmp_path / "run/reward_model/model"
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.config.num_labels == 1
    assert model.config.score_std > 0.1
    journal = pandas.read_parquet(tmp_path / "run/ppo/rollouts/iteration_000002.parquet")
    batch = tokenizer.pad({"input_ids": [row.tolist() for row in journal["tokens"]]}, return_tensors="pt")
    with torch.no_grad():
        scores = model(**batch).logits[:, 0]
    torch.testing.assert_close(scores, torch.tensor(journal["score"].to_numpy()).float(), atol=1e-5, rtol=1e-5)
    assert len(set(scores.tolist())) > 1


def test_a_model_that_pads_with_its_end_of_text_and_the_report_on_any_pairs(tmp_path: Path, cluster: Cluster) -> None:
    stage = reward_stage(tmp_path, make_gpt2(tmp_path / "gpt2"), policy={"workers": 2, "zero": 3}, steps=15)
    rows = run(pipeline(tiny_ppo(tmp_path), stage, with_ppo=False), tmp_path)
    assert rows[-1]["evaluation/accuracy"] > 0.9

    # In one batch, with the tokenizer's own padding, by plain transformers.
    directory = tmp_path / "run/reward_model/model"
    pairs = load_preferences(
        schema.PreferenceData.model_validate(stage["data"]),
        load_tokenizer(str(directory)),
        seed=1,
        sources="evaluation",
    ).all()
    both = rows_of(pairs.chosen) + rows_of(pairs.rejected)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert {row[-1] for row in both} == {tokenizer.eos_token_id}
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    batch = tokenizer.pad({"input_ids": both}, return_tensors="pt")
    assert not batch["attention_mask"].all()
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    with torch.no_grad():
        chosen, rejected = model(**batch).logits[:, 0].chunk(2)
    assert float((chosen - rejected).mean()) == pytest.approx(rows[-1]["evaluation/margin"], abs=1e-5)

    # The same pairs through the scoring actors, named by the run's folder, from the command line.
    found = tmp_path / "report.json"
    arguments = [str(tmp_path / "run"), stage["data"]["evaluation"], "--json", str(found), "--workers", "2"]
    with pytest.raises(SystemExit) as done:
        main(["evaluate", *arguments])
    assert done.value.code == 0
    report = json.loads(found.read_text())
    expected = {name: value for name, value in rows[-1].items() if name.startswith("evaluation/")}
    assert {f"evaluation/{name}": value for name, value in report["metrics"].items()} == pytest.approx(
        expected, abs=1e-5
    )
    kept = json.loads((tmp_path / "run/reward_model/evaluation/preferences_000015.json").read_text())
    assert report["accuracy_interval"] == pytest.approx(kept["accuracy_interval"])
    assert [part["pairs"] for part in report["by_length"]] == [part["pairs"] for part in kept["by_length"]]
    events = EventAccumulator(str(tmp_path / "run/tensorboard/reward_model"), {"histograms": 0}).Reload()
    assert [event.step for event in events.Histograms("evaluation/margins")] == [0, 15]


def test_stop_and_resume_equals_an_undisturbed_run(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = {"optimizer": {"schedule": "cosine", "warmup_steps": 2}}
    stage = reward_stage(
        tmp_path,
        make_gpt2(tmp_path / "gpt2"),
        policy=policy,
        steps=6,
        dropout=True,
        evaluation={"every": 2},
        checkpoints={"every": 3},
    )
    whole, stopped = (pipeline(tiny_ppo(tmp_path, run=name), stage, with_ppo=False) for name in ("whole", "stopped"))
    rows = run(whole, tmp_path)
    monkeypatch.setenv(VARIABLE, "committed:driver:0:4:raise")
    with pytest.raises(RuntimeError, match="injected fault"):
        run(stopped, tmp_path)
    monkeypatch.delenv(VARIABLE)
    assert comparable(run(stopped, tmp_path, resume=True)) == comparable(rows)
    assert weights_digest(stopped.run_dir, "reward_model") == weights_digest(whole.run_dir, "reward_model")
    assert rows[6]["policy/loss"] < rows[1]["policy/loss"]


def rows_of(sequences: Sequences) -> list[list[int]]:
    return [row[:length] for row, length in zip(sequences.tokens.tolist(), sequences.lengths(), strict=True)]
