"""A run's folder and the course of one stage in it: start or resume, iterations, checkpoints, stop requests, result.

    with RunFolder.create(run_dir, files) as folder:                     # `RunFolder.open(run_dir)` to resume
        with StageRun(folder, stage, total=200, seed=1, tracking=tracking, recorder=recorder) as run:
            run.start_or_resume(parts)                                   # parts: how workers save and load, see `Parts`
            if run.iteration == 0:
                with run.evaluating():
                    run.record(metrics_before)
            for iteration in run.remaining():                            # 1, 2, ..., or from where it stopped
                run.write_rollouts(rollouts, scores=scores, parts=parts, kl=kl)
                metrics = learn(...)
                if run.evaluation_due(iteration, every=10):
                    with run.evaluating():
                        metrics |= evaluate(...)
                run.finish_iteration(metrics)                            # logs, keeps, stops when asked to
            result = run.finish()                                        # model/ and its card, done.json, the summary

The folder:

    config.yaml  metrics.jsonl  trace.json  tensorboard/
    <stage>/rollouts/iteration_000001.parquet     every sample
    <stage>/evaluation/iteration_000000.parquet   every sample of an evaluation
    <stage>/evaluation/preferences_000060.json    what the scores of held-out pairs say
    <stage>/checkpoints/iteration_000010/
    <stage>/best/  <stage>/model/                 Hugging Face directories
    <stage>/data/part_000001.parquet              what a collect stage keeps, instead of a model
    <stage>/done.json                             written last
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from rlhf_ray.config import schema
from rlhf_ray.config.paths import ADAPTER_CONFIG
from rlhf_ray.data.arrow import PARTS
from rlhf_ray.data.batches import Rollouts
from rlhf_ray.distributed.faults import fault
from rlhf_ray.distributed.tracing import DRIVER, Recorder, Span
from rlhf_ray.errors import CheckpointError, ConfigError, Interrupted, UserError
from rlhf_ray.shapes import SequenceFloat
from rlhf_ray.trainers.checkpoints import (
    CheckpointHandle,
    Checkpoints,
    RunState,
    check_settings,
    folder_name,
    result_settings,
)
from rlhf_ray.trainers.durable import recover_folder, remove_folder, write_folder, write_text
from rlhf_ray.trainers.journal import read_rollouts, write_rollouts
from rlhf_ray.trainers.metric_rows import FILE as METRICS
from rlhf_ray.trainers.metric_rows import read_metrics
from rlhf_ray.trainers.metrics import MetricLog, Number, Tracker
from rlhf_ray.trainers.model_card import write_model_card
from rlhf_ray.trainers.preference_report import PreferenceReport, report_tables, write_report
from rlhf_ray.trainers.timing import Stopwatch, span_metrics
from rlhf_ray.trainers.trace import FILE as TRACE
from rlhf_ray.trainers.trace import TraceFile
from rlhf_ray.trainers.view import SamplePair, Summary, Unit, View, open_view

CONFIG = "config.yaml"
MODEL = "model"
DATA = "data"
DONE = "done.json"
BEST = "best.json"
SHOWN_SAMPLES = 3
_MINIMISED = ("loss", "perplexity", "error")


class Parts(Protocol):
    """What a trainer lends to its run: how its workers' state and its own are written and read."""

    def state(self) -> dict[str, Any]:
        """The trainer's own state as JSON, such as the KL controller's `state_dict`."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave."""

    def save(self, folder: Path) -> None:
        """Lets every worker write what it needs to go on (weights, optimizer, schedule, RNG) below the folder."""

    def load(self, folder: Path) -> None:
        """Lets every worker read what it wrote below the folder."""


@runtime_checkable
class ModelParts(Parts, Protocol):
    """The parts of a stage whose result is a model."""

    def save_model(self, folder: Path) -> None:
        """Writes the trained model and its tokenizer as a Hugging Face directory into the (existing, empty) folder."""


@dataclass(frozen=True)
class StageResult:
    """A finished stage.

    Args:
        stage: its name.
        iteration: iterations it ran.
        output: directory of its model, or of its data where it makes none.
        best: directory of the best model by an evaluation metric, where one is kept.
        before: metrics of the evaluation before the first iteration; empty where there was none.
        after: metrics of the last evaluation; empty where there was none.
        elapsed_s: seconds spent in it, over all sessions.
    """

    stage: str
    iteration: int
    output: Path
    best: Path | None
    before: dict[str, float]
    after: dict[str, float]
    elapsed_s: float


class RunFolder:
    """The folder of one run, locked while this process works in it; made by `create` or `open`, a context manager."""

    def __init__(self, path: Path, lock: int, *, created: Sequence[str]) -> None:
        self.path = path
        self._lock = lock
        self._created = created
        self._new_stages: set[Path] = set()

    @classmethod
    def create(cls, run_dir: str | Path, files: Mapping[str, str]) -> RunFolder:
        """A folder for a new run, with its first files by their names; the last of them is the config.

        Raises:
            ConfigError: the folder holds a run already, cannot be made, or another process works in it.
        """
        path = Path(run_dir).expanduser().absolute()
        _refuse_a_run(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run_dir: the folder {path} cannot be made: {error.strerror}; choose another") from error
        lock = _lock(path)
        try:
            _refuse_a_run(path)
            for name, text in files.items():
                write_text(path / name, text)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, lock, created=list(files))

    @classmethod
    def open(cls, run_dir: str | Path) -> RunFolder:
        """The folder of an earlier run, to go on with it.

        Raises:
            ConfigError: there is no run in it, or another process works in it.
        """
        path = Path(run_dir).expanduser().absolute()
        if not (path / CONFIG).is_file():
            what = "holds no run (no config.yaml)" if path.is_dir() else "does not exist"
            raise ConfigError(f"{path} {what}; resume wants the run_dir of an earlier `rlhf-ray run`")
        return cls(path, _lock(path), created=[])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A mistake in the input that shows before anything was done leaves no run behind that would have to be resumed.
        if isinstance(error, UserError) and self._created and self._untouched():
            for stage in self._new_stages:
                remove_folder(stage)
            for name in self._created:
                (self.path / name).unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Lets other processes work in the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def config_yaml(self) -> str:
        """The resolved config that the run was started with."""
        return (self.path / CONFIG).read_text(encoding="utf-8")

    def stage(self, name: str) -> Path:
        """The folder of one stage."""
        path = self.path / name
        if not path.exists():
            self._new_stages.add(path)
        return path

    def result(self, stage: str, *, total: int | None = None) -> StageResult | None:
        """The result of a stage; None where it is not done, or is to be prolonged to `total` iterations."""
        path = self.stage(stage) / DONE
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            best = values.pop("best")
            values["output"] = self.stage(stage) / values["output"]
            result = StageResult(**values, best=self.stage(stage) / best if best else None)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path}: not the result of a stage: {error}; remove it to end the stage anew"
            ) from error
        if result.output.name == DATA and len(list(result.output.glob(PARTS))) < result.iteration:
            raise CheckpointError(
                f"{result.output}: data of stage {stage} are gone, wanted {result.iteration} parts; remove "
                f"{path.parent} to collect anew"
            )
        configs = ("config.json", ADAPTER_CONFIG)
        if result.output.name == MODEL and not any((result.output / name).exists() for name in configs):
            raise CheckpointError(
                f"{result.output}: the model of stage {stage} is gone; remove {path} to write it again"
            )
        return None if total is not None and result.iteration < total else result

    def _untouched(self) -> bool:
        return (
            not _has_rows(self.path)
            and not any(self.path.glob(f"*/{DONE}"))
            and not any(self.path.glob("*/checkpoints/iteration_*"))
        )


def _has_rows(path: Path) -> bool:
    metrics = path / METRICS
    return metrics.exists() and metrics.stat().st_size > 0


def _refuse_a_run(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run_dir: {path} is a file; a folder is wanted")
    if (path / CONFIG).exists() or _has_rows(path):
        raise ConfigError(
            f"run_dir: {path} holds another run; go on with it by  rlhf-ray resume {path}  or choose another run_dir"
        )


def _lock(path: Path) -> int:
    """A descriptor that holds the folder's lock until it is closed or the process ends, however it ends."""
    try:
        descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"run_dir: {path} cannot be written to: {error.strerror}; choose another") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise ConfigError(f"run_dir: {owner} is working in {path}; wait for it or stop it") from error
        # A file system without locks: two processes in one folder are then the user's to avoid.
        return descriptor
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


class StageRun:
    """One stage of a run, from its start, or from its newest checkpoint, to its result.

    Args:
        folder: the run's folder.
        stage: the stage's settings.
        total: iterations (optimizer steps for all methods but PPO) of the whole stage.
        seed: the run's seed.
        tracking: where metrics go besides metrics.jsonl and TensorBoard.
        recorder: what the worker groups write their calls to.
        trackers: further places that metrics go to.
        view: what a person sees; unset: a live view in a terminal, else plain lines.
    """

    def __init__(
        self,
        folder: RunFolder,
        stage: schema.Stage,
        *,
        total: int,
        seed: int,
        tracking: schema.Tracking,
        recorder: Recorder,
        trackers: Sequence[Tracker] = (),
        view: View | None = None,
    ) -> None:
        self.folder = folder.stage(stage.name)
        self.output = self.folder / (DATA if isinstance(stage, schema.Collect) else MODEL)
        self.total = total
        self.iteration = 0
        self._run_dir = folder.path
        self._stage = stage
        self._tracking = tracking
        self._trackers = trackers
        self._recorder = recorder
        self._settings = result_settings(stage, seed=seed)
        self._checkpoints = Checkpoints(self.folder / "checkpoints", keep=stage.checkpoints.keep)
        self._unit: Unit = "iteration" if stage.method in ("ppo", "collect") else "step"
        self._view = view or open_view(stage.name, total, recorder, unit=self._unit)
        self._stop = _StopRequest(self._on_stop)
        self._log: MetricLog | None = None
        self._trace: TraceFile | None = None
        self._parts: Parts | None = None
        self._saved: int | None = None
        self._first_evaluation: dict[str, float] = {}
        self._last_evaluation: dict[str, float] = {}
        self._last_metrics: dict[str, Number] = {}
        self._last_report: PreferenceReport | None = None
        self._elapsed_s = 0.0
        self._session_start = time.monotonic()
        self._stopwatch = Stopwatch()
        self._pending: dict[str, float] = {}
        self._spans: list[Span] = []

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._view.__enter__()
        self._stop.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.restore()
        try:
            if self._trace is not None:
                self._take_spans()
                self._trace.close()
            if self._log is not None:
                self._log.close()
        finally:
            self._view.__exit__(kind, error, traceback)
        if isinstance(error, KeyboardInterrupt):
            exit_code = self._stop.exit_code or 130
            raise Interrupted(f"stopped at once. {self._how_to_resume()}", exit_code=exit_code) from error

    def message(self, text: str) -> None:
        """Something a person should know, such as how many rows were dropped."""
        self._view.message(text)

    def start_or_resume(self, parts: Parts) -> bool:
        """Loads the newest intact checkpoint, if there is one, into workers and trainer; says whether there was one.

        To be called when the workers are ready. From here on a stop request lets the iteration end first.

        Raises:
            CheckpointError: no checkpoint is intact, or it was written with settings that give another result.
        """
        self._parts = parts
        self._trace = TraceFile(self._run_dir / TRACE)
        self._checkpoints.clean()
        for name in ("best", MODEL):
            recover_folder(self.folder / name)
        handle = self._checkpoints.newest()
        if handle is not None:
            self._restore(handle, parts)
        last = -1 if handle is None else handle.iteration
        self._log = MetricLog(
            self._run_dir,
            self._stage.name,
            self._tracking,
            last_iteration=last,
            settings=self._settings,
            trackers=self._trackers,
        )
        self._stop.install()
        self._stop.finish_first = True
        self._session_start = time.monotonic()
        self._begin_iteration()
        return handle is not None

    def _restore(self, handle: CheckpointHandle, parts: Parts) -> None:
        check_settings(handle, self._settings)
        state = handle.state
        if state.iteration > self.total:
            raise CheckpointError(
                f"{handle.folder} is past the end: {state.iteration} {self._unit}s are done, {self.total} are asked for"
            )
        parts.load(handle.folder)
        parts.load_state(state.trainer)
        self.iteration = self._saved = state.iteration
        self._first_evaluation, self._last_evaluation = state.first_evaluation, state.last_evaluation
        self._elapsed_s = state.elapsed_s
        self._view.resume(state.iteration)

    def remaining(self) -> Iterator[int]:
        """The numbers of the iterations that are left, from 1 where the stage starts."""
        while self.iteration < self.total:
            yield self.iteration + 1

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Logs the evaluation before the first iteration, as iteration 0; no metrics, no row."""
        assert self.iteration == 0, f"iteration {self.iteration}: only the state before the first is recorded like this"
        if metrics:
            self._log_row(0, {**metrics, **self._pending})
            self._keep_best(0)
        self._begin_iteration()
        self._stop_if_requested()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Time and tokens within are the evaluation's (`time/evaluation_s`), not the training's."""
        self._spans += self._take_spans()
        start = time.monotonic()
        with self._recorder.driver("evaluation"):
            yield
        self._take_spans()
        self._pending["time/evaluation_s"] = time.monotonic() - start

    def evaluation_due(self, iteration: int, *, every: int) -> bool:
        """Whether to evaluate after this iteration: every so many (0: never), and after the last."""
        return iteration == self.total or (every > 0 and iteration % every == 0)

    def write_rollouts(
        self,
        rollouts: Rollouts,
        *,
        scores: SequenceFloat,
        parts: Mapping[str, SequenceFloat] | None = None,
        kl: SequenceFloat | None = None,
    ) -> None:
        """Keeps the samples of the iteration under way, before anything is learnt from them."""
        path = self.folder / "rollouts" / f"{folder_name(self.iteration + 1)}.parquet"
        with self._recorder.driver("write rollouts"):
            write_rollouts(path, rollouts, scores=scores, parts=parts, kl=kl)

    def write_evaluation(
        self,
        rollouts: Rollouts,
        *,
        iteration: int,
        scores: SequenceFloat,
        parts: Mapping[str, SequenceFloat] | None = None,
        kl: SequenceFloat | None = None,
    ) -> None:
        """Keeps the samples of the evaluation after this iteration; first and last are shown at the end."""
        write_rollouts(self._evaluation_path(iteration), rollouts, scores=scores, parts=parts, kl=kl)

    def write_report(self, report: PreferenceReport, *, iteration: int, margins: SequenceFloat) -> None:
        """Keeps what the evaluation after this iteration found on preferences; the last one is shown at the end."""
        assert self._log is not None, "start_or_resume comes first"
        write_report(self.folder / "evaluation" / f"preferences_{iteration:06}.json", report)
        self._log.write_histogram(iteration, "evaluation/margins", margins)
        self._last_report = report

    def finish_iteration(self, metrics: Mapping[str, Any]) -> None:
        """Ends an iteration: logs metrics, times and rates, writes the best model and the checkpoint that are due.

        Raises:
            Interrupted: a stop was requested; the checkpoint is written.
        """
        iteration = self.iteration + 1
        window = self._stopwatch.read()
        whole = Span(DRIVER, 0, "iteration", window.start, window.end, iteration, cpu_s=window.cpu_s)
        spans = [*self._spans, *self._take_spans(whole)]
        evaluation_s = self._pending.get("time/evaluation_s", 0.0)
        timing = span_metrics(spans, self._recorder.active(), window, evaluation_s=evaluation_s)
        fault("commit", role="driver", rank=0, iteration=iteration)
        self._log_row(iteration, {**metrics, **timing, **self._pending})
        self.iteration = iteration
        self._keep_best(iteration)
        self._begin_iteration()
        every = self._stage.checkpoints.every
        if self._stop.requested or iteration == self.total or (every > 0 and iteration % every == 0):
            self._checkpoint()
        fault("committed", role="driver", rank=0, iteration=iteration)
        self._stop_if_requested()

    def finish(self) -> StageResult:
        """Ends the stage: `model/` and its card where it makes one, `done.json`, and the summary on the screen.

        Raises:
            Interrupted: a stop was requested meanwhile; the stage is done, the pipeline resumes after it.
        """
        best = self.folder / "best"
        if self.output.name == MODEL:
            rows = read_metrics(self._run_dir, self._stage.name)
            self._write_model(self.output, {**(rows[-1] if rows else {}), **self._last_evaluation})
        result = StageResult(
            stage=self._stage.name,
            iteration=self.iteration,
            output=self.output,
            best=best if best.exists() else None,
            before=self._first_evaluation,
            after=self._last_evaluation,
            elapsed_s=self._elapsed(),
        )
        values = asdict(result) | {"output": self.output.name, "best": "best" if result.best else None}
        write_text(self.folder / DONE, json.dumps(values, indent=1))
        outputs = {self.output.name: self.output} | ({"best model": result.best} if result.best else {})
        self._view.summary(Summary(outputs, result.before, result.after, self._sample_pairs(), result.elapsed_s))
        if self._last_report is not None:
            self._view.show(report_tables(self._last_report, histogram=False))
        self._stop_if_requested()
        return result

    def _trainer_parts(self) -> Parts:
        assert self._parts is not None, "start_or_resume comes first"
        return self._parts

    def _log_row(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        assert self._log is not None, "start_or_resume comes first"
        numbers = self._log.write(iteration, metrics)
        self._last_metrics = numbers
        # Kept in checkpoints, which are strict JSON.
        evaluation = {
            name: float(value)
            for name, value in numbers.items()
            if name.startswith("evaluation/") and math.isfinite(value)
        }
        if evaluation:
            self._last_evaluation = evaluation
            if iteration == 0:
                self._first_evaluation = evaluation
        self._view.iteration(iteration, numbers)

    def _begin_iteration(self) -> None:
        self._pending, self._spans = {}, []
        self._take_spans()
        self._recorder.iteration = min(self.iteration + 1, self.total)
        self._stopwatch = Stopwatch()

    def _take_spans(self, *own: Span) -> list[Span]:
        """The spans since the last time, which are in the trace from now on."""
        spans = [*own, *self._recorder.drain()]
        self._open_trace().write(self._stage.name, spans)
        return spans

    def _open_trace(self) -> TraceFile:
        assert self._trace is not None, "start_or_resume comes first"
        return self._trace

    def _checkpoint(self) -> None:
        if self._saved == self.iteration:
            return
        assert self._log is not None, "start_or_resume comes first"
        parts = self._trainer_parts()
        self._log.sync()
        self._open_trace().sync()
        start = time.monotonic()
        self._recorder.iteration = self.iteration
        state = RunState(
            stage=self._stage.name,
            iteration=self.iteration,
            settings=self._settings,
            trainer=parts.state(),
            elapsed_s=self._elapsed(),
            first_evaluation=self._first_evaluation,
            last_evaluation=self._last_evaluation,
        )
        with self._recorder.driver("checkpoint"):
            self._checkpoints.write(state, parts.save)
        self._saved = self.iteration
        self._begin_iteration()
        # Rows are written before the checkpoint that knows them, so its time stands in the next one.
        self._pending["time/checkpoint_s"] = time.monotonic() - start

    def _keep_best(self, iteration: int) -> None:
        metric = self._stage.checkpoints.best
        found = self._last_metrics
        if metric is None or not any(name.startswith("evaluation/") for name in found):
            return
        if metric not in found:
            known = ", ".join(sorted(name for name in found if name.startswith("evaluation/")))
            raise ConfigError(f"{self._stage.name}.checkpoints.best: got {metric}, wanted one of {known}")
        value = float(found[metric])
        if not math.isfinite(value) or not is_better(metric, value, self._best_so_far(metric)):
            return
        best = {"metric": metric, "value": value, "iteration": iteration}
        self._write_model(self.folder / "best", found, notes={BEST: json.dumps(best)})

    def _best_so_far(self, metric: str) -> float | None:
        """The value of the model in `best/`: what lies there decides, also after a resume from an earlier iteration."""
        path = self.folder / "best" / BEST
        if not path.exists():
            return None
        best = json.loads(path.read_text(encoding="utf-8"))
        return float(best["value"]) if best["metric"] == metric else None

    def _write_model(self, target: Path, row: Mapping[str, Any], *, notes: Mapping[str, str] | None = None) -> None:
        parts = self._trainer_parts()
        assert isinstance(parts, ModelParts), f"stage {self._stage.name} makes no model"

        def write(folder: Path) -> None:
            parts.save_model(folder)
            self._write_card(folder, row)
            for name, text in (notes or {}).items():
                (folder / name).write_text(text, encoding="utf-8")

        with self._recorder.driver(f"write {target.name}"):
            write_folder(target, write)

    def _write_card(self, folder: Path, row: Mapping[str, Any]) -> None:
        model = self._stage.policy.model
        write_model_card(
            folder,
            title=f"{self._run_dir.resolve().name}: {self._stage.name}",
            method=self._stage.method,
            base_model=model if isinstance(model, str) else None,
            settings=self._stage.model_dump(mode="json", exclude_none=True),
            before=self._first_evaluation,
            after={
                name: value
                for name, value in row.items()
                if isinstance(value, int | float) and "/" in name and not name.startswith(("time/", "sync/", "driver/"))
            },
        )

    def _evaluation_path(self, iteration: int) -> Path:
        return self.folder / "evaluation" / f"{folder_name(iteration)}.parquet"

    def _sample_pairs(self) -> list[SamplePair]:
        """A few held-out prompts with the first sample before the stage and after it."""
        paths = self._evaluation_path(0), self._evaluation_path(self.iteration)
        if self.iteration == 0 or not all(path.exists() for path in paths):
            return []
        before, after = (read_rollouts(path) for path in paths)
        ids_before, ids_after = before.rollouts.prompt_ids.tolist(), after.rollouts.prompt_ids.tolist()
        pairs = []
        for prompt_id in list(dict.fromkeys(ids_after))[:SHOWN_SAMPLES]:
            if prompt_id in ids_before:
                i, j = ids_before.index(prompt_id), ids_after.index(prompt_id)
                pairs.append(
                    SamplePair(
                        prompt=after.rollouts.prompts[j],
                        before=before.rollouts.responses[i],
                        after=after.rollouts.responses[j],
                        score_before=float(before.scores[i]),
                        score_after=float(after.scores[j]),
                    )
                )
        return pairs

    def _elapsed(self) -> float:
        return self._elapsed_s + time.monotonic() - self._session_start

    def _on_stop(self, signal_name: str) -> None:
        self._view.notice(
            f"{signal_name}: finishing {self._unit} {min(self.iteration + 1, self.total)}, then saving; "
            "once more stops at once, without saving"
        )

    def _stop_if_requested(self) -> None:
        if self._stop.exit_code is None:
            return
        raise Interrupted(
            f"stopped after {self._unit} {self.iteration} of {self.total}. {self._how_to_resume()}",
            exit_code=self._stop.exit_code,
        )

    def _how_to_resume(self) -> str:
        where = f"stage {self._stage.name}"
        if (self.folder / DONE).exists():
            where += " is done"
        elif self._saved:
            where += f" is saved at {self._unit} {self._saved}"
        else:
            where += " starts anew, nothing of it is saved"
        return f"Go on with:  rlhf-ray resume {self._run_dir}  ({where})"


def is_better(metric: str, value: float, best: float | None) -> bool:
    """Whether a value beats the best so far; `loss`, `perplexity` and `error` are minimised."""
    if best is None:
        return True
    return value < best if any(word in metric for word in _MINIMISED) else value > best


class _StopRequest:
    """Ctrl-C and SIGTERM: the first lets the iteration end where `finish_first` is on, the second stops at once."""

    def __init__(self, on_request: Callable[[str], None]) -> None:
        self.finish_first = False
        self.exit_code: int | None = None
        self._on_request = on_request
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.exit_code is not None

    def install(self) -> None:
        """Takes the signals over, also from a library that has taken them since the last call."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, self._handle)
            if before != self._handle:
                self._before[number] = before

    def restore(self) -> None:
        """Gives the signals back."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.exit_code = self.exit_code is not None, 128 + number
        if again or not self.finish_first:
            raise KeyboardInterrupt
        self._on_request("Ctrl-C" if number == signal.SIGINT else "SIGTERM")
