"""`rlhf-ray plan` as a user sees it; nothing is started."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_ray.cli import main
from rlhf_ray.distributed import placement
from rlhf_ray.distributed.bundles import Share
from rlhf_ray.distributed.nodes import Node
from rlhf_ray.errors import ConfigError
from rlhf_ray.plan.cluster import parse_cluster
from rlhf_ray.plan.data import Lengths
from rlhf_ray.plan.estimate import StageEstimate, Together, all_stages
from rlhf_ray.plan.time import StageTime

PIPELINE = "pipelines/quickstart.yaml"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int | str | None, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


def supervised(folder: Path, model: Path) -> str:
    """A pipeline of one stage with a tiny model."""
    (folder / "d.jsonl").write_text(json.dumps({"text": "some words"}) + "\n")
    made = {
        "run_dir": str(folder / "run"),
        "method": "sft",
        "policy": {"model": str(model)},
        "data": {"train": str(folder / "d.jsonl")},
        "steps": 3,
    }
    (folder / "p.yaml").write_text(json.dumps(made))
    return str(folder / "p.yaml")


def test_the_quickstart_on_a_cluster(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr("ray.init", lambda *arguments, **settings: started.append(settings))
    code, out, _ = run(capsys, PIPELINE, "--cluster", "1x8xH100-80")
    assert code == 0
    assert not started
    for words in ("optimizer steps in all", "1 x {CPU 1, GPU 1}", "reward/sentiment", "Every stage has"):
        assert words in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 120


def test_the_example_in_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    section = Path("README.md").read_text().split("## What a pipeline needs\n")[1].split("\n## ")[0]
    command = section.split("```bash\nrlhf-ray plan ")[1].split("#")[0].split()
    example = section.split("```text\n")[1].split("```")[0]
    code, out, _ = run(capsys, *command)
    assert example.split() == out.split()
    assert code == 1


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, PIPELINE, "ppo.policy.workers=9", "--cluster", "1x8xH100-80", "--json")
    plan = json.loads(out)
    assert code == 1
    assert plan["fits"] is False
    assert [stage["stage"] for stage in plan["arithmetic"]] == ["sft", "reward_model", "ppo"]
    (ppo,) = [each for each in plan["placement"] if each["stage"] == "ppo"]
    assert "policy needs 9 GPUs" in ppo["shortage"]
    policy = plan["memory"][-1]["roles"][0]
    assert policy["total"] == pytest.approx(sum(policy["parts"].values()))
    assert policy["fits"] is True
    assert plan["cluster"]["cpus"] is None


def test_time_cost_and_scaling(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, PIPELINE, "--cluster", "1x8xH100-80", "--scaling", "--gpu-hour-price", "1000")
    for words in (
        "Time of an iteration on 1x8xH100-80",
        "GPU-hours",
        "ppo on more GPUs",
        "generation tail: the longest",
        "sft: no more: the batch is too small for 64 policy workers, 32 rows at a time; raise batch_size.",
    ):
        assert words in out
    _, out, _ = run(capsys, PIPELINE, "--cluster", "1x8xH100-80", "--gpu-hour-price", "1000", "--json")
    plan = json.loads(out)
    time = plan["time"][-1]["time"]
    assert time["cost"] == pytest.approx(1000 * time["gpu_hours"])
    assert time["gpu_hours"] == pytest.approx(time["run_s"] * time["gpus"] / 3600)
    assert "on more GPUs" not in out


def test_all_stages_together(capsys: pytest.CaptureFixture[str]) -> None:
    asked = (PIPELINE, "--cluster", "1x8xH100-80", "--gpu-hour-price", "1000")
    _, out, _ = run(capsys, *asked, "--json")
    plan = json.loads(out)
    times, together = [each["time"] for each in plan["time"]], plan["together"]
    for name in ("run_s", "gpu_hours", "cost"):
        assert together[name] == pytest.approx(sum(time[name] for time in times))
    # All eight GPUs from the first stage to the last one.
    assert together["held_gpu_hours"] == pytest.approx(8 * together["run_s"] / 3600)
    assert together["held_cost"] == pytest.approx(1000 * together["held_gpu_hours"])
    _, out, _ = run(capsys, *asked)
    (cost,) = [line.split() for line in out.splitlines() if line.startswith(" cost ")]
    assert cost[-1] == f"{together['cost']:.2f}"
    words = " ".join(out.split())
    assert f"All 8 GPUs of 1x8xH100-80 held for the whole pipeline: {together['held_gpu_hours']:.2f} " in words
    assert f"GPU-hours, cost {together['held_cost']:.2f}." in words
    assert "on this cluster" not in out


def test_a_stage_that_does_not_fit_says_so_beside_its_cost(capsys: pytest.CaptureFixture[str]) -> None:
    small = ("ppo.policy.workers=9", "--cluster", "1x8xH100-80", "--gpu-hour-price", "1000")
    _, out, _ = run(capsys, PIPELINE, *small)
    (line,) = [line.split() for line in out.splitlines() if line.strip().startswith("on this cluster")]
    assert line == ["on", "this", "cluster", "fits", "fits", "does", "NOT", "fit"]


def test_one_unknown_stage_leaves_the_sum_unknown() -> None:
    time = StageTime("a", Lengths(1, 0, 0), (), {"learn": 2.0}, 0.0, 10, 4)
    known = StageEstimate("a", time, (), "", "")
    unknown = StageEstimate("b", replace(time, iterations=None), (), "", "")
    assert all_stages([known, known], gpus=8, price=9.0) == Together(40.0, 160 / 3600, 0.4, 320 / 3600, 0.8)
    assert all_stages([known], gpus=8, price=None) == Together(20.0, 80 / 3600, None, 160 / 3600, None)
    assert all_stages([known], gpus=None, price=9.0) == Together(20.0, 80 / 3600, 0.2, None, None)
    assert all_stages([known, unknown], gpus=8, price=9.0) is None
    assert all_stages([known, replace(known, time=None)], gpus=8, price=9.0) is None


def test_a_gpu_without_figures_has_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, PIPELINE, "--cluster", "1x8xT4-16")
    assert "ppo: no time, there are no figures of its GPUs." in out


def test_a_running_cluster_of_uneven_nodes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        Node("10.0.0.1", Share(8, 0), Share(7, 0), 30.0, ""),
        Node("10.0.0.2", Share(32, 4), Share(30, 3), 400.0, "H100", 80.0),
    ]
    monkeypatch.setattr("rlhf_ray.distributed.nodes.cluster_nodes", lambda address: nodes)
    _, out, _ = run(capsys, PIPELINE, "--address", "head:8265")
    assert "10.0.0.2: 30 of 32 CPUs and 3 of 4 GPUs are free (H100)." in out
    assert "Every stage has its workers' room." in out
    assert "Time of an iteration on head:8265" in out
    # Of four GPUs one is taken.
    _, out, _ = run(capsys, PIPELINE, "ppo.policy.workers=3", "ppo.policy.gpus=1", "--address", "head:8265")
    assert "3 of 4 are free" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scaling"], "--scaling: there is no cluster; name one with --cluster, --here or --address"),
        (["--gpu-hour-price", "2"], "--gpu-hour-price: there is no cluster; name one with"),
        (["--cluster", "2x8xZZ9-80", "--scaling"], "--scaling: there are no figures of the GPUs of 2x8xZZ9-80; known"),
        (["--cluster", "2x8xZZ9-80", "--gpu-hour-price", "2"], "--gpu-hour-price: there are no figures of the GPUs of"),
        (["--cluster", "1x8xCPU-64", "--scaling"], "--scaling: no stage is on a GPU of 1x8xCPU-64"),
        (["--cluster", "1x8xCPU-64", "--gpu-hour-price", "2", "--json"], "--gpu-hour-price: no stage is on a GPU of"),
        (["policy.gpus=0", "--cluster", "1x8xH100-80", "--scaling"], "--scaling: no stage is on a GPU of 1x8xH100-80"),
    ],
)
def test_an_option_without_effect_is_a_mistake(
    arguments: list[str], words: str, tmp_path: Path, llama_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = supervised(tmp_path, llama_directory)
    code, out, err = run(capsys, file, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(words)


def test_host_memory_of_nodes_with_gpus(
    tmp_path: Path, llama_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = supervised(tmp_path, llama_directory)
    code, out, _ = run(capsys, file, "--cluster", "1x8xH100-80")
    assert code == 0
    assert "Every stage has the GPU memory that it needs." in out
    # The driver's GiB, and 0.53 of a worker with a model of some kB.
    line = (
        "Host memory of such nodes is not known: the fullest takes 1.53 GiB (sft); --cluster 1x8xH100-80/GB compares."
    )
    assert line in out
    code, out, _ = run(capsys, file, "--cluster", "1x8xH100-80/1.6")
    assert code == 0
    assert "Every stage has the memory that it needs." in out
    assert "is not known" not in out
    code, out, _ = run(capsys, file, "--cluster", "1x8xH100-80/1.5")
    assert code == 1
    assert "sft does NOT fit: 1.53 GiB for a node's 1.50 GiB." in out


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2x8xH100-80", (2, 8, 80, None)),
        ("2x8xH100-80/1024", (2, 8, 80, 1024)),
        ("2x8xH100-80/1024.5", (2, 8, 80, 1024.5)),
        ("2x16xCPU-64", (2, 0, None, 64)),
    ],
)
def test_a_cluster_in_words(text: str, found: tuple[float | None, ...]) -> None:
    shape = parse_cluster(text)
    assert (shape.nodes, shape.gpus, shape.gpu_gib, shape.host_gib) == found


@pytest.mark.parametrize("text", ["2x8xH100-80/", "2x8xH100-80/0", "2x8xH100/1024", "2x16xCPU-64/64", "2x8xH100-80/a"])
def test_a_cluster_that_is_none(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"wanted NODESxGPUSxNAME-GB.*2x8xH100-80/1024 where each has 1024 GB of host"
    ):
        parse_cluster(text)


def test_where_nothing_fits_nothing_is_called_the_fastest(
    tmp_path: Path, llama_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = supervised(tmp_path, llama_directory)
    code, out, _ = run(capsys, file, "--cluster", "1x8xH100-1", "--suggest")
    assert code == 1
    assert "sft: nothing fits: " in out
    assert "the fastest that fits" not in out
    code, out, _ = run(capsys, file, "--cluster", "1x8xH100-80", "--suggest")
    assert code == 0
    assert "sft: its own settings are the fastest." in out
    assert "the fastest that fits" not in out


def test_without_a_cluster_nothing_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, PIPELINE, "--json")
    assert (code, json.loads(out)["fits"]) == (0, None)


def test_large_figures_stand_in_json(tmp_path: Path, llama_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = supervised(tmp_path, llama_directory)
    _, out, _ = run(capsys, file, "steps=2000000000", "--cluster", "1x8xH100-80", "--json")
    plan = json.loads(out)
    assert plan["time"][0]["time"]["run_s"] > 2e6
    assert plan["together"]["run_s"] > 2e6
    assert plan["arithmetic"][0]["passes"] == 2e9
    assert (plan["cluster"]["cpus"], plan["cluster"]["gpus"]) == (None, 8)
    _, out, _ = run(capsys, file, "policy.gpus=0", "--json")
    together = json.loads(out)["together"]
    assert together["run_s"] > 0
    assert together["held_gpu_hours"] is None


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, PIPELINE, "--here")
    assert code == 0
    assert "Placement on this machine" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cluster", "two H100"], "--cluster: got 'two H100', wanted NODESxGPUSxNAME-GB"),
        (["--cluster", "1x1xA-1", "--here"], "got --here and --cluster, wanted one of them"),
        (["--address", "http://127.0.0.1:1"], "http://127.0.0.1:1 cannot be reached"),
        (["--address", "127.0.0.1:1:6379"], "--address: got '127.0.0.1:1:6379'"),
        (["--here", "--measured", "tests"], "--measured: tests holds no run"),
        (["ppo.iterations=none"], "ppo.iterations"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other tests may have a Ray open in this process, which would be taken for the one that is meant.
    monkeypatch.setattr(placement, "_connection", None)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    code, out, err = run(capsys, PIPELINE, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


def test_a_model_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "no_such_architecture"}')
    code, out, err = run(capsys, PIPELINE, f"ppo.reference.model={model}")
    assert (code, out) == (2, "")
    assert str(model) in err
    assert "Traceback" not in err


def test_help_needs_neither_torch_nor_ray() -> None:
    import subprocess

    code = "import sys, rlhf_ray.plan_command; print({'torch', 'ray'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "set()"


def test_a_layout_is_printed_as_plain_settings(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, PIPELINE, "placement.layout=colocated", "ppo.policy.workers=2", "--cluster", "2x8xH100-80")
    words = " ".join(out.split())
    assert "placement.layout makes of ppo: critic.colocate_with=policy critic.workers=2 " in words
    assert "generator.sleep=true generator.memory_share=0.5 policy.offload=true critic.offload=true" in words
    assert "2 x {CPU 5, GPU 1} (2 on 1)" in out
    assert out.count("those of policy (2 on 1)") == 4
    assert "all on policy's GPU" in words
    assert "ppo: what is on policy's GPU takes most while the engines" in out
    assert max(map(len, out.splitlines())) <= 120


def test_labels_of_nodes_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    labels = "ppo.generator.node_labels={pool: large, market: '!spot'}"
    _, out, _ = run(capsys, PIPELINE, labels, "--cluster", "1x8xH100-80")
    assert out.count("where") == 1
    assert "where pool=large, market=!spot" in " ".join(out.replace("│", " ").split())


def test_sharers_that_do_not_fit_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["ppo.generator.colocate_with=policy", "ppo.critic.colocate_with=policy"]
    _, out, _ = run(capsys, PIPELINE, *shared, "--cluster", "1x8xH100-10")
    assert "ppo policy, critic, generator do NOT fit: " in " ".join(out.split())
    assert "what helps most: " in out
