"""Every shipped pipeline file is valid, and its header says what a reader needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.hh import overrides
from rlhf_ray.config import schema
from rlhf_ray.config.effects import rewards_of
from rlhf_ray.config.load import load_pipeline
from rlhf_ray.workers.reward_functions import check_function

PIPELINES = Path(__file__).parents[2] / "pipelines"
FILES = sorted(PIPELINES.glob("*.yaml"))


def test_the_shipped_files_are_found() -> None:
    wanted = "quickstart quickstart_dpo ppo_imdb ppo_stories ppo_lora grpo_gsm8k rlhf_hh dpo_hh online_dpo"
    assert {file.stem for file in FILES} == set(wanted.split())


def needs_shared(name: str) -> None:
    """Skips where the shared data are missing."""
    if not (PIPELINES.parents[1] / "shared/data").is_dir():
        pytest.skip(f"{name} reads ../shared/data, which is not beside this checkout")


def loaded(file: Path, monkeypatch: pytest.MonkeyPatch) -> schema.Pipeline:
    """The pipeline, read from the project's folder, where its relative paths start."""
    if "../shared" in file.read_text().split("\nrun_dir:")[1]:
        needs_shared(file.name)
    monkeypatch.chdir(PIPELINES.parent)
    return load_pipeline(file)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_file_is_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = loaded(file, monkeypatch)
    assert pipeline.run_dir == f"runs/{file.stem}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_reward_functions_can_be_called(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in loaded(file, monkeypatch).stages:
        for reward in rewards_of(stage):
            if isinstance(reward, schema.FunctionReward):
                check_function(reward.function, PIPELINES, reward.arguments)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_header_says_what_hardware_command_and_what_to_expect(file: Path) -> None:
    header = file.read_text().split("\nrun_dir:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    for word in ("# What ", "# Hardware ", "# Command ", "# Expect "):
        assert word in header
    assert "rlhf-ray run pipelines/" + file.name in header


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_misspelt_setting_in_it_is_found(file: Path) -> None:
    from rlhf_ray.errors import ConfigError

    with pytest.raises(ConfigError, match="seeed"):
        load_pipeline(file, ["seeed=3"])


@pytest.mark.parametrize("name", ["rlhf_hh", "dpo_hh"])
def test_the_small_run_of_a_hub_pipeline_is_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_shared(name)
    monkeypatch.chdir(PIPELINES.parent)
    pipeline = load_pipeline(PIPELINES / f"{name}.yaml", overrides(name))
    sources = [
        source.path for stage in pipeline.stages for source in (*stage.data.train, *(stage.data.evaluation or ()))
    ]
    assert all(source.startswith("../shared/data/") for source in sources)
