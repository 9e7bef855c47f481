"""What is right beside each rule, warnings, and the lookup of reward functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.effects import without_effect
from rlhf_ray.config.paths import find_module
from rlhf_ray.config.problems import is_set
from rlhf_ray.config.rules import check_rules, warnings
from rlhf_ray.config.schema import Pipeline, Ppo


def pipeline(**settings: Any) -> Pipeline:
    stage: dict[str, Any] = {
        "method": "ppo",
        "iterations": 10,
        "policy": {"model": "org/model"},
        "reward": [{"kind": "classifier", "model": "org/judge", "label": "POSITIVE"}],
        "data": {"train": "synthetic:reviews"},
    }
    return Pipeline.model_validate({"run_dir": "runs/test", "stages": [stage | settings]})


def problems(folder: Path, **settings: Any) -> list[str]:
    found = check_rules(pipeline(**settings), pipeline_dir=folder)
    return [".".join(map(str, problem.path[2:])) for problem in found]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"advantages": {"estimator": "leave_one_out"}, "sampling": {"samples_per_prompt": 2}},
        {"advantages": {"estimator": "group_relative", "divide_by_std": False}, "sampling": {"samples_per_prompt": 4}},
        {"kl": {"place": "loss", "estimator": "k3"}},
        {"kl": {"place": "off"}},
        {"kl": {"coefficient": 0}},
        {"kl": {"controller": "adaptive", "target": 6, "horizon": 100}},
        {"kl": {"target": None}},
        {"critic": {"kind": "value_head"}, "value_loss": {"coefficient": 0.5}},
        {"critic": {"model": "org/critic", "revision": "main", "warmup_iterations": 3}},
        {"correction": {"cap": 3}, "generator": {"dtype": "bfloat16"}},
        {"correction": {"mode": "on", "cap": 3}},
        {"old_logprobs": "generator"},
        {"prompts_per_iteration": 4, "mini_batches": 4, "epochs": 2},
        {"data": {"train": "synthetic:reviews", "prompt_length": {"min": 2, "max": 512}}},
        {"data": {"train": ["org/a", {"path": "org/b", "weight": 2, "subset": "x", "split": "y", "revision": "z"}]}},
        {"generator": {"tensor_parallel": 2, "gpus": 2}},
        {"generator": {"tensor_parallel": 2}},
        {"generator": {"gpus": 0.5, "memory_share": 0.4}},
        {"policy": {"model": "org/model", "zero": 3, "cpu_offload": True, "revision": "main"}},
        {"generator": {"sleep": True, "memory_share": 0.6}, "policy": {"model": "m", "offload": True}},
        {"generator": {"sleep": True, "engine": "hf", "gpus": 0}, "critic": {"offload": True}},
        {"policy": {"model": "m", "optimizer": {"schedule": "cosine", "final_ratio": 0.1}}},
        {"policy": {"model": "m", "lora": {"rank": 8, "result": "adapter"}}, "critic": {"lora": {"rank": 4}}},
        {"policy": {"model": "m", "lora": {}}, "reference": {"adapter_off": False, "workers": 2}},
    ],
)
def test_what_is_right(settings: dict[str, Any], tmp_path: Path) -> None:
    assert problems(tmp_path, **settings) == []


@pytest.mark.parametrize(
    ("settings", "paths"),
    [
        (
            {
                "advantages": {"estimator": "reinforce_baseline"},
                "kl": {"estimator": "k1"},
                "sampling": {"samples_per_prompt": 2},
            },
            ["kl.estimator"],
        ),
        ({"correction": {"cap": 3}}, ["correction.cap"]),
        ({"old_logprobs": "generator", "correction": {"mode": "on"}}, ["correction"]),
        (
            {"critic": {"kind": "value_head", "optimizer": {"learning_rate": 1}, "model": "x"}},
            ["critic.model", "critic.optimizer"],
        ),
        ({"kl": {"place": "off", "coefficient": 0.1, "horizon": 5}}, ["kl.coefficient", "kl.horizon"]),
        ({"reference": {"revision": "main"}}, ["reference.revision"]),
        ({"critic": {"revision": "main"}}, ["critic.revision"]),
        (
            {"generator": {"engine": "hf", "memory_share": 0.5, "compile": False}},
            ["generator.memory_share", "generator.compile"],
        ),
        ({"generator": {"engine": "hf", "tensor_parallel": 2}}, ["generator.tensor_parallel"]),
        (
            {"generator": {"sleep": True}, "critic": {"offload": True}, "staleness": 1, "interrupted": "keep"},
            ["generator.sleep", "critic.offload"],
        ),
        ({"critic": {"kind": "value_head", "offload": True}}, ["critic.offload"]),
        ({"generator": {"gpus": 2}}, ["generator.gpus"]),
        ({"policy": {"model": "m", "gpus": 2}}, ["policy.gpus"]),
        ({"sampling": {"stop": ["a", ""]}}, ["sampling.stop.1"]),
        (
            {
                "evaluation": {"max_new_tokens": 4},
                "sampling": {"min_new_tokens": 5},
                "data": {"train": "synthetic:reviews", "evaluation": "org/held_out"},
            },
            ["evaluation.max_new_tokens"],
        ),
        ({"data": {"train": "synthetic:reviews", "prompt_length": {"min": 2, "max": 513}}}, ["data.prompt_length.max"]),
        (
            {"data": {"train": "synthetic:reviews", "prompt_length": {"min": 2, "max": 8}, "chat_template": True}},
            ["data.prompt_length"],
        ),
    ],
)
def test_what_is_wrong(settings: dict[str, Any], paths: list[str], tmp_path: Path) -> None:
    assert problems(tmp_path, **settings) == paths


COLLECT = {
    "name": "c",
    "method": "collect",
    "policy": {"model": "org/model"},
    "reward": [{"kind": "classifier", "model": "org/judge", "label": "POSITIVE"}],
    "data": {"train": "synthetic:reviews"},
}
"""A collect stage, with the defaults."""


def problems_after(folder: Path, collect: dict[str, Any], *stages: dict[str, Any]) -> list[str]:
    """The problems of a collect stage with these settings and of what follows it, with the stage's number."""
    values = {"run_dir": "runs/test", "stages": [COLLECT | collect, *stages]}
    found = check_rules(Pipeline.model_validate(values), pipeline_dir=folder)
    return [".".join(map(str, problem.path[1:])) for problem in found]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sampling": {"max_new_tokens": 16}, "checkpoints": {"keep": 1}},
        {"keep": "threshold", "min_margin": 0, "max_pairs": 1},
        {"keep": "best_worst", "min_margin": 0.5},
        {"keep": "resample", "beta": 0.1, "draws": 3},
        {"prompts": 10, "data": {"train": ["org/a", {"path": "org/b", "weight": 2}], "shuffle": False}},
        {"policy": {"model": "org/model", "revision": "main", "tokenizer": "org/other"}},
    ],
)
def test_what_is_right_in_collect(settings: dict[str, Any], tmp_path: Path) -> None:
    assert problems_after(tmp_path, settings) == []


@pytest.mark.parametrize(
    ("settings", "paths"),
    [
        ({"keep": "best_of_n", "draws": 2}, ["0.draws"]),
        ({"keep": "resample", "max_pairs": 2}, ["0.max_pairs"]),
        ({"data": {"train": ["org/a", {"path": "org/b", "weight": 2}]}}, ["0.data.train.1.weight"]),
        ({"data": {"train": {"path": "org/a", "weight": 2}}}, ["0.data.train.0.weight"]),
        ({"policy": {"model": "./tests", "revision": "main"}}, ["0.policy.model", "0.policy.revision"]),
        ({"sampling": {"stop": [""]}}, ["0.sampling.stop.0"]),
    ],
)
def test_what_is_wrong_in_collect(settings: dict[str, Any], paths: list[str], tmp_path: Path) -> None:
    assert problems_after(tmp_path, settings) == paths


def test_who_may_read_the_data_of_a_collect_stage(tmp_path: Path) -> None:
    def reader(method: str, **data: Any) -> dict[str, Any]:
        return {"method": method, "policy": {"model": "org/model"}, "data": {"train": "stage:c"} | data}

    texts = {"keep": "best_of_n"}
    for method in ("reward_model", "dpo"):
        assert problems_after(tmp_path, {}, reader(method)) == []
        assert problems_after(tmp_path, texts, reader(method)) == ["1.data.train.0.path"]
    assert problems_after(tmp_path, texts, reader("sft")) == []
    assert problems_after(tmp_path, {}, reader("sft")) == ["1.data.train.0.path"]
    rows = [{"path": "stage:c", "rows": 5, "weight": 2}, "synthetic:preferences"]
    assert problems_after(tmp_path, {}, reader("reward_model", train=rows, columns={"margin": "margin"})) == []
    columns = {"prompt": "question", "margin": "gap"}
    assert problems_after(tmp_path, {}, reader("reward_model", columns=columns)) == [
        "1.data.columns.prompt",
        "1.data.columns.margin",
    ]
    assert problems_after(tmp_path, {}, reader("dpo", evaluation="stage:x")) == ["1.data.evaluation.0.path"]
    ppo = {**COLLECT, "name": "p", "method": "ppo", "iterations": 1, "data": {"train": "stage:c"}}
    assert problems_after(tmp_path, {}, ppo) == ["1.data.train.0.path"]


def test_a_setting_counts_as_set_only_where_it_is_given() -> None:
    given = pipeline(kl={"target": None, "horizon": 3.0})
    prefix = ("stages", 0, "kl")
    assert is_set(given, (*prefix, "horizon"))
    assert not is_set(given, (*prefix, "target"))
    assert not is_set(given, (*prefix, "coefficient"))
    assert not is_set(given, ("stages", 0, "reference", "workers"))


def test_settings_without_effect_are_known_whether_given_or_not() -> None:
    silent = {problem.path[2:] for problem in without_effect(pipeline())}
    assert ("kl", "target") in silent
    assert ("kl", "coefficient") not in silent
    assert ("value_loss", "coefficient") in silent
    assert ("value_loss", "clip") not in silent


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampling": {"top_p": 0.9, "min_new_tokens": 3}}, "with top_p, min_new_tokens the generator's"),
        ({"generator": {"dtype": "bfloat16"}, "correction": {"mode": "off"}}, "correction.mode: off"),
        ({"generator": {"workers": 9}, "prompts_per_iteration": 8}, "9 engines for 8 prompts"),
        ({}, "no data.evaluation"),
    ],
)
def test_warnings(settings: dict[str, Any], words: str) -> None:
    assert any(words in line for line in warnings(pipeline(**settings)))


def test_nothing_to_warn_of() -> None:
    assert warnings(pipeline(data={"train": "synthetic:reviews", "evaluation": "org/held_out"})) == []


def test_a_hub_name_that_may_be_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = {"policy": {"model": "models/mine"}}
    assert problems(tmp_path, **settings) == []
    assert "write ./models/mine for the folder" in "\n".join(warnings(pipeline(**settings)))


def test_a_model_directory_and_a_missing_neighbour(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    assert problems(tmp_path, policy={"model": str(tmp_path / "policy")}) == []
    wrong = pipeline(policy={"model": str(tmp_path / "policyy")})
    (problem,) = check_rules(wrong, pipeline_dir=tmp_path)
    assert f"did you mean `{tmp_path / 'policy'}`?" in problem.text


def reward(function: str) -> dict[str, Any]:
    return {"reward": [{"kind": "function", "function": function}]}


@pytest.mark.parametrize(
    ("source", "right"),
    [
        ("def score(): pass", True),
        ("async def score(): pass", True),
        ("from json import dumps as score", True),
        ("from json import *", True),
        ("if True:\n    score = len", True),
        ("class score: pass", True),
        ("def __getattr__(name): return len", True),
        ("def scores(): pass", False),
        ("'score'", False),
        ("def score(:", False),
    ],
)
def test_reward_functions_are_looked_up_without_an_import(source: str, right: bool, tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(source + "\nraise SystemExit('imported')" * right)
    assert problems(tmp_path, **reward("my_rewards:score")) == ([] if right else ["reward.0.function"])


def test_where_a_module_is_found(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").touch()
    (tmp_path / "pack" / "part.py").touch()
    assert find_module("pack.part", tmp_path) == tmp_path / "pack" / "part.py"
    assert find_module("pack.other", tmp_path) is None
    assert find_module("json", tmp_path) is not None
    assert find_module("sys", tmp_path) is not None
    assert find_module("no_such_module_here", tmp_path) is None


def test_the_context_of_a_fresh_model_holds_for_the_stages_after_it(tmp_path: Path) -> None:
    sft = {
        "method": "sft",
        "policy": {"model": {"max_length": 100}},
        "data": {"train": "synthetic:reviews", "max_length": 100},
    }
    first = pipeline(data={"train": "synthetic:reviews", "max_prompt_tokens": 40}).stages[0]
    assert isinstance(first, Ppo)

    def found(max_new_tokens: int) -> list[tuple[str | int, ...]]:
        stage = first.model_dump(exclude_unset=True) | {"sampling": {"max_new_tokens": max_new_tokens}}
        one = stage | {"policy": {"model": "stage:sft"}, "name": "one"}
        two = stage | {"policy": {"model": "stage:one"}, "name": "two"}
        whole = Pipeline.model_validate({"run_dir": "runs/test", "stages": [sft, one, two]})
        return [problem.path for problem in check_rules(whole, pipeline_dir=tmp_path)]

    assert found(60) == []
    assert found(61) == [("stages", index, "sampling", "max_new_tokens") for index in (1, 2)]


def four_bits(**settings: Any) -> Pipeline:
    policy = {"model": "org/model"} | settings
    stage = {"method": "sft", "policy": policy, "data": {"train": "synthetic:reviews"}}
    return Pipeline.model_validate({"run_dir": "runs/test", "stages": [stage]})


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"lora": {"quantise": "nf4", "result": "adapter"}, "zero": 2}, []),
        ({"lora": {"quantise": "nf4"}}, ["policy.lora.result: got merged, wanted adapter"]),
        (
            {"lora": {"quantise": "nf4", "result": "adapter"}, "zero": 3},
            ["policy.lora.quantise: got nf4, wanted none, "],
        ),
        ({"lora": {"quantise": "nf4", "result": "adapter"}, "gpus": 0}, ["policy.lora.quantise: got nf4, which needs"]),
    ],
)
def test_four_bits(
    settings: dict[str, Any], wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    found = check_rules(four_bits(**settings), pipeline_dir=tmp_path)
    texts = [f"{'.'.join(map(str, problem.path[2:]))}: {problem.text}" for problem in found]
    assert len(texts) == len(wanted)
    assert all(text.startswith(start) for text, start in zip(texts, wanted, strict=True))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = check_rules(four_bits(**settings), pipeline_dir=tmp_path)[0]
    assert missing.path[2:] == ("policy", "lora", "quantise")
    assert "bitsandbytes package is not installed" in missing.text


def test_four_bits_beside_a_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    policy = {"model": "org/model", "lora": {"quantise": "nf4", "result": "adapter"}}
    assert problems(tmp_path, policy=policy) == ["policy.lora.quantise"]
