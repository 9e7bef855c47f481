"""What `submit` writes instead of sending: manifests with the pipeline in them, batch scripts, `ray job submit`."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from rlhf_ray.cli import main
from rlhf_ray.config.load import dump_pipeline, load_pipeline
from rlhf_ray.config.schema import Pipeline
from rlhf_ray.distributed.bundles import Capacity, NodeShare, assign, fit, reservations
from rlhf_ray.errors import ConfigError
from rlhf_ray.plan.placement import stage_requests
from rlhf_ray.submission.kuberay import LIMIT_BYTES, PACKED, job_name, pack, run_dir_of, unpack_into
from rlhf_ray.submission.nodes import Nodes, node_groups, nodes_for, on_groups, with_planned_memory
from rlhf_ray.submission.upload import Item, Upload, contents
from tests.cluster_files import REPOSITORY, ray_command_problems
from tests.unit.test_submit import PIPELINE, exit_code, project, refusal, runs

__all__ = ["project", "runs"]


def pipeline(
    folder: Path, *, workers: int = 1, gpus: str = "null", cpus: str = "null", strategy: str = "PACK"
) -> Pipeline:
    """Two stages, of which the second has the given policy."""
    policy = f"{{model: {{size: tiny}}, workers: {workers}, gpus: {gpus}, cpus: {cpus}}}"
    data = "data: {train: 'synthetic:reviews'}, steps: 1"
    (folder / "p.yaml").write_text(
        f"run_dir: runs/a\nplacement: {{strategy: {strategy}}}\nstages:\n"
        f"  - {{name: one, method: sft, policy: {{model: {{size: tiny}}, gpus: {gpus}}}, {data}}}\n"
        f"  - {{name: two, method: sft, policy: {policy}, {data}}}\n"
    )
    return load_pipeline(folder / "p.yaml")


# ------------------------------------------------------------------------------------- nodes


@pytest.mark.parametrize(
    ("workers", "nodes"),
    [
        (1, Nodes(1, 1, 8, 64)),
        (5, Nodes(1, 5, 40, 320)),
        (8, Nodes(1, 8, 64, 512)),
        (9, Nodes(2, 5, 40, 320)),
        (17, Nodes(3, 6, 48, 384)),
    ],
)
def test_nodes_that_nobody_described(tmp_path: Path, workers: int, nodes: Nodes) -> None:
    """A GPU for every worker of the larger stage."""
    assert nodes_for(pipeline(tmp_path, workers=workers), None) == nodes


def test_nodes_hold_whole_engines() -> None:
    """For 21 GPUs each of three nodes would have seven, and they room for three of the four engines."""
    config = load_pipeline(REPOSITORY / "pipelines/quickstart.yaml", ["ppo.generator.tensor_parallel=4"])
    assert nodes_for(config, None) == Nodes(1, 8, 64, 512)
    several = load_pipeline(
        REPOSITORY / "pipelines/quickstart.yaml",
        ["ppo.generator.tensor_parallel=4", "ppo.generator.workers=4", "ppo.policy.workers=2"],
    )
    assert nodes_for(several, None) == Nodes(3, 8, 64, 512)


def test_nodes_without_gpus(tmp_path: Path) -> None:
    assert nodes_for(pipeline(tmp_path, workers=3, gpus="0", cpus="2"), None) == Nodes(1, 0, 6, 48)
    assert nodes_for(pipeline(tmp_path, workers=3, gpus="0"), "2x16xCPU-64") == Nodes(2, 0, 16, 64)


def test_more_cores_than_gpus_bring(tmp_path: Path) -> None:
    assert nodes_for(pipeline(tmp_path, workers=2, cpus="20"), "1x2xH100-80") == Nodes(1, 2, 40, 128)


def test_cores_of_all_roles_on_a_node() -> None:
    """Of six workers four have one core each."""
    config = load_pipeline(REPOSITORY / "pipelines/quickstart.yaml", ["ppo.policy.cpus=30", "ppo.critic.cpus=25"])
    assert nodes_for(config, "1x5xH100-80") == Nodes(1, 5, 59, 320)


def test_cores_of_the_fullest_node_at_any_time(tmp_path: Path) -> None:
    """Two of three workers are on the first node; and an earlier stage may want more than the last one."""
    assert nodes_for(pipeline(tmp_path, workers=3, cpus="20"), "2x2xH100-80") == Nodes(2, 2, 40, 128)
    config = load_pipeline(REPOSITORY / "pipelines/quickstart.yaml", ["sft.policy.cpus=70"])
    assert nodes_for(config, "1x5xH100-80") == Nodes(1, 5, 70, 320)


def test_whole_nodes_for_workers_that_must_be_apart(tmp_path: Path) -> None:
    assert nodes_for(pipeline(tmp_path, workers=3, strategy="STRICT_SPREAD"), None) == Nodes(3, 1, 8, 64)


def test_nodes_that_are_too_few(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"two does not fit on 1x2xH100-80: .*\n.*\n  it would with 2 such nodes"):
        nodes_for(pipeline(tmp_path, workers=3), "1x2xH100-80")


# ------------------------------------------------------------------------------------ groups

QUICKSTART = REPOSITORY / "pipelines/quickstart.yaml"


def groups_of(*overrides: str, cluster: str | None = None) -> dict[str, tuple[tuple[str, ...], Nodes]]:
    return {
        group.name: (group.roles, group.nodes)
        for group in node_groups(load_pipeline(QUICKSTART, list(overrides)), cluster)
    }


def test_each_role_has_a_group_of_nodes() -> None:
    """The policy's is for the most of its workers in any stage."""
    one = Nodes(1, 1, 8, 64)
    assert groups_of("sft.policy.workers=4", "ppo.policy.workers=4", "ppo.generator.workers=16") == {
        "policy": (("policy",), Nodes(1, 4, 32, 256)),
        "critic": (("critic",), one),
        "reference": (("reference",), one),
        "generator": (("generator",), Nodes(2, 8, 64, 512)),
        "reward-learned": (("reward/learned",), one),
        "reward-sentiment": (("reward/sentiment",), Nodes(1, 0, 1, 8)),
    }


def test_roles_that_share_their_bundles_share_their_nodes() -> None:
    groups = groups_of("placement.layout=shared_scorers")
    assert groups["critic"] == (("critic", "reference", "reward/learned"), Nodes(1, 1, 8, 64))
    assert set(groups) == {"policy", "critic", "generator", "reward-sentiment"}
    apart = groups_of("ppo.critic.strategy=STRICT_PACK", "ppo.critic.workers=2")
    assert apart["critic"] == (("critic",), Nodes(1, 2, 16, 128))


def test_roles_that_share_at_any_time_share_their_nodes(tmp_path: Path) -> None:
    """Policy and reference are apart in one stage, share in the next one, where the policy has a worker more."""
    file = tmp_path / "p.yaml"
    dpo = "method: dpo, policy: {model: hub/name, workers: 2}, data: {train: hub/data}"
    file.write_text(
        f"run_dir: runs/a\nstages:\n  - {{name: one, {dpo}}}\n"
        f"  - {{name: two, {dpo}, reference: {{colocate_with: policy}}}}\n"
    )
    (group,) = node_groups(load_pipeline(file), "1x8xH100-80")
    assert (group.roles, group.labels) == ((), {})
    config = load_pipeline(QUICKSTART, ["ppo.policy.workers=3", "ppo.reference.colocate_with=policy"])
    assert {group.name: group.roles for group in node_groups(config, None)}["policy"] == ("policy", "reference")
    apart = load_pipeline(QUICKSTART).model_copy(update={"stages": (*load_pipeline(file).stages, *config.stages)})
    assert [group.roles for group in node_groups(apart, None)][:2] == [("policy", "reference"), ("critic",)]


def test_guests_go_where_their_host_goes(tmp_path: Path) -> None:
    """Labels of their own would have no effect, and be refused where the job loads the pipeline."""
    config = load_pipeline(QUICKSTART, ["placement.layout=shared_scorers"])
    placed = on_groups(config, node_groups(config, None))
    ppo: Any = placed.stages[-1]
    assert (ppo.critic.node_labels, ppo.reference.node_labels) == ({"rlhf-ray/role": "critic"}, {})
    (tmp_path / "p.yaml").write_text(dump_pipeline(placed))
    assert load_pipeline(tmp_path / "p.yaml", pipeline_dir=QUICKSTART.parent) == placed


def test_one_group_for_all_roles() -> None:
    """Engines whose processes are used again are no part of the placement group that is packed."""
    assert set(groups_of("placement.strategy=STRICT_PACK")) == {"policy", "generator"}
    assert set(groups_of("placement.layout=colocated")) == {"policy", "reward-sentiment"}
    # The pods of the policy would be four, and two of them idle in the last stage.
    assert groups_of("sft.policy.workers=4", "ppo.policy.workers=2") == {"gpu": ((), Nodes(1, 6, 48, 384))}
    assert groups_of(cluster="1x8xH100-80") == {"gpu": ((), Nodes(1, 8, 64, 512))}
    no_gpu = [f"{role}.gpus=0" for role in ("sft.policy", "reward_model.policy", "ppo.policy", "ppo.critic")]
    no_gpu += [f"ppo.{role}.gpus=0" for role in ("reference", "generator", "reward.0")]
    assert groups_of(*no_gpu) == {"cpu": ((), Nodes(1, 0, 6, 48))}


def test_names_of_groups_differ() -> None:
    names = ["A_long_name_that_two_rewards_share_1", "A_long_name_that_two_rewards_share_2"]
    config = load_pipeline(QUICKSTART)
    stage = config.stages[-1]
    own = [stage.reward[0].model_copy(update={"name": name}) for name in names]  # type: ignore[union-attr]
    changed = config.model_copy(update={"stages": (stage.model_copy(update={"reward": tuple(own)}),)})
    assert [group.name for group in node_groups(changed, None)][3:5] == [
        "reward-a-long-name-that",
        "reward-a-long-name-that-4",
    ]


@pytest.mark.parametrize("layout", ["null", "separate", "shared_scorers"])
@pytest.mark.parametrize("workers", [1, 3, 9])
def test_every_stage_fits_on_the_groups(layout: str, workers: int) -> None:
    config = load_pipeline(
        QUICKSTART,
        [f"placement.layout={layout}", f"ppo.generator.workers={workers}", "ppo.generator.tensor_parallel=2"],
    )
    groups = node_groups(config, None)
    nodes = [
        NodeShare(group.nodes.cpus, group.nodes.gpus, group.labels)
        for group in groups
        for _ in range(group.nodes.count)
    ]
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    placed = on_groups(config, groups)
    for stage in placed.stages:
        requests = stage_requests(stage, gpus=gpus)
        shares = fit(requests, Capacity(cpus, gpus, cpus, gpus, nodes), strategy="PACK", may_wait=False)
        reserved = zip(reservations(requests), assign(requests, shares, nodes, strategy="PACK"), strict=True)
        for group, places in reserved:
            for bundle, node in zip(group, places, strict=True):
                assert nodes[node].labels == {"rlhf-ray/role": re.sub("[^a-z]", "-", bundle[0].role)}


def test_nodes_have_the_memory_that_is_planned(tmp_path: Path) -> None:
    """A critic of 6.6e9 weights with 16 bytes of each in host memory: 98.5 GiB, and half a one for its process."""
    LlamaConfig().save_pretrained(tmp_path / "model")
    (tmp_path / "p.yaml").write_text(
        "run_dir: runs/a\nmethod: ppo\niterations: 1\n"
        f"policy: {{model: {tmp_path}/model}}\ncritic: {{zero: 1, cpu_offload: true}}\n"
        "reward: [{kind: function, function: 'json:loads'}]\n"
        "data: {train: 'synthetic:reviews'}\n"
    )
    config = load_pipeline(tmp_path / "p.yaml")
    groups = {group.name: group.nodes for group in with_planned_memory(config, node_groups(config, None))}
    assert groups["critic"] == Nodes(1, 1, 8, 128)
    assert groups["reference"] == Nodes(1, 1, 8, 64)
    (all_roles,) = with_planned_memory(config, node_groups(config, "1x8xA-80"))
    assert all_roles.nodes == Nodes(1, 8, 64, 512)
    assert nodes_for(config, "1x8xA-80/1024") == Nodes(1, 8, 64, 1024)


def test_labels_of_nodes_that_are_not_there_are_refused() -> None:
    config = load_pipeline(QUICKSTART, ["ppo.generator.node_labels={pool: large}"])
    with pytest.raises(ConfigError, match=r"^ppo\.generator\.node_labels: the job has nodes of its own"):
        on_groups(config, node_groups(config, None))
    assert on_groups(config, node_groups(config, "1x8xH100-80")) == config


def test_a_worker_that_no_node_can_hold() -> None:
    with pytest.raises(
        ConfigError, match=r"no number of nodes of 8 GPUs is enough: generator: one worker needs .*16 GPU"
    ):
        groups_of("ppo.generator.tensor_parallel=16")


def test_the_manifest_has_the_groups_and_the_pipeline_their_labels(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_cpu = [f"{stage}.policy.gpus=0" for stage in ("sft", "reward_model", "ppo")]
    with pytest.raises(SystemExit):
        main(["submit", str(QUICKSTART), "--kuberay", *on_cpu])
    said = capsys.readouterr()
    job = yaml.safe_load(said.out)["spec"]
    assert "workers of generator: 1 node of 1 GPU, 8 CPU cores and 64 GiB\n" in said.err
    groups = {group["groupName"]: group for group in job["rayClusterSpec"]["workerGroupSpecs"]}
    assert list(groups) == ["policy", "critic", "reference", "reward-learned", "reward-sentiment", "generator"]
    assert groups["generator"]["labels"] == {"rlhf-ray/role": "generator"}
    (container,) = groups["reward-sentiment"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "1", "memory": "8Gi"}
    (head,) = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    # Some of the groups have GPUs, neither the first nor all of them.
    assert "nvidia.com/gpu" not in str(groups["policy"]) + str(groups["reward-sentiment"])
    assert head["image"] == container["image"] == "registry.example.org/rlhf-ray:0.1.0-gpu"
    monkeypatch.setenv(PACKED, {each["name"]: each for each in head["env"]}[PACKED]["value"])
    unpack_into(tmp_path / "there")
    ppo = yaml.safe_load((tmp_path / "there" / "pipeline.yaml").read_text())["stages"][-1]
    assert ppo["generator"]["node_labels"] == {"rlhf-ray/role": "generator"}
    assert ppo["reward"][0]["node_labels"] == {"rlhf-ray/role": "reward-learned"}


# -------------------------------------------------------------------------- what travels packed


def test_what_is_packed_is_what_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own" / "below").mkdir(parents=True)
    (tmp_path / "own" / "below" / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "r.py").write_text("x = 'ä'\n")
    items = (Item(tmp_path / "own", "files/1_own", 256, "data"), Item(tmp_path / "r.py", "r.py", 9, "module r"))
    upload = Upload("run_dir: /runs/a\n", items, ())
    text = pack(upload)
    assert pack(upload) == text
    assert re.fullmatch(r"[A-Za-z0-9+/]+=*", text)
    monkeypatch.setenv(PACKED, text)
    unpack_into(tmp_path / "uploads" / "there")
    there = {
        path.relative_to(tmp_path / "uploads" / "there").as_posix(): path.read_bytes()
        for path in (tmp_path / "uploads" / "there").rglob("*")
        if path.is_file()
    }
    assert there == contents(upload)
    assert set(there) == {"pipeline.yaml", "files/1_own/below/a.bin", "r.py"}
    # No worker inherits it; a later try finds the folder.
    assert PACKED not in os.environ
    unpack_into(tmp_path / "uploads" / "there")
    with pytest.raises(ConfigError, match=PACKED):
        unpack_into(tmp_path / "uploads" / "elsewhere")


def test_too_large_for_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(os.urandom(LIMIT_BYTES))
    (tmp_path / "zeros").write_bytes(bytes(10 * LIMIT_BYTES))
    small = Upload("", (Item(tmp_path / "zeros", "files/zeros", 10 * LIMIT_BYTES, "data.evaluation"),), ())
    assert len(pack(small)) < LIMIT_BYTES
    with pytest.raises(
        ConfigError, match=r"128 KiB when packed, and a manifest takes 96 KiB:\n  data.train: .*noise, 96 KiB"
    ):
        pack(Upload("", (Item(tmp_path / "noise", "files/noise", LIMIT_BYTES, "data.train"),), ()))


@pytest.mark.parametrize(
    ("run_dir", "there"),
    [
        ("runs/a", "/runs/a"),
        ("./a", "/runs/a"),
        ("b/runs", "/runs/b/runs"),
        ("runs", "/runs/runs"),
        ("/runs/a", "/runs/a"),
    ],
)
def test_a_run_lies_on_the_volume(run_dir: str, there: str) -> None:
    assert run_dir_of(run_dir) == there


@pytest.mark.parametrize("run_dir", ["/runs", "/mnt/a", "~/a"])
def test_a_run_that_would_go_with_its_pod(run_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"run_dir: .*wanted a folder below /runs"):
        run_dir_of(run_dir)


def test_the_name_is_one_that_kubernetes_takes() -> None:
    assert job_name("/runs/Hh_try.2") == "rlhf-ray-hh-try-2"
    assert re.fullmatch(r"[a-z0-9-]{47}|[a-z0-9-]{46}", job_name("/runs/" + "ab" * 40))


# ------------------------------------------------------------------------------ the command line


def submitted(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """What a submission that is only written prints, and what it says beside that."""
    with pytest.raises(SystemExit) as stopped:
        main(["submit", "tiny.yaml", *arguments])
    said = capsys.readouterr()
    assert stopped.value.code == 0, said.err
    return said.out, said.err


def test_a_manifest_starts_the_run_where_it_is_applied(
    project: Path,
    runs: list[tuple[Pipeline, Path, bool]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The job's own words, called as the head calls them, on a volume that is a folder here."""
    printed, said = submitted(capsys, "--kuberay", "steps=5", "--secret", "MY_KEY")
    job = yaml.safe_load(printed)["spec"]
    assert "1 node of 1 GPU, 8 CPU cores and 64 GiB" in said
    assert "registry.example.org/rlhf-ray:0.1.0-gpu has to be changed" in said
    (head,) = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    variables = {each["name"]: each for each in head["env"]}
    assert variables["MY_KEY"]["valueFrom"]["secretKeyRef"]["key"] == "my_key"
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    assert variables["MY_KEY"] in group["template"]["spec"]["containers"][0]["env"]
    monkeypatch.setenv(PACKED, variables[PACKED]["value"])
    monkeypatch.setenv("MY_KEY", "sesame")
    volume = project / "volume"
    words = [re.sub("^/runs/", f"{volume}/", word) for word in shlex.split(job["entrypoint"])]
    words[words.index("--pid-file") + 1] = str(project / "driver.pid")
    assert words[:3] == ["python", "-m", "rlhf_ray"]
    assert exit_code(*words[3:]) == 0
    ((config, folder, resume),) = runs
    assert (config.run_dir, resume) == ("/runs/test", False)
    assert config.stages[0].steps == 5  # type: ignore[union-attr]
    assert folder.parent == volume / ".uploads"
    assert config.stages[0].data.train[0].path.startswith("./files/")
    assert (project / "driver.pid").read_text() == f"{os.getpid()}\n"


def test_a_script_for_slurm(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed, said = submitted(capsys, "--slurm", "steps=5", "--run-dir", "my run", "--cluster", "1x16xCPU-64")
    assert said == "asks for 1 node of 16 CPU cores and 64 GiB\n"
    assert "gpus-per-node" not in printed
    assert "#SBATCH --cpus-per-task=16\n" in printed
    assert "run_dir='my run'\n" in printed
    assert 'run=(rlhf-ray run tiny.yaml "run_dir=$run_dir" steps=5)\n' in printed


def test_the_plain_line(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    where = ("--address", "http://head:8265", "--print-command", "there")
    printed, _ = submitted(capsys, *where, "--secret", "MY_KEY", "--save-s", "77")
    variable, *words = shlex.split(printed)
    assert (variable, words[:3]) == ("RAY_AUTH_MODE=token", ["ray", "job", "submit"])
    assert ray_command_problems(words[1:]) == []
    options = dict(zip(words[3::2], words[4::2], strict=False))
    assert options["--address"] == "http://head:8265"
    assert options["--working-dir"] == str(project / "there")
    assert json.loads(options["--runtime-env-json"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "77"}}
    assert json.loads(options["--metadata-json"])["run_dir"] == "~/runs/test"
    command = words[words.index("--") + 1 :]
    assert command[:5] == ["exec", "python", "-m", "rlhf_ray", "run-submitted"]
    assert command[-2:] == ["--secret", "MY_KEY"]
    assert "cannot be made" in refusal(capsys, "submit", "tiny.yaml", *where)
    monkeypatch.chdir(project / "there")
    assert load_pipeline("pipeline.yaml").run_dir == "~/runs/test"


def test_options_that_would_have_no_effect(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (
        ("--kuberay", "--detach"),
        ("--slurm", "--image", "a:1"),
        ("--slurm", "--address", "http://head:8265"),
        ("--image", "a:1"),
        ("--cluster", "1x1xA-80"),
        ("--kuberay", "--shared", "/mnt"),
        ("--print-command", "there", "--address", "http://head:8265", "--detach"),
    ):
        assert "has no effect" in refusal(capsys, "submit", "tiny.yaml", *options), options
    assert "wanted one of them" in refusal(capsys, "submit", "tiny.yaml", "--kuberay", "--slurm")
    assert "wanted NODESxGPUSxNAME-GB" in refusal(capsys, "submit", "tiny.yaml", "--kuberay", "--cluster", "8")


def test_data_on_the_volume_stays_there(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "tiny.yaml").write_text(PIPELINE.replace("texts.jsonl", "/runs/data/texts.jsonl"))
    printed, _ = submitted(capsys, "--kuberay")
    assert yaml.safe_load(printed)["kind"] == "RayJob"
