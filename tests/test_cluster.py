"""Every file of cluster/ is valid, mistakes in them are found, and the commands of its README are commands.

What runs here for real are the three shell scripts, with stand-ins for Slurm, Ray and the run itself.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

from rlhf_ray.cli import app, main
from rlhf_ray.config.describe import METHODS, list_settings
from rlhf_ray.config.schema import Pipeline
from rlhf_ray.submission.kuberay import ray_job
from rlhf_ray.submission.nodes import NodeGroup, Nodes
from rlhf_ray.submission.slurm import batch_script
from tests.cluster_files import (
    CHECKERS,
    CLUSTER,
    REPOSITORY,
    is_metric,
    kubernetes_problems,
    own_metrics_named,
    pipeline_problems,
    problems,
    queries,
    query_problems,
    ray_command_problems,
    read_yaml,
    schema_problems,
    slurm_problems,
    strict,
)

FILES = sorted(
    path.relative_to(CLUSTER).as_posix()
    for folder in CHECKERS
    for path in (CLUSTER / folder).iterdir()
    if path.is_file()
)
README = (CLUSTER / "README.md").read_text()
CRDS = REPOSITORY.parent / "shared" / "kuberay"


# The files, and what is found in spoiled ones


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_valid(name: str) -> None:
    assert problems(name, (CLUSTER / name).read_text()) == []


def test_every_file_is_of_a_kind_that_is_checked() -> None:
    others = {"README.md", "run_or_resume.sh", "stop_driver.sh", "schema/kuberay.json"}
    assert {path.relative_to(CLUSTER).as_posix() for path in CLUSTER.rglob("*") if path.is_file()} == {*FILES, *others}


JOB, SPOT, STAYS = "kuberay/rayjob.yaml", "kuberay/rayjob-spot.yaml", "kuberay/raycluster.yaml"
AWS, GCP, OWN = "launcher/aws.yaml", "launcher/gcp.yaml", "launcher/on_premises.yaml"
GPU, CPU, SLURM = "docker/Dockerfile.gpu", "docker/Dockerfile.cpu", "slurm/run.sbatch"
RULES, GRAFANA = "monitoring/rules.yaml", "monitoring/dashboard.json"
# What happens to the file, its first place, what stands there instead, and a word of the problem that is to be found.
MUTATIONS = {
    "authentication_off": (STAYS, "mode: token", "mode: disabled", "'token' was expected"),
    "token_without_a_secret": (JOB, "      secretName: rlhf-ray-token", "      # none", "secretName"),
    "a_secret_in_an_environment": (JOB, "- name: HF_HOME", "- name: HF_TOKEN", "secret HF_TOKEN"),
    "a_token_of_the_hub": (SPOT, "run_or_resume /opt", "run_or_resume hf_abcdefghijklmnopqrstuv /opt", "a secret"),
    "a_load_balancer": (STAYS, "serviceType: ClusterIP", "serviceType: LoadBalancer", "ClusterIP"),
    "a_dashboard_for_everyone": (
        STAYS,
        'num-gpus: "0"',
        'num-gpus: "0"\n      dashboard-host: 0.0.0.0',
        "should not be valid",
    ),
    "start_parameter_as_a_number": (JOB, 'num-gpus: "0"', "num-gpus: 0", "'0' was expected"),
    "unknown_start_parameter": (JOB, 'metrics-export-port: "8080"', 'metric-export-port: "8080"', "No such option"),
    "cpus_on_the_head": (STAYS, 'num-cpus: "0"', 'num-cpus: "8"', "'0' was expected"),
    "gpus_on_the_head": (JOB, 'num-gpus: "0"', 'num-gpus: "4"', "'0' was expected"),
    "workers_without_gpus": (STAYS, ', nvidia.com/gpu: "4"', "", "requests differ"),
    "shm_on_disk": (JOB, "emptyDir: {medium: Memory, sizeLimit: 64Gi}", "emptyDir: {sizeLimit: 64Gi}", "volumes[1]"),
    "shm_not_mounted": (JOB, "mountPath: /dev/shm}", "mountPath: /dev/shmem}", "/dev/shm"),
    "shm_beyond_the_memory": (JOB, "sizeLimit: 64Gi", "sizeLimit: 512Gi", "below the memory limit"),
    "runs_that_go_with_the_pod": (
        STAYS,
        "persistentVolumeClaim: {claimName: rlhf-ray-runs}",
        "emptyDir: {medium: Memory, sizeLimit: 1Gi}",
        "/runs is no claim",
    ),
    "no_time_to_save": (JOB, "GracePeriodSeconds: 300", "GracePeriodSeconds: 30", "minimum of 60"),
    "a_wait_beyond_the_grace_period": (JOB, 'stop_driver, "270"', 'stop_driver, "900"', "above what stop_driver waits"),
    "no_retries": (SPOT, "backoffLimit: 20", "backoffLimit: 0", "minimum of 1"),
    "a_submitter_that_is_not_repeated": (SPOT, "backoffLimit: 3 #", "backoffLimit: 0 #", "minimum of 1"),
    "a_retry_that_starts_anew": (JOB, "entrypoint: run_or_resume", "entrypoint: rlhf-ray run", "entrypoint"),
    "a_pipeline_that_is_not_there": (JOB, "quickstart.yaml /runs", "quickstar.yaml /runs", "quickstar.yaml"),
    "another_ray": (JOB, "rayVersion: 2.60.0", "rayVersion: 2.9.3", "constraints.txt"),
    "misspelt_key": (STAYS, "workerGroupSpecs:", "workerGroupSpec:", "workerGroupSpec"),
    "a_key_twice": (STAYS, "metadata:\n  name: rlhf-ray\n", "metadata:\n  name: a\n  name: rlhf-ray\n", "twice"),
    "more_replicas_than_allowed": (STAYS, "replicas: 2", "replicas: 5", "minReplicas and maxReplicas"),
    "the_latest_image": (STAYS, "rlhf-ray:0.1.0-gpu", "rlhf-ray:latest", "image"),
    "as_root": (STAYS, "runAsUser: 1000", "runAsUser: 0", "minimum of 1"),
    "a_volume_for_one_node": ("kuberay/storage.yaml", "ReadWriteMany", "ReadWriteOnce", "ReadWriteMany"),
    "launcher_without_a_token": (AWS, "export RAY_AUTH_MODE=token;", "", "without token"),
    "launcher_token_stays_home": (GCP, "/home/ray/.ray/auth_token: ~/.ray/auth_token", "/a: ~/b", "does not travel"),
    "launcher_dashboard_for_everyone": (OWN, "host=127.0.0.1", "host=0.0.0.0", "dashboard is open"),
    "launcher_unknown_section": (AWS, "provider:", "providers:", "Ray refuses"),
    "launcher_unknown_head": (GCP, "head_node_type: head", "head_node_type: heads", "Ray refuses"),
    "launcher_small_shm": (AWS, "- --shm-size=64g", "- --shm=64g", "--shm-size="),
    "launcher_misspelt_option": (OWN, "--metrics-export-port", "--metric-export-port", "No such option"),
    "slurm_no_requeue": (SLURM, "#SBATCH --requeue\n", "", "no --requeue"),
    "slurm_signal_to_every_process": (SLURM, "--signal=B:TERM@300", "--signal=TERM@300", "this shell alone"),
    "slurm_signal_too_late": (SLURM, "B:TERM@300", "B:TERM@60", "no time to save"),
    "slurm_driver_not_told": (SLURM, 'kill -TERM "$(cat', 'kill -HUP "$(cat', "no kill -TERM"),
    "slurm_starts_anew": (SLURM, 'rlhf-ray resume "$run_dir"', "rlhf-ray run", "no rlhf-ray resume"),
    "slurm_shared_nodes": (SLURM, "#SBATCH --exclusive\n", "", "no --exclusive"),
    "slurm_without_a_token": (SLURM, "export RAY_AUTH_MODE=token\n", "", "RAY_AUTH_MODE"),
    "slurm_token_for_everyone": (SLURM, "umask 077 && ", "", "umask"),
    "slurm_open_quote": (SLURM, 'exit "$code"', 'exit "$code', "bash"),
    "slurm_misspelt_option": (SLURM, "--metrics-export-port=8080", "--metrics-port=8080", "No such option"),
    "docker_as_root": (GPU, "USER ray\n", "", "root"),
    "docker_unpinned_base": (CPU, "python:3.11-slim-bookworm", "python", "no version"),
    "docker_untested_versions": (GPU, "--constraint constraints.txt ", "", "tested versions"),
    "docker_another_torch": (CPU, "torch==2.13.0+cpu", "torch==2.11.0+cpu", "constraints.txt"),
    "docker_unknown_extra": (GPU, ".[gpu]", ".[cuda]", "no extra cuda"),
    "docker_copies_nothing": (CPU, "COPY pipelines pipelines", "COPY pipeline pipelines", "no such file"),
    "docker_shell_command": (GPU, 'CMD ["rlhf-ray", "doctor"]', "CMD rlhf-ray doctor", "signals"),
    "docker_secret": (GPU, "ENV NVIDIA", "ENV HF_TOKEN=abc NVIDIA", "a secret"),
    "a_metric_that_no_run_writes": (RULES, "rlhf_ray_not_finite >", "rlhf_ray_not_finites >", "no metric"),
    "a_metric_that_ray_has_not": (RULES, "ray_node_mem_used_host", "ray_node_mem_used_hosts", "no metric"),
    "an_open_bracket": (RULES, "[10m]))", "[10m])", "stay open"),
    "an_unknown_severity": (RULES, "severity: critical", "severity: terrible", "rules[1]"),
    "an_alert_twice": (RULES, "alert: KlIsLarge", "alert: RunStalled", "twice"),
    "no_such_rules": ("monitoring/prometheus.yaml", "[rules.yaml]", "[rule.yaml]", "no rule.yaml"),
    "a_panel_of_nothing": (GRAFANA, "rlhf_ray_kl_per_sequence", "rlhf_ray_kl", "no metric"),
    "a_role_metric_of_nothing": (GRAFANA, '_.+_busy_share', '_.+_busyness', "no metric matches"),
    "panels_over_each_other": (GRAFANA, '"x": 12', '"x": 11', "over another panel"),
    "an_unknown_variable": (GRAFANA, '$run\\", stage', '$runs\\", stage', "no variable"),
    "cut_off_json": (GRAFANA, '"schemaVersion": 39,', '"schemaVersion": 39', "no JSON"),
    "a_variable_of_nothing": (GRAFANA, "label_values(ray_rlhf_ray_iteration,", "label_values(it,", "no metric"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_is_found(mutation: str) -> None:
    name, old, new, word = MUTATIONS[mutation]
    text = (CLUSTER / name).read_text()
    assert old in text
    found = problems(name, text.replace(old, new, 1))
    assert any(word in problem for problem in found), found


def test_mistakes_of_every_kind_of_file_are_tried() -> None:
    assert len(MUTATIONS) >= 30
    assert {name for name, *_ in MUTATIONS.values()} == set(FILES)


# KubeRay's own definitions


@pytest.fixture(scope="module")
def crds() -> dict[str, Any]:
    """The strict schema of each kind, from KubeRay's custom resource definitions."""
    if not CRDS.is_dir():
        pytest.skip(f"KubeRay's custom resource definitions are not at {CRDS}")
    schemas = {}
    for path in CRDS.glob("*.yaml"):
        definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
        schemas[definition["spec"]["names"]["kind"]] = strict(version["schema"]["openAPIV3Schema"])
    return schemas


@pytest.mark.parametrize("name", [STAYS, JOB, SPOT])
def test_kuberay_takes_it(name: str, crds: dict[str, Any]) -> None:
    document = read_yaml((CLUSTER / name).read_text())
    # The API server knows `metadata` itself.
    schema = crds[document["kind"]]
    schema["properties"]["metadata"] = {"type": "object"}
    assert schema_problems(document, schema) == []
    document["spec"]["entrypoints"] = "a"
    assert schema_problems(document, schema)


def test_our_schema_names_only_what_kuberay_knows(crds: dict[str, Any]) -> None:
    ours = read_yaml((CLUSTER / "schema/kuberay.json").read_text())["$defs"]

    def paths(schema: Any, defs: dict[str, Any]) -> Iterator[tuple[str, ...]]:
        schema = defs[schema["$ref"].split("/")[-1]] if "$ref" in schema else schema
        for key, part in schema.get("properties", {}).items():
            yield (key,)
            yield from ((key, *rest) for rest in paths(part, defs))
        for part in [*schema.get("oneOf", []), *([schema["items"]] if "items" in schema else [])]:
            yield from paths(part, defs)

    for kind, schema in crds.items():
        known = set(paths(schema["properties"]["spec"], {}))
        used = set(paths(ours[kind]["properties"]["spec"], ours))
        free = {path for path in used if path[-2:-1] == ("rayStartParams",)}
        assert len(used) > 50
        assert used - known == free


# Metrics


def test_the_queries_are_of_metrics_of_a_run_and_of_ray() -> None:
    assert len(queries()) > 25
    assert [problem for query in queries() for problem in query_problems(query, {"rlhf_ray:sync_share"})] == []
    assert is_metric("ray_rlhf_ray_reward_sentiment_mean")
    assert not is_metric("ray_rlhf_ray_reward")
    assert not is_metric("rlhf_ray_reward_mean")


def test_what_one_looks_for_has_a_panel() -> None:
    exact, patterns = own_metrics_named()
    for metric in (
        "reward_mean",
        "kl_per_sequence",
        "sync_time_s",
        "generator_policy_version_lag",
        "policy_tokens_per_s",
        "generator_busy_share",
        "critic_peak_memory_gib",
    ):
        name = f"ray_rlhf_ray_{metric}"
        assert is_metric(name)
        assert name in exact or any(re.fullmatch(pattern, name) for pattern in patterns), metric
    assert any("ray_object_store_memory" in query for query in queries())


# The scripts


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)


@pytest.fixture
def stage(tmp_path: Path) -> dict[str, str]:
    """An environment with stand-ins for rlhf-ray, ray and Slurm, which write down what they were called with."""
    bin_folder = tmp_path / "venv" / "bin"
    bin_folder.mkdir(parents=True)
    program(
        bin_folder,
        "rlhf-ray",
        'echo "$* RAY_ADDRESS=$RAY_ADDRESS" >> "$CALLS/rlhf-ray"\n'
        'if [ -n "${RAY_AUTH_TOKEN_PATH:-}" ]; then cp -p "$RAY_AUTH_TOKEN_PATH" "$CALLS/token"; fi\n'
        'if [ "$MODE" = wait ]; then\n'
        "  trap 'echo saved > \"$CALLS/saved\"; exit ${STOPPED:-143}' TERM\n"
        '  echo ready > "$CALLS/ready"\n'
        "  for _ in $(seq 300); do sleep 0.1; done\n"
        'fi\nexit "${CODE:-0}"\n',
    )
    program(
        bin_folder,
        "scontrol",
        'echo "$*" >> "$CALLS/scontrol"\n'
        'if [ "$MODE $1" = "nodes show" ]; then\n'
        '  echo ready > "$CALLS/ready"\n'
        '  while [ ! -e "$CALLS/sent" ]; do sleep 0.1; done\n'
        "fi\n"
        '[ "$1" = show ] && printf "node1\\nnode2\\n"\nexit 0\n',
    )
    program(bin_folder, "srun", 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    program(
        bin_folder,
        "ray",
        'echo "$*" > "$CALLS/ray"\n'
        'if [ "$MODE" = start ]; then\n'
        '  trap "exit 1" TERM\n'
        '  echo ready > "$CALLS/ready"\n'
        "  for _ in $(seq 300); do sleep 0.1; done\n"
        "fi\n"
        'while [ "$1" != -- ]; do shift; done\nshift\n"$@"\nexit $?\n',
    )
    (tmp_path / "home").mkdir()
    return {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path),
        "CALLS": str(tmp_path),
        "MODE": "",
        "RAY_ADDRESS": "",
        "RLHF_RAY_PID_FILE": str(tmp_path / "pid"),
        "RLHF_RAY_ENV": str(tmp_path / "venv"),
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
    }


def run_script(name: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a script of cluster/, or one anywhere."""
    command = ["bash", str(CLUSTER / name), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_an_entrypoint_starts_a_run_and_then_resumes_it(stage: dict[str, str], tmp_path: Path) -> None:
    runs = tmp_path / "a run"
    assert run_script("run_or_resume.sh", "p.yaml", str(runs), "seed=2", env=stage).returncode == 0
    runs.mkdir()
    (runs / "config.yaml").write_text("")
    assert run_script("run_or_resume.sh", "p.yaml", str(runs), "seed=2", env=stage | {"CODE": "3"}).returncode == 3
    calls = (tmp_path / "rlhf-ray").read_text().splitlines()
    assert calls == [f"run p.yaml run_dir={runs} seed=2 RAY_ADDRESS=", f"resume {runs} RAY_ADDRESS="]
    assert run_script("run_or_resume.sh", "p.yaml", env=stage).returncode == 2


def test_a_driver_is_stopped_and_waited_for(stage: dict[str, str], tmp_path: Path) -> None:
    assert run_script("stop_driver.sh", "5", env=stage).returncode == 0
    command = ["bash", str(CLUSTER / "run_or_resume.sh"), "p.yaml", str(tmp_path / "run")]
    with subprocess.Popen(command, env=stage | {"MODE": "wait"}) as driver:
        wait_for(tmp_path / "ready")
        assert (tmp_path / "pid").read_text().strip() == str(driver.pid)
        with subprocess.Popen(["bash", str(CLUSTER / "stop_driver.sh"), "20"], env=stage) as stopper:
            assert driver.wait(timeout=20) == 143
            assert stopper.wait(timeout=20) == 0
    assert (tmp_path / "saved").exists()
    assert run_script("stop_driver.sh", "5", env=stage).returncode == 0


def test_a_driver_that_stays_is_reported(stage: dict[str, str], tmp_path: Path) -> None:
    with subprocess.Popen(["bash", "-c", 'trap "" TERM; echo > "$CALLS/ready"; sleep 30'], env=stage) as deaf:
        wait_for(tmp_path / "ready")
        (tmp_path / "pid").write_text(str(deaf.pid))
        result = run_script("stop_driver.sh", "1", env=stage)
        deaf.kill()
    assert result.returncode == 1
    assert f"process {deaf.pid} is still there" in result.stderr


def signalled(script: Path, folder: Path, environment: dict[str, str]) -> int:
    """The exit code of a script that gets SIGTERM once its stubs are where it is wanted; they see that it is sent."""
    with subprocess.Popen(["bash", str(script)], env=environment) as job:
        wait_for(folder / "ready")
        job.send_signal(signal.SIGTERM)
        (folder / "sent").touch()
        return job.wait(timeout=30)


def slurm_script(folder: Path, run_dir: str, *, secrets: Sequence[str] = ()) -> Path:
    """A rendered script whose words have spaces and quotes in them."""
    text = batch_script(
        "rlhf-ray-a",
        Nodes(2, 8, 64, 512),
        pipeline="p.yaml",
        overrides=["seed=2", "stop=it's done"],
        run_dir=run_dir,
        environment=str(folder / "venv"),
        version="0.1.0",
        save_s=60,
        secrets=secrets,
    )
    path = folder / "own run.sbatch"
    path.write_text(text)
    return path


def test_slurm_runs_and_passes_the_exit_code_on(stage: dict[str, str], tmp_path: Path) -> None:
    result = run_script("slurm/run.sbatch", env=stage | {"CODE": "1"})
    assert result.returncode == 1, result.stderr
    started = "run pipelines/quickstart.yaml run_dir=/shared/runs/quickstart RAY_ADDRESS=node1:6379\n"
    assert (tmp_path / "rlhf-ray").read_text() == started
    called = shlex.split((tmp_path / "ray").read_text())
    assert called[:5] == ["symmetric-run", "--address", "node1:6379", "--min-nodes", "2"]
    assert "requeue" not in (tmp_path / "scontrol").read_text()
    token = tmp_path / "token"
    assert re.fullmatch(r"[0-9a-f]{64}", token.read_text())
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert list((tmp_path / "home").iterdir()) == []
    assert token.read_text() not in result.stdout + result.stderr + (tmp_path / "ray").read_text()


def test_ray_takes_the_options_of_symmetric_run(stage: dict[str, str], tmp_path: Path) -> None:
    run_script("slurm/run.sbatch", env=stage)
    called = (tmp_path / "ray").read_text().split()
    assert ray_command_problems(called) == []
    kept = curate_and_validate_ray_start_args(called[1 : called.index("--")])
    assert kept == ["--disable-usage-stats", "--metrics-export-port=8080"]


def test_slurm_stops_the_driver_ahead_of_the_limit_requeues_and_resumes(stage: dict[str, str], tmp_path: Path) -> None:
    runs = tmp_path / "a run"
    script = slurm_script(tmp_path, str(runs))
    assert slurm_problems(script.read_text()) == []
    assert signalled(script, tmp_path, stage | {"MODE": "wait"}) == 143
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 77"
    assert list((tmp_path / "home").iterdir()) == []
    runs.mkdir()
    (runs / "config.yaml").write_text("")
    assert run_script(str(script), env=stage).returncode == 0
    calls = (tmp_path / "rlhf-ray").read_text().splitlines()
    assert calls == [
        f"run p.yaml run_dir={runs} seed=2 stop=it's done RAY_ADDRESS=node1:6379",
        f"resume {runs} RAY_ADDRESS=node1:6379",
    ]


def test_slurm_does_not_requeue_a_run_that_was_done_when_it_was_stopped(stage: dict[str, str], tmp_path: Path) -> None:
    assert signalled(CLUSTER / "slurm/run.sbatch", tmp_path, stage | {"MODE": "wait", "STOPPED": "0"}) == 0
    assert "requeue" not in (tmp_path / "scontrol").read_text()


@pytest.mark.parametrize("moment", ["nodes", "start"])
def test_slurm_requeues_what_is_stopped_before_there_is_a_driver(
    moment: str, stage: dict[str, str], tmp_path: Path
) -> None:
    """While Slurm is asked for the nodes, and while Ray starts on them, which then ends with a code of its own."""
    assert signalled(CLUSTER / "slurm/run.sbatch", tmp_path, stage | {"MODE": moment}) == 143
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 77"
    assert not (tmp_path / "rlhf-ray").exists()
    assert list((tmp_path / "home").iterdir()) == []


def test_slurm_requeues_a_driver_that_the_signal_killed(stage: dict[str, str], tmp_path: Path) -> None:
    """It dies of it while it still imports; symmetric-run then ends with -15, which a shell sees as 241."""
    assert signalled(CLUSTER / "slurm/run.sbatch", tmp_path, stage | {"MODE": "wait", "STOPPED": "241"}) == 143
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 77"
    assert run_script("slurm/run.sbatch", env=stage | {"CODE": "241"}).returncode == 241


def test_slurm_forgets_the_driver_of_an_earlier_try(stage: dict[str, str], tmp_path: Path) -> None:
    """Its number may be another process's by now."""
    with subprocess.Popen(["sleep", "30"]) as other:
        (tmp_path / "rlhf-ray-77.pid").write_text(f"{other.pid}\n")
        assert signalled(CLUSTER / "slurm/run.sbatch", tmp_path, stage | {"MODE": "start"}) == 143
        assert other.poll() is None
        other.kill()


def test_slurm_wants_its_secrets(stage: dict[str, str], tmp_path: Path) -> None:
    script = slurm_script(tmp_path, "/runs/a", secrets=["MY_KEY"])
    refused = run_script(str(script), env=stage)
    assert refused.returncode != 0
    assert "MY_KEY: run.sbatch: not set" in refused.stderr
    assert not (tmp_path / "rlhf-ray").exists()
    assert run_script(str(script), env=stage | {"MY_KEY": "sesame"}).returncode == 0


# What `submit` writes


def rendered(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `rlhf-ray submit` prints, called in the repository."""
    with pytest.raises(SystemExit) as stopped:
        main(["submit", *arguments])
    said = capsys.readouterr()
    assert stopped.value.code == 0, said.err
    return said.out


def test_the_slurm_script_is_the_one_that_submit_writes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.prefix", str(REPOSITORY / ".venv"))
    options = "--run-dir /shared/runs/quickstart --cluster 2x4xH100-80 --save-s 240"
    assert rendered(capsys, "pipelines/quickstart.yaml", "--slurm", *options.split()) == (CLUSTER / SLURM).read_text()


def manifest_of(**changes: Any) -> dict[str, Any]:
    """What is rendered for the pipeline in the images."""
    settings: dict[str, Any] = {
        "image": "registry.example.org/rlhf-ray:0.1.0-gpu",
        "claim": "rlhf-ray-runs",
        "ray_version": "2.60.0",
        "save_s": 240,
        "secrets": (),
        "head_variables": {},
        "metadata": {"rlhf_ray": "0.1.0", "pipeline": "quickstart.yaml", "run_dir": "/runs/quickstart"},
    }
    command = "run_or_resume /opt/rlhf_ray/pipelines/quickstart.yaml /runs/quickstart"
    return ray_job("rlhf-ray-quickstart", command, [NodeGroup("gpu", (), Nodes(2, 4, 32, 256))], **settings | changes)


def test_the_manifests_are_those_that_submit_writes() -> None:
    """The spot variant differs in where its pods go, how often it is repeated, and its names."""
    job = manifest_of()
    assert manifest("rayjob.yaml") == job
    assert manifest("raycluster.yaml")["spec"] == job["spec"]["rayClusterSpec"]
    spot = manifest("rayjob-spot.yaml")
    head, (workers,) = (spot["spec"]["rayClusterSpec"][key] for key in ("headGroupSpec", "workerGroupSpecs"))
    for group, removed in ((head, ["nodeSelector"]), (workers, ["nodeSelector", "tolerations"])):
        for key in removed:
            del group["template"]["spec"][key]
    workers["groupName"] = "gpu"
    spot["metadata"] = job["metadata"]
    spot["spec"]["backoffLimit"] = 3
    assert spot == job


RENDERED = {
    "gpus": ("pipelines/quickstart.yaml", "--cluster", "2x4xH100-80"),
    "no_gpus": ("pipelines/quickstart.yaml", "--cluster", "2x16xCPU-64", "--secret", "MY_KEY", "--save-s", "90"),
    "image_and_claim": ("pipelines/ppo_imdb.yaml", "--image", "a.org/b:1", "--volume-claim", "mine", "--secret", "A"),
}


@pytest.mark.parametrize("case", RENDERED)
def test_a_rendered_manifest_is_valid(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert problems("kuberay/rayjob.yaml", rendered(capsys, *RENDERED[case], "--kuberay")) == []


def test_the_small_cluster_of_the_readme_has_no_gpus(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    (cluster,) = re.findall(
        r"with `(--cluster \S+CPU\S+)`\s+the\s+quickstart\s+asks\s+for\s+one\s+pod\s+of\s+8\s+cores", README
    )
    text = rendered(capsys, "pipelines/quickstart.yaml", "--kuberay", *cluster.split())
    (group,) = read_yaml(text)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert (group["replicas"], container["resources"]["limits"]["cpu"]) == (1, "8")
    assert container["image"].endswith("-cpu")
    assert "nvidia.com/gpu" not in text
    text = rendered(capsys, "pipelines/quickstart.yaml", "--kuberay")
    groups = read_yaml(text)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups]
    assert [each["nvidia.com/gpu"] for each in limits if "nvidia.com/gpu" in each] == ["1"] * 5


def test_kuberay_takes_what_is_rendered(
    crds: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    job = read_yaml(rendered(capsys, *RENDERED["no_gpus"], "--kuberay"))
    schema = crds["RayJob"]
    schema["properties"]["metadata"] = {"type": "object"}
    assert schema_problems(job, schema) == []


@pytest.mark.parametrize("name", ["slurm/run.sbatch", "run_or_resume.sh", "stop_driver.sh"])
def test_shellcheck_has_nothing_to_say(name: str) -> None:
    # 2329: a function that a trap calls counts as never called.
    command = [Path(sys.executable).with_name("shellcheck"), "--exclude=SC2329", str(CLUSTER / name)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.stdout == ""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


# README


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def option(words: list[str], name: str) -> str:
    """The value of --name=VALUE or --name VALUE."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == f"--{name}":
            return following
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    raise AssertionError(f"no --{name} in {words}")


def check_entrypoint(words: list[str]) -> None:
    program, pipeline, run_dir, *overrides = words
    assert program == "run_or_resume"
    assert pipeline_problems(pipeline, [f"run_dir={run_dir}", *overrides]) == []


def manifest(name: str) -> Any:
    return read_yaml((CLUSTER / "kuberay" / name).read_text())


def check_docker(words: list[str]) -> None:
    if words[1] == "build":
        assert words[-1] == "."
        assert (REPOSITORY / option(words, "file")).is_file()
        return
    assert words[1] == "run"
    built = [option(shlex.split(line), "tag") for line in commands() if line.startswith("docker build")]
    (place,) = [index for index, word in enumerate(words) if word in built]
    assert "--shm-size=4g" in words[:place]
    if words[place + 1] == "run_or_resume":
        check_entrypoint(words[place + 1 :])
    else:
        assert words[place + 1 :] == ["rlhf-ray", "doctor"]


def check_ray(words: list[str]) -> None:
    words = words[: words.index(">")] if ">" in words else words
    assert ray_command_problems(words[1:]) == []
    if words[1] in ("up", "down", "dashboard"):
        assert problems(words[-1].removeprefix("cluster/"), (REPOSITORY / words[-1]).read_text()) == []
    if words[1] == "job":
        assert option(words, "address") == "http://127.0.0.1:8265"
        if words[2] == "submit":
            check_entrypoint(words[words.index("--") + 1 :])


def check_kubectl(words: list[str]) -> None:
    job, stays = manifest("rayjob.yaml"), manifest("raycluster.yaml")
    match words[1:]:
        case ["create", "secret", "generic", secret, file]:
            key = option([file], "from-file").split("=")[0]
            spec = job["spec"]["rayClusterSpec"]
            keys = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
            known = {(spec["authOptions"]["secretName"], "auth_token")}
            known |= {(e["valueFrom"]["secretKeyRef"]["name"], e["valueFrom"]["secretKeyRef"]["key"]) for e in keys[1:]}
            assert (secret, key) in known
        case ["apply" | "delete", "--filename", file]:
            written = [line.split(" > ")[1] for line in commands() if line.startswith("rlhf-ray submit")]
            assert file in written or (REPOSITORY / file).is_file()
        case ["get", "rayjob", name, "--watch"]:
            assert name == job["metadata"]["name"]
        case ["logs", "--follow", name]:
            assert name == f"job/{job['metadata']['name']}"
        case ["wait", condition, name, "--timeout=15m"]:
            assert condition == "--for=jsonpath={.status.state}=ready"
            assert name == f"raycluster/{stays['metadata']['name']}"
        case ["port-forward", service, "8265:8265"]:
            assert service == f"service/{stays['metadata']['name']}-head-svc"
        case _:
            raise AssertionError(words)


def check_sbatch(words: list[str]) -> None:
    assert words[-1] == "run.sbatch"
    options = re.findall(r"^#SBATCH --([a-z-]+)", (CLUSTER / SLURM).read_text(), flags=re.MULTILINE)
    known = {*options, "partition"}
    assert all(re.fullmatch(r"--([a-z-]+)=\S+", word) and word[2:].split("=")[0] in known for word in words[1:-1])


def check_submit(words: list[str]) -> None:
    """`rlhf-ray submit FILE --kuberay > NAME` writes a valid file of that kind."""
    target = words[words.index(">") + 1]
    checked = {"rayjob.yaml": kubernetes_problems, "run.sbatch": slurm_problems}[target]
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit) as stopped:
        main(words[1 : words.index(">")])
    assert stopped.value.code == 0
    assert checked(printed.getvalue()) == []


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_readme_is_one(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    match words:
        case ["docker", *_]:
            check_docker(words)
        case ["ray", *_]:
            check_ray(words)
        case ["kubectl", *_]:
            check_kubectl(words)
        case ["sbatch", *_]:
            check_sbatch(words)
        case ["rlhf-ray", "submit", *_]:
            monkeypatch.chdir(REPOSITORY)
            check_submit(words)
        case ["prometheus", *_]:
            assert (REPOSITORY / option(words, "config.file")).is_file()
            assert option(words, "web.listen-address").startswith("127.0.0.1:")
        case _:
            others = (
                "export RAY_AUTH_MODE=token",
                "chmod 600 $HOME/.ray/auth_token",
                "scancel --batch --signal=TERM 12345",
            )
            assert line in others


def test_the_readme_names_what_there_is() -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link]
    assert [link for link in links if not (CLUSTER / link).exists()] == []
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    known = {setting.key for part in (Pipeline, *METHODS.values()) for setting in list_settings(part)}
    named = [
        span for span in spans if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", span) and not span.endswith((".jsonl", ".io"))
    ]
    assert "checkpoints.every" in named
    assert set(named) <= known
    own = [span.split()[1] for span in spans if span.startswith("rlhf-ray ")]
    assert set(own) <= {command.name for command in app.registered_commands}
    assert all(is_metric(span) for span in spans if span.startswith("ray_rlhf_ray_"))


def test_the_headers_of_the_files_name_themselves() -> None:
    for name in FILES:
        for file in re.findall(r"\bcluster/[\w./-]+\.(?:yaml|sbatch|gpu|cpu)\b", (CLUSTER / name).read_text()):
            assert (REPOSITORY / file).is_file(), (name, file)
