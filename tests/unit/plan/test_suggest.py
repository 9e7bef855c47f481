"""What is suggested fits, is valid, and is as fast as the best of all combinations."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from rlhf_ray.cli import main
from rlhf_ray.config.load import load_pipeline
from rlhf_ray.plan.cluster import parse_cluster
from rlhf_ray.plan.data import Lengths
from rlhf_ray.plan.report import make_plan
from rlhf_ray.plan.suggest import _Search, suggest

LENGTHS = Lengths(prompt=200, response=300, longest=600)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a model with 8 G parameters in few layers, which are built sooner."""
    folder = tmp_path_factory.mktemp("large")
    LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=7,
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return folder


def pipeline(model: Path, folder: Path, **changes: Any) -> Path:
    prompts = folder / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": "x" * 400}) + "\n")
    typed = {"dtype": "bfloat16"}
    made: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "method": "ppo",
        "iterations": 10,
        "prompts_per_iteration": 256,
        "policy": {"model": str(model), **typed},
        "critic": typed,
        "reference": typed,
        "reward": [{"kind": "model", "model": str(model), **typed}],
        "generator": typed,
        "sampling": {"max_new_tokens": 600},
        "data": {"train": str(prompts)},
    }
    file = folder / "p.yaml"
    file.write_text(json.dumps(made | changes))
    return file


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int | str | None, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


def test_what_does_not_fit_is_made_to(large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, shape = pipeline(large, tmp_path), parse_cluster("2x8xH100-80")
    assert not make_plan(load_pipeline(file), shape, named=True).fits
    code, out, _ = run(capsys, str(file), "--cluster", shape.text, "--suggest")
    assert code == 0
    assert "as it is it does not fit." in out
    overrides = [line.strip() for line in out.split("\n\n")[0].splitlines() if line.startswith("  ")]
    plan = make_plan(load_pipeline(file, overrides), shape, named=True)
    assert plan.fits
    assert plan.placement[0].wanted.gpus == shape.total_gpus


def test_json_has_the_settings(llama_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(pipeline(llama_directory, tmp_path, generator={"workers": 9}))
    _, out, _ = run(capsys, file, "--cluster", "1x8xH100-80", "--suggest", "--json")
    plan = json.loads(out)
    assert plan["suggested"]["ppo"]["generator.workers"] < 9
    assert plan["fits"] is True


def test_it_is_as_fast_as_the_best_of_all_combinations(large: Path, tmp_path: Path) -> None:
    config = load_pipeline(pipeline(large, tmp_path))
    stage = config.stages[0]
    search = _Search(config, stage, 1000, parse_cluster("2x8xH100-80"), LENGTHS, {})
    options = {role: search._options(role) for role in search._roles}
    # Every combination that leaves no GPU idle, of which none can be better with fewer workers in one role.
    fits = [
        chosen
        for chosen in itertools.product(*options.values())
        if 15 <= sum(each["workers"] * each.get("tensor_parallel", 1) for each in chosen) <= 16
    ]
    best = min(search._try(dict(zip(options, chosen, strict=True))).seconds for chosen in fits)
    found = search.run().iteration_s
    assert found is not None
    assert found <= 1.1 * best


def test_what_is_the_fastest_stays(llama_directory: Path, tmp_path: Path) -> None:
    config = load_pipeline(pipeline(llama_directory, tmp_path))
    found = suggest(config, config.stages[0], 1000, parse_cluster("1x8xH100-80"), LENGTHS, {})
    if found.settings:
        assert found.before_s is not None
        assert found.iteration_s is not None
        assert found.iteration_s < found.before_s
    again = [f"{key}={json.dumps(value)}" for key, value in found.settings.items()]
    config = load_pipeline(tmp_path / "p.yaml", again)
    settled = suggest(config, config.stages[0], 1000, parse_cluster("1x8xH100-80"), LENGTHS, {})
    assert settled.iteration_s == pytest.approx(found.iteration_s, rel=0.02)


def test_without_gpus_there_are_cores(llama_directory: Path, tmp_path: Path) -> None:
    config = load_pipeline(pipeline(llama_directory, tmp_path, generator={"dtype": "float32"}))
    found = suggest(config, config.stages[0], 1000, parse_cluster("1x8xCPU-64"), LENGTHS, {})
    assert found.reason == ""
    assert not any(key.endswith(("tensor_parallel", "cpu_offload")) for key in found.settings)


def test_what_cannot_fit_is_named(large: Path, tmp_path: Path) -> None:
    config = load_pipeline(pipeline(large, tmp_path))
    found = suggest(config, config.stages[0], 1000, parse_cluster("1x2xL4-24"), LENGTHS, {})
    assert found.settings == {}
    assert found.reason.startswith("reference and reward/model: no number of workers fits")


def test_it_needs_a_cluster_with_figures(large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(pipeline(large, tmp_path))
    code, out, err = run(capsys, file, "--suggest")
    assert (code, out) == (2, "")
    assert "--suggest: there is no cluster; name one with --cluster" in err
    code, _, err = run(capsys, file, "--suggest", "--cluster", "1x8xT4-16")
    assert code == 2
    assert "there are no figures of the GPUs of 1x8xT4-16; known are B200" in err
