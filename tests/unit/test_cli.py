"""Commands, exit codes and what they print; the pipeline itself is a small fake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from rlhf_ray import doctor
from rlhf_ray.cli import main
from rlhf_ray.config.load import load_pipeline, run_files
from rlhf_ray.config.schema import Pipeline
from rlhf_ray.errors import DataError, Interrupted, WorkerError
from rlhf_ray.trainers.run import RunFolder

PIPELINE = """\
run_dir: runs/test
stages:
  - method: sft
    policy: {model: {size: tiny}}
    data: {train: "synthetic:reviews"}
  - method: ppo
    iterations: 10
    policy: {model: "stage:sft"}
    reward: [{kind: function, function: "rewards:length"}]
    data: {train: "synthetic:reviews", max_prompt_tokens: 32}
"""


class FakePipeline:
    """Stands for rlhf_ray.pipeline and plan: notes its calls, and fails as asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Pipeline, Path, bool]] = []
        self.action: Callable[[], object] = lambda: None

    def run_pipeline(self, config: Pipeline, *, pipeline_dir: Path, resume: bool) -> None:
        self.calls.append((config, pipeline_dir, resume))
        self.action()

    def check_data(self, config: Pipeline) -> dict[str, dict[str, int]]:
        self.action()
        return {"sft": {"train": 5, "evaluation": 2}, "ppo": {"train": 7, "evaluation": 0}}


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    fake, module = FakePipeline(), ModuleType("rlhf_ray.pipeline")
    module.__dict__.update(run_pipeline=fake.run_pipeline)
    monkeypatch.setitem(sys.modules, "rlhf_ray.pipeline", module)
    monkeypatch.setattr("rlhf_ray.plan.check_data", fake.check_data)
    return fake


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rewards.py").write_text("def length(prompts, responses, answers):\n    return []\n")
    (tmp_path / "test.yaml").write_text(PIPELINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code


def fails(error: BaseException) -> Callable[[], object]:
    def action() -> object:
        raise error

    return action


def test_run_hands_over_the_pipeline_with_its_overrides(folder: Path, pipeline: FakePipeline) -> None:
    assert code("run", "test.yaml", "seed=7", "ppo.sampling.temperature=0.7") == 0
    ((config, pipeline_dir, resume),) = pipeline.calls
    assert config == load_pipeline("test.yaml", ["seed=7", "ppo.sampling.temperature=0.7"])
    assert (pipeline_dir, resume) == (folder, False)
    assert not (folder / "runs").exists()


def test_run_refuses_the_folder_of_another_run(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    RunFolder.create("runs/test", run_files(load_pipeline("test.yaml"), pipeline_dir=folder)).close()
    assert code("run", "test.yaml") == 2
    assert "rlhf-ray resume runs/test" in capsys.readouterr().err
    assert pipeline.calls == []


def test_resume_goes_on_where_the_run_was_started(
    folder: Path, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = load_pipeline("test.yaml", ["seed=7"])
    RunFolder.create(config.run_dir, run_files(config, pipeline_dir=folder)).close()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert code("resume", str(folder / "runs" / "test")) == 0
    expected = config.model_copy(update={"run_dir": str(folder / "runs" / "test")})
    assert pipeline.calls == [(expected, folder, True)]
    assert Path.cwd() == folder


@pytest.mark.parametrize(
    ("name", "words"), [("nowhere", "is not a folder"), (".", "holds no run"), ("test.yaml", "not a pipeline file")]
)
def test_resume_wants_a_run(
    name: str, words: str, folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code("resume", name) == 2
    assert words in capsys.readouterr().err


def test_check_sums_the_stages_up(folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert code("check", "test.yaml", "ppo.sampling.top_k=5") == 0
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        "ok: test.yaml, 2 stages",
        "  sft (sft): a fresh tiny llama, 1 epochs in batches of 32 -> runs/test/sft/model",
        "    5 rows of train data, 2 rows of evaluation data",
        "  ppo (ppo): stage:sft, 10 iterations of 64 samples, gae -> runs/test/ppo/model",
        "    7 rows of train data",
    ]
    assert "warning: ppo.sampling: with top_k" in output.err


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_reward_function_is_tried_before_anything_starts(
    command: str, folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "other_rewards.py").write_text("def length(texts):\n    return []\n")
    assert code(command, "test.yaml", "ppo.reward.0.function=other_rewards:length") == 2
    assert "its signature is (texts)" in capsys.readouterr().err
    assert pipeline.calls == []


@pytest.mark.parametrize(
    ("error", "exit_code", "words"),
    [
        (DataError("rows.jsonl:3: the prompt is empty"), 2, "rows.jsonl:3: the prompt is empty"),
        (WorkerError("policy rank 1 died in update"), 1, "WorkerError: policy rank 1 died in update"),
        (Interrupted("go on with: rlhf-ray resume x", exit_code=130), 130, "go on with: rlhf-ray resume x"),
        (Interrupted("go on with: rlhf-ray resume x", exit_code=143), 143, "go on with: rlhf-ray resume x"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(
    error: BaseException,
    exit_code: int,
    words: str,
    folder: Path,
    pipeline: FakePipeline,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipeline.action = fails(error)
    assert code("run", "test.yaml") == exit_code
    assert [line for line in capsys.readouterr().err.splitlines() if "warning" not in line] == [words]


def test_an_unexpected_error_keeps_its_traceback(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.action = fails(ZeroDivisionError("one by zero"))
    assert code("run", "test.yaml") == 1
    assert "ZeroDivisionError: one by zero" in capsys.readouterr().err


def test_the_traceback_of_a_named_error_on_request(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_RAY_DEBUG", "1")
    pipeline.action = fails(WorkerError("died"))
    assert code("run", "test.yaml") == 1
    assert "Traceback" in capsys.readouterr().err


def test_sigterm_exits_143_and_the_signal_is_given_back(folder: Path, pipeline: FakePipeline) -> None:
    before = signal.getsignal(signal.SIGTERM)
    pipeline.action = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert code("run", "test.yaml") == 143
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("arguments", [("rnu", "test.yaml"), ("run",), ("run", "test.yaml", "--sede", "3")])
def test_a_wrong_command_line_exits_2(arguments: tuple[str, ...], folder: Path) -> None:
    assert code(*arguments) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert code("--version") == 0
    assert capsys.readouterr().out.startswith("rlhf-ray 0.")


def test_python_m_rlhf_ray_is_rlhf_ray() -> None:
    done = subprocess.run([sys.executable, "-m", "rlhf_ray", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout[:11]) == (0, "rlhf-ray 0.")


def test_settings_as_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert code("settings", "--plain") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.count("\t") == 4 for line in lines)
    keys = {tuple(line.split("\t")[:2]) for line in lines}
    assert {("pipeline", "placement.address"), ("sft", "epochs"), ("ppo", "kl.target")} <= keys


@pytest.mark.parametrize(
    ("method", "present", "absent"),
    [
        ("ppo", "kl.target = unset", "train_on_prompt"),
        ("ppo.kl", "kl.target = unset", "sampling"),
        ("sft", "steps", "kl."),
        ("reward_model", "answer_marker", "train_on_prompt"),
    ],
)
def test_settings_of_a_method(method: str, present: str, absent: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code("settings", method) == 0
    output = capsys.readouterr().out
    assert present in output
    assert absent not in output


@pytest.mark.parametrize(("method", "near"), [("pppo", "`ppo`"), ("ppo.kll", "`kl`")])
def test_settings_of_what_is_not_there(method: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code("settings", method) == 2
    assert near in capsys.readouterr().err


def test_doctor_exits_1_where_something_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = doctor.Finding("missing", "ray", "not installed", "pip install ray")
    monkeypatch.setattr(doctor, "examine", lambda: [missing])
    assert code("doctor") == 1
    assert "-> pip install ray" in capsys.readouterr().out


def test_doctor_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert code("doctor") in (0, 1)
    output = capsys.readouterr().out
    assert all(name in output for name in ("torch", "ray", "vllm", "CPU cores", "memory", "/dev/shm", "GPUs"))


def test_run_refuses_an_old_library_before_it_starts(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "FLOORS", (doctor.Floor("ray", "99.1"),))
    assert code("run", "test.yaml") == 2
    assert "wanted >=99.1; install it: pip install 'ray>=99.1'" in capsys.readouterr().err
    assert pipeline.calls == []
