import errno
import io
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Rollouts, make_sequences, one_version
from rlhf_ray.distributed.tracing import Recorder, Span
from rlhf_ray.errors import CheckpointError, ConfigError, DataError, Interrupted
from rlhf_ray.trainers.metric_rows import read_metrics
from rlhf_ray.trainers.model_card import write_model_card
from rlhf_ray.trainers.run import RunFolder, StageRun, is_better
from rlhf_ray.trainers.view import PlainView


def settings(**changes: object) -> schema.Ppo:
    values = {
        "method": "ppo",
        "iterations": 6,
        "policy": {"model": "org/base"},
        "reward": [{"kind": "function", "function": "a:b", "arguments": {"api_key": "sk-secret"}}],
        "data": {"train": "x.jsonl"},
        "checkpoints": {"every": 2, "keep": 2, "best": "evaluation/reward_mean"},
    }
    return schema.Ppo.model_validate(values | changes)


class Counter:
    """A trainer whose whole state is a sum: iteration i adds i."""

    def __init__(self) -> None:
        self.weights = 0
        self.coefficient = 1.0

    def state(self):
        return {"coefficient": self.coefficient}

    def load_state(self, state):
        self.coefficient = state["coefficient"]

    def save(self, folder: Path) -> None:
        (folder / "weights.json").write_text(json.dumps(self.weights))

    def load(self, folder: Path) -> None:
        self.weights = json.loads((folder / "weights.json").read_text())

    def save_model(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"weights": self.weights}))


def rollouts(iteration: int, ids=(0, 1)) -> Rollouts:
    sequences = make_sequences([[1]] * len(ids), [[2, 3]] * len(ids))
    return Rollouts(
        sequences=sequences,
        generator_logprobs=torch.zeros(sequences.tokens.shape),
        finished=torch.ones(len(ids), dtype=torch.bool),
        prompts=[f"prompt {i}" for i in ids],
        responses=[f"response {i} of {iteration}" for i in ids],
        answers=[None] * len(ids),
        prompt_ids=torch.tensor(ids),
        policy_versions=one_version(sequences, max(iteration - 1, 0)),
    )


def train(folder: RunFolder, config: schema.Ppo, counter: Counter, *, during=None, recorder=None, out=None):
    """The loop of a trainer; `during(iteration)` runs in the middle of each iteration."""
    recorder = recorder or Recorder()
    view = PlainView(config.name, config.iterations, recorder, unit="iteration", out=out or io.StringIO())
    run = StageRun(
        folder, config, total=config.iterations, seed=1, tracking=schema.Tracking(), recorder=recorder, view=view
    )
    with run:
        run.start_or_resume(counter)
        if run.iteration == 0:
            with run.evaluating():
                run.write_evaluation(rollouts(0), iteration=0, scores=torch.zeros(2))
                run.record({"evaluation/reward_mean": 0.0})
        for iteration in run.remaining():
            counter.weights += iteration
            counter.coefficient *= 1.1
            run.write_rollouts(rollouts(iteration), scores=torch.ones(2))
            if during:
                during(iteration)
            metrics = {"reward/mean": float(counter.weights), "kl/coefficient": counter.coefficient}
            if run.evaluation_due(iteration, every=3):
                with run.evaluating():
                    run.write_evaluation(rollouts(iteration), iteration=iteration, scores=torch.ones(2))
                    metrics["evaluation/reward_mean"] = float(counter.weights)
            run.finish_iteration(metrics)
        return run.finish()


def learnt(run_dir: Path) -> list[dict[str, object]]:
    rows = read_metrics(run_dir)
    return [{name: value for name, value in row.items() if not name.startswith(("time/", "driver/"))} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[dict[str, object]]:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    with RunFolder.create(run_dir, {"config.yaml": "seed: 1\n"}) as folder:
        train(folder, settings(), Counter())
    return learnt(run_dir)


def test_a_whole_stage(tmp_path):
    run_dir = tmp_path / "run"
    out = io.StringIO()
    with RunFolder.create(run_dir, {"config.yaml": "seed: 1\n"}) as folder:
        assert folder.result("ppo") is None
        result = train(folder, settings(), Counter(), out=out)
        assert folder.result("ppo") == result
        assert folder.result("ppo", total=6) == result
        assert folder.result("ppo", total=7) is None
    assert result.output == run_dir / "ppo" / "model"
    assert result.before == {"evaluation/reward_mean": 0.0}
    assert result.after == {"evaluation/reward_mean": 21.0}
    assert json.loads((result.output / "config.json").read_text()) == {"weights": 21}
    assert (run_dir / "config.yaml").read_text() == "seed: 1\n"
    assert [row["iteration"] for row in read_metrics(run_dir, "ppo")] == [0, 1, 2, 3, 4, 5, 6]
    assert [row["reward/mean"] for row in read_metrics(run_dir)[1:]] == [1, 3, 6, 10, 15, 21]
    assert all(row["time/iteration_s"] > 0 for row in read_metrics(run_dir)[1:])
    assert "time/checkpoint_s" in read_metrics(run_dir)[3]
    stage = run_dir / "ppo"
    assert sorted(p.name for p in (stage / "checkpoints").iterdir()) == ["iteration_000004", "iteration_000006"]
    assert len(list((stage / "rollouts").glob("iteration_*.parquet"))) == 6
    assert sorted(p.name for p in (stage / "evaluation").iterdir()) == [
        "iteration_000000.parquet",
        "iteration_000003.parquet",
        "iteration_000006.parquet",
    ]
    text = out.getvalue()
    assert "reward mean: 0.000 before, 21.000 after" in text
    assert "response 1 of 0" in text
    assert "response 1 of 6" in text
    assert str(result.output) in text


def test_the_model_card(tmp_path):
    with RunFolder.create(tmp_path / "run", {"config.yaml": ""}) as folder:
        result = train(folder, settings(), Counter())
    card = (result.output / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "transformers"
    assert front["base_model"] == "org/base"
    assert "ppo" in front["tags"]
    assert "| `evaluation/reward_mean` | 0 | 21 |" in body
    assert "prompts_per_iteration: 64" in body
    assert "sk-secret" not in card
    assert "time/" not in body


@pytest.mark.parametrize(("kind", "words"), [("sigmoid", "by DPO on preferences"), ("orpo", "by ORPO on preferences")])
def test_the_model_card_names_the_preference_loss(tmp_path, kind, words):
    write_model_card(
        tmp_path,
        title="run: dpo",
        method="dpo",
        base_model="org/base",
        settings={"loss": {"kind": kind}},
        before={},
        after={},
    )
    assert f"Trained with rlhf_ray {words} from `org/base`." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("killed_in", [1, 2, 3, 4, 5, 6])
def test_a_kill_anywhere_and_a_resume_give_the_undisturbed_run(tmp_path, killed_in, undisturbed):
    class Killed(BaseException):
        pass

    def kill(iteration):
        if iteration == killed_in:
            raise Killed

    config, run_dir = settings(), tmp_path / "run"
    with pytest.raises(Killed), RunFolder.create(run_dir, {"config.yaml": "seed: 1\n"}) as folder:
        train(folder, config, Counter(), during=kill)
    with RunFolder.open(run_dir) as folder:
        result = train(folder, config, Counter())
    assert learnt(run_dir) == undisturbed
    assert json.loads((result.output / "config.json").read_text()) == {"weights": 21}
    assert result.before == {"evaluation/reward_mean": 0.0}


def test_a_failing_checkpoint_is_no_lost_run(tmp_path, undisturbed):
    config, run_dir = settings(), tmp_path / "run"

    class Full(Counter):
        def save(self, folder: Path) -> None:
            if self.weights > 3:
                (folder / "half").write_text("x")
                raise OSError("no space left on device")
            super().save(folder)

    with pytest.raises(OSError, match="no space"), RunFolder.create(run_dir, {"config.yaml": ""}) as folder:
        train(folder, config, Full())
    assert [p.name for p in (run_dir / "ppo" / "checkpoints").iterdir() if not p.suffix] == ["iteration_000002"]
    with RunFolder.open(run_dir) as folder:
        train(folder, config, Counter())
    assert learnt(run_dir) == undisturbed


def test_a_run_that_died_while_ending_only_ends(tmp_path):
    class Dies(Counter):
        def save_model(self, folder: Path) -> None:
            if self.weights == 21 and "model" in folder.name:
                raise OSError("no space left on device")
            super().save_model(folder)

    run_dir = tmp_path / "run"
    with pytest.raises(OSError, match="no space"), RunFolder.create(run_dir, {"config.yaml": ""}) as folder:
        train(folder, settings(), Dies())

    def never(iteration):
        raise AssertionError(f"iteration {iteration} was done already")

    with RunFolder.open(run_dir) as folder:
        assert folder.result("ppo") is None
        result = train(folder, settings(), Counter(), during=never)
    assert result.after == {"evaluation/reward_mean": 21.0}
    assert "| `reward/mean` |  | 21 |" in (result.output / "README.md").read_text()


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_stop_request_ends_the_iteration_and_saves(tmp_path, number, exit_code, undisturbed):
    before = signal.getsignal(number)
    config, run_dir, out = settings(), tmp_path / "run", io.StringIO()

    def stop(iteration):
        if iteration == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as raised, RunFolder.create(run_dir, {"config.yaml": ""}) as folder:
        train(folder, config, Counter(), during=stop, out=out)
    assert raised.value.exit_code == exit_code
    assert "stopped after iteration 3 of 6" in str(raised.value)
    assert f"rlhf-ray resume {run_dir}" in str(raised.value)
    assert "finishing iteration 3, then saving" in out.getvalue()
    assert (run_dir / "ppo" / "checkpoints" / "iteration_000003").is_dir()
    assert signal.getsignal(number) == before
    with RunFolder.open(run_dir) as folder:
        train(folder, config, Counter())
    assert learnt(run_dir) == undisturbed


def test_the_second_stop_request_stops_at_once(tmp_path, undisturbed):
    run_dir, config = tmp_path / "run", settings()

    def stop_twice(iteration):
        if iteration == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    with pytest.raises(Interrupted, match=r"stopped at once.*saved at iteration 2") as raised:
        with RunFolder.create(run_dir, {"config.yaml": ""}) as folder:
            train(folder, config, Counter(), during=stop_twice)
    assert raised.value.exit_code == 130
    with RunFolder.open(run_dir) as folder:
        train(folder, config, Counter())
    assert learnt(run_dir) == undisturbed


def test_before_the_workers_are_ready_the_first_request_stops_at_once(tmp_path):
    def set_up_and_stop():
        with RunFolder.create(tmp_path / "run", {"config.yaml": ""}) as folder:
            with StageRun(folder, settings(), total=6, seed=1, tracking=schema.Tracking(), recorder=Recorder()):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)

    with pytest.raises(Interrupted, match="starts anew") as raised:
        set_up_and_stop()
    assert raised.value.exit_code == 143


def test_a_stop_in_the_last_iteration_leaves_the_end_to_resume(tmp_path):
    run_dir = tmp_path / "run"

    def stop(iteration):
        if iteration == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted), RunFolder.create(run_dir, {"config.yaml": ""}) as folder:
        train(folder, settings(), Counter(), during=stop)
    with RunFolder.open(run_dir) as folder:
        assert train(folder, settings(), Counter()).after == {"evaluation/reward_mean": 21.0}


def test_the_best_model_is_kept(tmp_path):
    config, run_dir = settings(iterations=2), tmp_path / "run"
    recorder, counter = Recorder(), Counter()
    view = PlainView("ppo", 2, recorder, unit="iteration", out=io.StringIO())
    with RunFolder.create(run_dir, {"config.yaml": ""}) as folder:
        with StageRun(folder, config, total=4, seed=1, tracking=schema.Tracking(), recorder=recorder, view=view) as run:
            run.start_or_resume(counter)
            for iteration, value in zip(run.remaining(), (1.0, 5.0, float("nan"), 5.0), strict=False):
                counter.weights = iteration
                run.finish_iteration({"evaluation/reward_mean": value})
            result = run.finish()
    assert json.loads((result.best / "config.json").read_text()) == {"weights": 2}
    best = json.loads((result.best / "best.json").read_text())
    assert best == {"metric": "evaluation/reward_mean", "value": 5.0, "iteration": 2}
    assert json.loads((result.output / "config.json").read_text()) == {"weights": 4}


def test_losses_are_minimised():
    assert is_better("evaluation/loss", 1.0, 2.0)
    assert is_better("evaluation/perplexity", 1.0, 2.0)
    assert is_better("evaluation/reward_mean", 2.0, 1.0)
    assert not is_better("evaluation/reward_mean", 1.0, 1.0)
    assert is_better("evaluation/loss", 9.0, None)


def test_a_best_metric_that_no_evaluation_gives_is_named(tmp_path):
    config = settings(checkpoints={"best": "evaluation/accuracy"})
    with pytest.raises(ConfigError, match=r"ppo\.checkpoints\.best: got evaluation/accuracy.*evaluation/reward_mean"):
        with RunFolder.create(tmp_path / "run", {"config.yaml": ""}) as folder:
            train(folder, config, Counter())


def test_other_settings_are_refused_on_resume(tmp_path):
    run_dir = tmp_path / "run"
    with RunFolder.create(run_dir, {"config.yaml": ""}) as folder:
        train(folder, settings(), Counter())
    with pytest.raises(CheckpointError, match=r"prompts_per_iteration: was 64, is 32"):
        with RunFolder.open(run_dir) as folder:
            train(folder, settings(prompts_per_iteration=32), Counter())


def test_a_finished_stage_can_be_prolonged(tmp_path):
    run_dir = tmp_path / "run"
    with RunFolder.create(run_dir, {"config.yaml": ""}) as folder:
        train(folder, settings(iterations=4), Counter())
    with RunFolder.open(run_dir) as folder:
        assert folder.result("ppo", total=6) is None
        result = train(folder, settings(iterations=6), Counter())
    assert json.loads((result.output / "config.json").read_text()) == {"weights": 21}
    assert [row["iteration"] for row in read_metrics(run_dir)] == [0, 1, 2, 3, 4, 5, 6]


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    run_dir = tmp_path / "run"
    RunFolder.create(run_dir, {"config.yaml": "seed: 1\n"}).close()
    with pytest.raises(ConfigError, match=f"holds another run; go on with it by  rlhf-ray resume {run_dir}"):
        RunFolder.create(run_dir, {"config.yaml": "seed: 2\n"})
    assert (run_dir / "config.yaml").read_text() == "seed: 1\n"


def test_resume_of_nothing_is_a_mistake_of_the_user(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        RunFolder.open(tmp_path / "absent")
    with pytest.raises(ConfigError, match="holds no run"):
        RunFolder.open(tmp_path)


def test_a_run_dir_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder.create(tmp_path / "file", {"config.yaml": ""})
    with pytest.raises(ConfigError, match="cannot be made"):
        RunFolder.create(tmp_path / "file" / "below", {"config.yaml": ""})


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    with RunFolder.create(tmp_path / "run", {"config.yaml": ""}):
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on .* is working in"):
            RunFolder.open(tmp_path / "run")
    RunFolder.open(tmp_path / "run").close()


def test_a_mistake_before_anything_was_done_leaves_no_run_behind(tmp_path):
    (tmp_path / "run" / "logs").mkdir(parents=True)

    def make_and_fail():
        with RunFolder.create(tmp_path / "run", {"config.yaml": "seed: 1\n"}) as folder:
            (folder.stage("sft") / "initial_model").mkdir(parents=True)
            raise DataError("x.jsonl:3: not JSON")

    with pytest.raises(DataError):
        make_and_fail()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "logs"]
    RunFolder.create(tmp_path / "run", {"config.yaml": "seed: 2\n"}).close()


def test_a_mistake_after_the_first_iteration_leaves_the_run(tmp_path):
    def mistake(iteration):
        if iteration == 2:
            raise DataError("x.jsonl:3: not JSON")

    with pytest.raises(DataError), RunFolder.create(tmp_path / "run", {"config.yaml": ""}) as folder:
        train(folder, settings(), Counter(), during=mistake)
    with RunFolder.open(tmp_path / "run") as folder:
        train(folder, settings(), Counter())


def test_without_held_out_prompts_there_is_no_row_before_the_first_iteration(tmp_path):
    recorder = Recorder()
    view = PlainView("ppo", 1, recorder, unit="iteration", out=io.StringIO())
    with RunFolder.create(tmp_path / "run", {"config.yaml": ""}) as folder:
        with StageRun(
            folder, settings(), total=1, seed=1, tracking=schema.Tracking(), recorder=recorder, view=view
        ) as run:
            run.start_or_resume(Counter())
            run.record({})
            run.finish_iteration({"reward/mean": 1.0})
    assert [row["iteration"] for row in read_metrics(tmp_path / "run")] == [1]


def test_any_other_failure_leaves_a_run_to_resume(tmp_path):
    with pytest.raises(RuntimeError), RunFolder.create(tmp_path / "run", {"config.yaml": "seed: 1\n"}):
        raise RuntimeError("out of memory")
    RunFolder.open(tmp_path / "run").close()


def test_a_model_that_is_gone_is_named(tmp_path):
    with RunFolder.create(tmp_path / "run", {"config.yaml": ""}) as folder:
        result = train(folder, settings(), Counter())
        (result.output / "config.json").unlink()
        with pytest.raises(CheckpointError, match="is gone"):
            folder.result("ppo")


def test_an_adapter_is_a_result_too(tmp_path):
    with RunFolder.create(tmp_path / "run", {"config.yaml": ""}) as folder:
        result = train(folder, settings(), Counter())
        (result.output / "config.json").rename(result.output / "adapter_config.json")
        assert folder.result("ppo") == result


def test_what_an_evaluation_calls_is_no_training_time(tmp_path):
    recorder = Recorder()

    def generate(seconds: float) -> None:
        span = Span("generator", 0, "generate", 0.0, seconds, tokens=4)
        recorder.finish(recorder.begin("generator", "generate"), [span])

    view = PlainView("ppo", 1, recorder, unit="iteration", out=io.StringIO())
    with RunFolder.create(tmp_path / "run", {"config.yaml": ""}) as folder:
        with StageRun(
            folder, settings(), total=1, seed=1, tracking=schema.Tracking(), recorder=recorder, view=view
        ) as run:
            run.start_or_resume(Counter())
            generate(2.0)
            run.write_rollouts(rollouts(1), scores=torch.zeros(2))
            with run.evaluating():
                generate(100.0)
            run.finish_iteration({})
    (row,) = read_metrics(tmp_path / "run")
    assert row["time/generate_s"] == 2.0
    assert row["generator/tokens_per_s"] == 2.0
    assert row["time/evaluation_s"] < 2.0


def test_samples_are_written_meanwhile_and_there_when_the_iteration_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning = threading.Event()
    order: list[str] = []

    def write(*args: object, **kwargs: object) -> None:
        assert learning.wait(timeout=60)
        order.append("written")

    class Rows:
        def write(self, iteration: int, metrics: object) -> None:
            order.append(f"row {iteration}")

        def flush(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr("rlhf_ray.trainers.run.write_rollouts", write)
    with RunFolder.create(tmp_path / "run", {"config.yaml": ""}) as folder:
        view = PlainView("ppo", 1, Recorder(), unit="iteration", out=io.StringIO())
        with StageRun(
            folder,
            settings(),
            total=1,
            seed=1,
            tracking=schema.Tracking(),
            recorder=Recorder(),
            trackers=[Rows()],
            view=view,
        ) as run:
            run.start_or_resume(Counter())
            run.write_rollouts(rollouts(1), scores=torch.zeros(2))
            learning.set()
            run.finish_iteration({})
    assert order == ["written", "row 1"]


def test_samples_that_cannot_be_written_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, *args: object, **kwargs: object) -> None:
        if path.parent.name == "rollouts":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rlhf_ray.trainers.run.write_rollouts", write)
    with RunFolder.create(tmp_path / "run", {"config.yaml": ""}) as folder, pytest.raises(OSError, match="No space"):
        train(folder, settings(), Counter())
    assert [row["iteration"] for row in learnt(tmp_path / "run")] == [0]


def test_a_disk_that_does_not_answer_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()

    def write(path: Path, *args: object, **kwargs: object) -> None:
        assert path.parent.name != "rollouts" or answers.wait(timeout=60)

    monkeypatch.setattr("rlhf_ray.trainers.run.write_rollouts", write)
    monkeypatch.setattr("rlhf_ray.trainers.run._WRITE_TIMEOUT_S", 0.05)
    message = r"rollouts/iteration_000001\.parquet: not written within 0\.05 s; is its disk still there"
    with RunFolder.create(tmp_path / "run", {"config.yaml": ""}) as folder:
        with pytest.raises(CheckpointError, match=message):
            train(folder, settings(), Counter())
        answers.set()
