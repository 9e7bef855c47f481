"""DPO on the real stack: what the reference said is the same from the cache, and a resumed run is the whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from rlhf_ray.config import schema
from rlhf_ray.distributed.faults import VARIABLE
from rlhf_ray.distributed.placement import Cluster
from tests.integration.tiny_runs import REWARDS, comparable, merged, run, weights_digest
from tests.tiny_models import TEXTS, make_llama


def tiny_dpo(folder: Path, *, run: str = "run", **changes: Any) -> schema.Pipeline:
    """Two passes over 162 pairs that prefer `loved` to `hated`; every third pair is held out."""
    model = make_llama(folder / "llama")
    (folder / "tiny_rewards.py").write_text(REWARDS)
    rows = []
    for text in TEXTS:
        prompt, _, answer = text.partition(" I ")
        if answer.startswith("loved"):
            rows.append({"prompt": prompt, "chosen": f" I {answer}", "rejected": f" I {answer}".replace("lov", "hat")})
    for name, part in (("pairs", [row for i, row in enumerate(rows) if i % 3]), ("held_out", rows[::3])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    stage: dict[str, Any] = {
        "method": "dpo",
        "policy": {"model": model, "optimizer": {"learning_rate": 1e-3}},
        "data": {"train": str(folder / "pairs.jsonl"), "evaluation": str(folder / "held_out.jsonl")},
        "epochs": 2,
        "batch_size": 33,
        "cache_dir": str(folder / "cache"),
        "evaluation": {"every": 3},
        "checkpoints": {"every": 0},
    }
    return schema.Pipeline.model_validate(
        {
            "run_dir": str(folder / run),
            "seed": 3,
            "placement": {"call_timeout_s": 120, "start_timeout_s": 240},
            "stages": [merged(stage, changes)],
        }
    )


def asked(rows: list[dict[str, Any]]) -> int:
    """In how many rows the reference has worked."""
    return sum(any(name.startswith(("reference/", "time/reference")) for name in row) for row in rows)


def test_from_the_cache_is_the_same_bit_for_bit(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    uncached = run(tiny_dpo(tmp_path, run="uncached", cache=False, cache_dir=None), tmp_path)
    assert [row["iteration"] for row in uncached] == list(range(len(uncached)))
    assert not (tmp_path / "cache").exists()
    assert asked(uncached) > 4

    # Stopped in its second pass: what it has asked is kept.
    first = tiny_dpo(tmp_path, run="first", checkpoints={"every": 3})
    monkeypatch.setenv(VARIABLE, "committed:driver:0:5:raise")
    with pytest.raises(RuntimeError, match="injected fault"):
        run(first, tmp_path)
    monkeypatch.delenv(VARIABLE)
    resumed = run(first, tmp_path, resume=True)
    again = run(tiny_dpo(tmp_path, run="again"), tmp_path)
    assert asked(again) == 0
    for name, rows in (("first", resumed), ("again", again)):
        assert comparable(rows) == comparable(uncached)
        assert weights_digest(tmp_path / name, "dpo") == weights_digest(tmp_path / "uncached", "dpo")
    # Policy and reference differ by rounding only, which decides one way or the other.
    assert again[0]["evaluation/accuracy"] == pytest.approx(0.5, abs=0.2)
    assert again[0]["evaluation/loss"] == pytest.approx(0.6931, abs=1e-4)
    assert again[-1]["evaluation/accuracy"] > 0.9
    assert again[-1]["evaluation/margin"] > 0.1


def test_an_adapter_switched_off_is_the_reference(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a reference of its own, bit for bit, and so is a run that was stopped and resumed."""
    lora: Any = {"policy": {"lora": {"rank": 4, "alpha": 16}, "workers": 2, "zero": 2}, "evaluation": {"every": 4}}
    separate = run(
        tiny_dpo(tmp_path, run="separate", cache=False, cache_dir=None, reference={"adapter_off": False}, **lora),
        tmp_path,
    )
    assert separate[1]["reference/peak_memory_gib"] > 0.1
    assert asked(separate) > 4

    config = tiny_dpo(tmp_path, checkpoints={"every": 3}, **lora)
    monkeypatch.setenv(VARIABLE, "committed:driver:0:5:raise")
    with pytest.raises(RuntimeError, match="injected fault"):
        run(config, tmp_path)
    monkeypatch.delenv(VARIABLE)
    rows = run(config, tmp_path, resume=True)
    assert asked(rows) == 0
    assert rows[1]["policy/peak_memory_gib"] > 0.1
    assert comparable(rows) == comparable(separate)
    assert weights_digest(tmp_path / "run", "dpo") == weights_digest(tmp_path / "separate", "dpo")
    assert rows[0]["evaluation/loss"] == pytest.approx(0.6931, abs=1e-4)
    assert rows[-1]["evaluation/accuracy"] > 0.9


def test_scored_pairs_and_samples_under_way(tmp_path: Path, cluster: Cluster) -> None:
    """The reward turns the preference around: the policy learns the data's rejected answers."""
    (tmp_path / "hates.py").write_text(
        "def hates(prompts, responses, answers):\n    return [response.count('hated') for response in responses]\n"
    )
    config = tiny_dpo(
        tmp_path,
        reward=[{"kind": "function", "function": "hates:hates"}],
        pairs={"relabel": True, "min_margin": 0.5},
        generator={"engine": "hf"},
        epochs=1,
        evaluation={"every": 0, "prompts": 7, "temperature": 1.0, "max_new_tokens": 12},
    )
    rows = run(config, tmp_path)
    pairs = pandas.read_parquet(tmp_path / "run/dpo/pairs.parquet")
    assert len(pairs) == 162
    assert pairs["exchanged"].all()
    assert pairs["kept"].all()
    assert pairs["rejected"].str.contains(" I hated it, and the").all()
    assert set(zip(pairs["chosen_score"], pairs["rejected_score"], strict=True)) == {(0.0, 1.0)}
    assert (rows[0]["data/pairs_exchanged"], rows[0]["data/pairs_dropped"]) == (162, 0)
    # The held-out pairs are left as they are, so what was learnt is their opposite.
    assert rows[-1]["evaluation/accuracy"] < 0.1
    for row in (rows[0], rows[-1]):
        assert row["sync/bytes"] > 0
        assert row["sync/probe_diff_mean"] < 1e-4
        assert {"evaluation/reward_mean", "evaluation/length_mean", "evaluation/distinct_bigram_share"} <= set(row)
    assert abs(rows[0]["evaluation/kl_k1"]) < 1e-3
    assert rows[0]["evaluation/kl_k3"] < 1e-6
    assert rows[-1]["evaluation/kl_k3"] > 0.01
    samples = pandas.read_parquet(tmp_path / "run/dpo/evaluation/iteration_000005.parquet")
    assert len(samples) == len(set(samples["prompt"])) == 7
    assert set(samples["policy_version"]) == {5}
    assert samples["kl"].mean() == pytest.approx(rows[-1]["evaluation/kl_k1"], rel=1e-4)
