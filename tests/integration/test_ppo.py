"""PPO on the real stack: every estimator, critic and ZeRO stage runs to its end with attested weights."""

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.distributed.placement import Cluster
from tests.integration.tiny_runs import run, tiny_ppo
from tests.tiny_models import make_classifier, make_gpt2, make_reward_model

TWO = {"policy": {"workers": 2, "zero": 2}, "generator": {"workers": 2}}

PLANNED = ("generate", "_score", "_logprobs", "_values", "_update")

CASES: dict[str, dict[str, Any]] = {
    "gae, 2 learners of ZeRO-2, 2 generators": TWO | {"critic": {"workers": 2, "zero": 2}},
    "ZeRO-3, all roles in the policy's bundles": {
        "policy": {"workers": 2, "zero": 3},
        "critic": {"workers": 2, "zero": 3, "colocate_with": "policy"},
        "reference": {"workers": 2, "colocate_with": "policy"},
        "generator": {"colocate_with": "policy"},
    },
    "value head": {"critic": {"kind": "value_head"}, "advantages": {"bootstrap_truncated": True}},
    "bfloat16": {
        "policy": {"dtype": "bfloat16"},
        "critic": {"dtype": "bfloat16"},
        "reference": {"dtype": "bfloat16"},
        "generator": {"dtype": "bfloat16"},
    },
    "group_relative, KL as a loss": {
        "advantages": {"estimator": "group_relative"},
        "sampling": {"samples_per_prompt": 4},
        "kl": {"place": "loss", "estimator": "k3"},
        "policy_loss": {"aggregation": "sequence_mean", "dual_clip": 3.0},
    },
    "leave_one_out, no KL, one step ahead, unfinished responses kept": {
        "advantages": {"estimator": "leave_one_out"},
        "sampling": {"samples_per_prompt": 2},
        "kl": {"place": "off"},
        "staleness": 1,
        "interrupted": "keep",
    },
    "adapter, value head": {
        "policy": {"lora": {"rank": 2}, "optimizer": {"learning_rate": 1e-2}},
        "critic": {"kind": "value_head"},
        "advantages": {"bootstrap_truncated": True},
    },
    "adapter, hf engine, a reference of its own": {
        "policy": {"lora": {"rank": 2}, "optimizer": {"learning_rate": 1e-2}},
        "reference": {"adapter_off": False},
        "generator": {"engine": "hf"},
        "advantages": {"estimator": "leave_one_out"},
        "sampling": {"samples_per_prompt": 2},
    },
    "reinforce_baseline, generator's log-probabilities, one step ahead, unfinished responses abandoned": {
        "advantages": {"estimator": "reinforce_baseline"},
        "sampling": {"samples_per_prompt": 2},
        "old_logprobs": "generator",
        "staleness": 1,
        "interrupted": "abandon",
    },
}


SLOW = {"value head"}
PARAMETERS = [
    pytest.param(changes, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name, changes in CASES.items()
]


@pytest.mark.parametrize("changes", PARAMETERS)
def test_ppo_runs_to_its_end(changes: dict[str, Any], tmp_path: Path, cluster: Cluster) -> None:
    config = tiny_ppo(tmp_path, **changes)
    rows = run(config, tmp_path)
    stage = config.stages[0]
    samples = 8 * stage.sampling.samples_per_prompt

    assert [row["iteration"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        lag = min(stage.staleness, row["iteration"] - 1)
        assert row["generator/policy_version_lag"] == lag
        if lag == 0 and stage.old_logprobs == "learner":
            assert row["generator/attested_share"] == 1
            assert row["generator/logprob_diff_mean"] < (3e-2 if stage.generator.dtype == "bfloat16" else 1e-4)
        else:
            assert "generator/logprob_diff_mean" not in row
        if not stage.corrects_generator:
            assert row["correction/weight_mean"] == 1
        elif lag > 0 or stage.generator.dtype == "bfloat16":
            assert row["correction/weight_mean"] != 1
        assert 0.1 < row["policy/peak_memory_gib"] < 4
        assert row["policy/grad_norm"] > 0
        assert row["guard/skipped_steps"] == 0
    assert ("critic/loss" in rows[1]) == (stage.critic_role is not None)
    if stage.kl_place == "off":
        assert not any(name.startswith("kl/") for name in rows[1])
    else:
        assert rows[1]["kl/per_sequence"] == pytest.approx(0, abs=0.5 if stage.policy.dtype == "bfloat16" else 1e-3)
        assert rows[2]["kl/per_sequence"] != rows[1]["kl/per_sequence"]
    separate = stage.kl_place != "off" and not stage.adapter_is_off_in_reference
    assert ("reference/peak_memory_gib" in rows[1]) == separate
    if stage.policy.lora is not None:
        assert all(row["sync/share_of_model"] < 0.05 for row in rows[1:])
        assert separate or rows[1]["kl/k2"] == 0, "without its adapter the policy is the base, to the last bit"
    assert "evaluation/reward_mean" in rows[0]
    assert "evaluation/reward_mean" in rows[2]

    journal = pandas.read_parquet(tmp_path / "run/ppo/rollouts/iteration_000002.parquet")
    assert len(journal) == samples
    assert set(journal["policy_version"]) == {1 - stage.staleness}
    assert journal["score"].mean() == pytest.approx(rows[2]["reward/mean"], rel=1e-5)
    vowels = sum(c in "aeiou" for c in journal["response"][0].lower()) / max(1, len(journal["response"][0]))
    assert journal["score"][0] == pytest.approx(vowels, rel=1e-5)

    model = tmp_path / "run/ppo/model"
    trained = AutoModelForCausalLM.from_pretrained(model)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    weights = zip(trained.parameters(), before.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in weights)
    assert AutoTokenizer.from_pretrained(model)("film")["input_ids"]

    planned = json.loads((tmp_path / "run/plan.json").read_text())["stages"]["ppo"]
    tasks = {"sync/time_s" if task["name"] == "sync" else f"time/{task['name']}_s" for task in planned["tasks"]}
    named = {*rows[1], *rows[2]}
    phases = {name for name in named if name.startswith("time/") and name.removesuffix("_s").endswith(PLANNED)}
    assert tasks <= named
    # The probe of a sync asks for log-probabilities too.
    assert phases - tasks <= {"time/policy_logprobs_s"}
    assert set(planned["memory_gib"]) == {name[:-16] for name in rows[2] if name.endswith("/peak_memory_gib")}


def test_classic_shape_gpt2_classifier_and_reward_model(tmp_path: Path, cluster: Cluster) -> None:
    """A GPT-2 without a pad token, cut prompts, and two networks with other tokenizers as weighted rewards."""
    policy = make_gpt2(tmp_path / "gpt2")
    judge = make_reward_model(tmp_path / "judge")
    config = tiny_ppo(
        tmp_path,
        policy={"model": policy},
        reward=[
            {
                "kind": "classifier",
                "model": make_classifier(tmp_path / "classifier"),
                "label": "POSITIVE",
                "weight": 2.0,
            },
            {"kind": "model", "model": judge, "weight": 0.5},
        ],
        data={"prompt_length": {"min": 2, "max": 5}},
    )
    rows = run(config, tmp_path)
    for row in rows[1:]:
        expected = 2.0 * row["reward/classifier_mean"] + 0.5 * row["reward/model_mean"]
        assert row["reward/mean"] == pytest.approx(expected, rel=1e-4)
        assert row["generator/logprob_diff_mean"] < 1e-4
    journal = pandas.read_parquet(tmp_path / "run/ppo/rollouts/iteration_000001.parquet")
    lengths = journal["tokens"].map(len) - journal["length"]
    assert lengths.between(2, 5).all()
    assert lengths.nunique() > 1
