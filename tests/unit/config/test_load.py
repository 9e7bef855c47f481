"""Reading pipeline files, overrides and their errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rlhf_ray.config.load import dump_pipeline, load_pipeline, read_origin, run_files
from rlhf_ray.config.schema import Kl, NewModel, Pipeline, Ppo, Sft
from rlhf_ray.errors import ConfigError

STAGES = """\
run_dir: runs/two
stages:
  - method: sft
    policy: {model: {family: gpt2}, optimizer: {learning_rate: 1e-3}}
    data: {train: "synthetic:reviews"}
  - name: main
    method: ppo
    iterations: 10
    policy: {model: "stage:sft"}
    reward:
      - {kind: function, function: "rewards:length", arguments: {word: off}}
      - {kind: classifier, model: org/judge, label: POSITIVE, weight: 0.5}
    data: {train: "synthetic:reviews", max_prompt_tokens: 32}
    kl: {controller: adaptive, target: 6}
"""
SINGLE = """\
run_dir: runs/one
method: ppo
iterations: 10
policy: {model: org/model}
reward: [{kind: function, function: "rewards:length"}]
data: {train: "synthetic:reviews"}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rewards.py").write_text("def length(prompts, responses, answers):\n    return []\n")
    (tmp_path / "two.yaml").write_text(STAGES)
    (tmp_path / "one.yaml").write_text(SINGLE)
    return tmp_path


def errors(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_pipeline(file, overrides)
    return [line.strip() for line in str(raised.value).splitlines()[1:]]


def ppo(pipeline: Pipeline) -> Ppo:
    stage = pipeline.stages[-1]
    assert isinstance(stage, Ppo)
    return stage


def test_stages_in_order_with_their_defaults(folder: Path) -> None:
    pipeline = load_pipeline(folder / "two.yaml")
    sft, main = pipeline.stages
    assert isinstance(sft, Sft)
    assert isinstance(main, Ppo)
    assert (sft.name, main.name) == ("sft", "main")
    assert sft.policy.model == NewModel(family="gpt2")
    assert sft.policy.optimizer.learning_rate == 0.001
    assert main.kl == Kl(controller="adaptive", target=6.0)
    assert pipeline.seed == 1


def test_one_method_at_the_top_is_one_stage(folder: Path) -> None:
    pipeline = load_pipeline(folder / "one.yaml", ["seed=3", "sampling.top_k=5"])
    assert len(pipeline.stages) == 1
    assert (pipeline.run_dir, pipeline.seed, ppo(pipeline).sampling.top_k) == ("runs/one", 3, 5)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("2.5E+3", 2500.0),
        (".5", 0.5),
        ("3", 3),
        ("-4", -4),
        ("true", True),
        ("True", True),
        ("off", "off"),
        ("yes", "yes"),
        ("2024-01-02", "2024-01-02"),
        ("1:30", "1:30"),
        ("null", None),
        ("", None),
        ("007", "007"),
        ("[1e-3, no]", [0.001, "no"]),
        ("'5'", "5"),
    ],
)
def test_words_of_yaml(folder: Path, text: str, value: object) -> None:
    pipeline = load_pipeline(folder / "two.yaml", [f"main.reward.0.arguments.word={text}"])
    reward = ppo(pipeline).reward[0]
    assert reward.kind == "function"
    assert reward.arguments == {"word": value}


def test_overrides_reach_stages_lists_and_sections_that_are_not_there(folder: Path) -> None:
    pipeline = load_pipeline(
        folder / "two.yaml",
        ["sft.batch_size=8", "main.reward.1.weight=2", "main.critic.kind=value_head", "run_dir=runs/other", "seed=5"],
    )
    stage = ppo(pipeline)
    assert isinstance(pipeline.stages[0], Sft)
    assert pipeline.stages[0].batch_size == 8
    assert [reward.weight for reward in stage.reward] == [1.0, 2.0]
    assert stage.critic is not None
    assert stage.critic.kind == "value_head"
    assert (pipeline.run_dir, pipeline.seed) == ("runs/other", 5)


def test_a_critic_keeps_its_learning_rate_beside_other_optimizer_settings(folder: Path) -> None:
    stage = ppo(load_pipeline(folder / "two.yaml", ["main.critic.optimizer.warmup_steps=5"]))
    assert stage.critic is not None
    assert stage.critic.optimizer.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("main.sampling", "wanted key=value"),
        ("=3", "wanted key=value"),
        ("main..top_k=3", "wanted key=value"),
        ("mian.seed=3", "did you mean `main`?"),
        ("main=3", "wanted a setting of main"),
        ("kl.target=3", "a stage's name stands in front: sft.kl.target or main.kl.target"),
        ("stages.0.batch_size=3", "a stage is named"),
        ("main.reward.2.weight=3", "main.reward has 2 entries"),
        ("main.reward.weight=3", "main.reward is a list; a position comes next, such as main.reward.0"),
        ("main.data.train.rows=3", "main.data.train is 'synthetic:reviews', which has no settings below it"),
        ("seed=[1", "not valid YAML"),
    ],
)
def test_wrong_overrides(folder: Path, override: str, words: str) -> None:
    found = errors(folder / "two.yaml", override)
    assert len(found) == 1
    assert found[0].startswith(f"override {override!r}: ")
    assert words in found[0]


def test_an_override_of_an_unknown_key_is_an_unknown_setting(folder: Path) -> None:
    assert errors(folder / "two.yaml", "main.sampling.tempratur=1") == [
        "main.sampling.tempratur (override): no such setting; did you mean `temperature`?"
    ]


def test_a_stage_name_in_front_of_a_single_method(folder: Path) -> None:
    found = errors(folder / "one.yaml", "ppo.sampling.top_k=5")
    assert "no stage's name stands in front: sampling.top_k" in found[0]


def test_all_errors_come_at_once_in_the_order_of_the_file(folder: Path) -> None:
    text = STAGES.replace("iterations: 10", "iterations: ten").replace("target: 6", "target: -6")
    text = text.replace("run_dir", "run_folder").replace("stage:sft", "stage:stf")
    (folder / "wrong.yaml").write_text(text)
    found = errors(folder / "wrong.yaml", "sft.policy.cpu_offload=true", "main.sampling.temperature=0")
    assert [line.split(":")[0] for line in found] == [
        "run_dir",
        "run_folder (line 1)",
        "sft.policy.cpu_offload (override)",
        "main.sampling.temperature (override)",
        "main.iterations (line 8)",
        "main.policy.model (line 9)",
        "main.kl.target (line 14)",
    ]


def test_a_rule_that_read_a_wrong_setting_stays_silent(folder: Path) -> None:
    """Without a valid target the adaptive controller has none; that is one mistake, not two."""
    found = errors(folder / "two.yaml", "main.kl.target=low")
    assert found == ["main.kl.target (override): got 'low', wanted a number, above 0"]


def test_the_resolved_file_loads_to_an_equal_pipeline(folder: Path) -> None:
    pipeline = load_pipeline(folder / "two.yaml", ["main.critic.kind=value_head", 'main.sampling.stop=["\\n", "off"]'])
    text = dump_pipeline(pipeline)
    (folder / "resolved.yaml").write_text(text)
    again = load_pipeline(folder / "resolved.yaml")
    assert again == pipeline
    assert dump_pipeline(again) == text
    main = yaml.safe_load(text)["stages"][1]
    assert main["critic"] == {"kind": "value_head"}
    assert main["advantages"] == {"estimator": "gae", "gamma": 1.0, "lam": 0.95, "bootstrap_truncated": False}
    assert "evaluation" not in main


def test_environment_variables_do_not_reach_the_resolved_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "a-secret-of-mine")
    assert "a-secret-of-mine" not in dump_pipeline(load_pipeline(folder / "two.yaml", ["run_dir=$HF_TOKEN"]))


def test_a_run_remembers_where_it_was_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    pipeline = load_pipeline("two.yaml")
    run_dir = folder / "runs" / "two"
    run_dir.mkdir(parents=True)
    for name, text in run_files(pipeline, pipeline_dir=folder).items():
        (run_dir / name).write_text(text)
    assert read_origin(run_dir) == (folder, folder)
    assert load_pipeline(run_dir / "config.yaml", pipeline_dir=folder) == pipeline
    (run_dir / "origin.json").write_text(json.dumps([]))
    assert read_origin(run_dir) == (run_dir, Path.cwd())


@pytest.mark.parametrize(
    ("name", "words"),
    [("tow.yaml", "did you mean"), ("nowhere/two.yaml", "relative paths start at"), (".", "got a folder")],
)
def test_no_such_file(folder: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_pipeline(folder / name)


def test_keys_merged_from_an_anchor(folder: Path) -> None:
    text = STAGES.replace("{family: gpt2}, ", "&base org/model, ").replace('"stage:sft"', "*base")
    (folder / "anchors.yaml").write_text(text.replace("&base org/model, ", "&base org/model,"))
    assert ppo(load_pipeline(folder / "anchors.yaml")).policy.model == "org/model"
