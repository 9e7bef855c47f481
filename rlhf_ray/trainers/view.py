"""What a person sees of a run: a live view in a terminal, plain lines anywhere else, and a summary at the end."""

from __future__ import annotations

import math
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Protocol, Self

from rich.box import ROUNDED, SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf_ray.distributed.tracing import Activity, Recorder
from rlhf_ray.trainers.timing import SAMPLING

Unit = Literal["iteration", "step"]

LONG_PHASE_S = 30.0
"""A phase that runs longer than this is mentioned in the plain view."""
STEP_LINES_S = 2.0
"""Least seconds between two plain lines where the unit is a step."""

# Label, metric and form of what is shown, where the metric is there.
_FIELDS = (
    ("reward", "reward/mean", "{:z.3f}"),
    ("held-out reward", "evaluation/reward_mean", "{:z.3f}"),
    ("loss", "policy/loss", "{:z.4f}"),
    ("held-out accuracy", "evaluation/accuracy", "{:.3f}"),
    ("held-out loss", "evaluation/loss", "{:.4f}"),
    ("held-out perplexity", "evaluation/perplexity", "{:.2f}"),
    ("kept", "collect/kept", "{:,.0f} rows"),
    ("effective samples", "collect/effective_samples", "{:.2f}"),
    ("KL", "kl/per_sequence", "{:z.2f} nats"),
    ("KL coefficient", "kl/coefficient", "{:.4f}"),
    ("length", "response/length_mean", "{:.1f} tokens"),
    ("speed", "generator/tokens_per_s", "{:,.0f} tokens/s"),
    ("speed", "policy/tokens_per_s", "{:,.0f} tokens/s"),
)
# Metrics that say little where the one they stand behind is there.
_LESS_THAN = {"policy/loss": "reward/mean", "policy/tokens_per_s": "generator/tokens_per_s"}


@dataclass(frozen=True)
class SamplePair:
    """What the model wrote for one held-out prompt before and after the stage, with the scores."""

    prompt: str
    before: str
    after: str
    score_before: float
    score_after: float


@dataclass(frozen=True)
class Summary:
    """The end of a stage.

    Args:
        outputs: what it left, by name: directory of the trained model, and of the best one where that is kept, or of
            the data.
        before: metrics of the evaluation before the first iteration; empty where there was none.
        after: metrics of the last evaluation; empty where there was none.
        samples: a few held-out prompts with the responses before and after.
        elapsed_s: seconds spent in the stage.
    """

    outputs: Mapping[str, Path]
    before: Mapping[str, float]
    after: Mapping[str, float]
    samples: Sequence[SamplePair]
    elapsed_s: float


class View(Protocol):
    """Shows one stage."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def resume(self, iteration: int) -> None:
        """The stage goes on after this iteration."""

    def iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """An iteration has ended; 0 is the evaluation before the first one."""

    def message(self, text: str) -> None:
        """Something a person should know."""

    def notice(self, text: str) -> None:
        """As `message`, and may be called by a signal handler in the middle of anything."""

    def summary(self, summary: Summary) -> None:
        """The stage has ended."""

    def show(self, tables: RenderableType) -> None:
        """Something with more than one line, after the summary."""


def open_view(
    stage: str, total: int, recorder: Recorder, *, unit: Unit = "iteration", console: Console | None = None
) -> View:
    """The live view where standard output is a terminal, else plain lines."""
    console = console or Console(highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(stage, total, recorder, unit=unit, console=console)
    return PlainView(stage, total, recorder, unit=unit, out=console.file)


class _Pace:
    """Iterations done, the latest metrics, and the time left at the recent pace."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.latest: dict[str, float] = {}
        self.headline: deque[float] = deque(maxlen=40)
        self._ends: deque[float] = deque([time.monotonic()], maxlen=21)

    def resume(self, iteration: int) -> None:
        self.done = iteration
        self._ends.clear()
        self._ends.append(time.monotonic())

    def iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self.done = iteration
        self._ends.append(time.monotonic())
        if iteration == 0:
            self._ends.popleft()
        self.latest.update(metrics)
        value = metrics.get("reward/mean", metrics.get("policy/loss"))
        if value is not None:
            self.headline.append(value)

    def left(self) -> str:
        """The time left in words; empty before the first iteration has ended."""
        if len(self._ends) < 2:
            return ""
        return duration((self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) * (self.total - self.done))


class PlainView:
    """One line per iteration, or every few seconds for steps; a word about phases that take long."""

    def __init__(self, stage: str, total: int, recorder: Recorder, *, unit: Unit, out: IO[str] | None = None) -> None:
        self._stage = stage
        self._recorder = recorder
        self._unit = unit
        self._out = out or sys.stdout
        self._pace = _Pace(total)
        self._last_line = -math.inf
        self._mentioned: set[tuple[str, str]] = set()
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="view", daemon=True)

    def __enter__(self) -> Self:
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed.set()
        self._watcher.join(timeout=10)

    def resume(self, iteration: int) -> None:
        self._pace.resume(iteration)
        self._print(f"going on after {self._unit} {iteration} of {self._pace.total}")

    def iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._pace.iteration(iteration, metrics)
        self._mentioned.clear()
        notable = iteration in (0, 1, self._pace.total) or any(name.startswith("evaluation/") for name in metrics)
        if self._unit == "step" and not notable and time.monotonic() - self._last_line < STEP_LINES_S:
            return
        self._last_line = time.monotonic()
        fields = [f"{label} {value}" for label, value in shown(metrics)]
        if seconds := metrics.get("time/iteration_s"):
            fields.append(f"{seconds:.1f} s" if self._unit == "iteration" else f"{seconds:.2f} s")
        if iteration < self._pace.total and (left := self._pace.left()):
            fields.append(f"{left} left")
        where = f"{self._unit} {iteration}/{self._pace.total}" if iteration else f"before the first {self._unit}"
        self._print(" | ".join([where, *fields]))

    def message(self, text: str) -> None:
        self._print(text)

    def notice(self, text: str) -> None:
        # print() in a signal handler fails where the handler has interrupted another print().
        try:
            os.write(self._out.fileno(), f"[{self._stage}] {text}\n".encode())
        except (OSError, ValueError):
            self._print(text)

    def summary(self, summary: Summary) -> None:
        self._print(f"done in {duration(summary.elapsed_s)}")
        for name, before, after in comparisons(summary):
            self._print(f"{name}: {after}" if before is None else f"{name}: {before} before, {after} after")
        for pair in summary.samples:
            self._print(f"prompt: {clip(pair.prompt, 200)}")
            before, after = _shown_score(pair.score_before), _shown_score(pair.score_after)
            self._print(f"  before ({before}): {clip(pair.before, 300)}")
            self._print(f"  after  ({after}): {clip(pair.after, 300)}")
        for name, path in summary.outputs.items():
            self._print(f"{name}: {_shown(path)}")

    def show(self, tables: RenderableType) -> None:
        Console(file=self._out, highlight=False).print(tables)

    def _print(self, text: str) -> None:
        print(f"[{self._stage}] {text}", file=self._out, flush=True)

    def _watch(self) -> None:
        while not self._closed.wait(timeout=LONG_PHASE_S / 6):
            for activity in self._recorder.active():
                key = (activity.role, activity.method)
                if key not in self._mentioned and time.time() - activity.since > LONG_PHASE_S:
                    self._mentioned.add(key)
                    self._print(f"{phase(activity)} has been running for {duration(time.time() - activity.since)}")


class LiveView:
    """A panel that is drawn anew twice a second; `console.print(view)` draws it as it is now."""

    def __init__(self, stage: str, total: int, recorder: Recorder, *, unit: Unit, console: Console) -> None:
        self._stage = stage
        self._recorder = recorder
        self._unit = unit
        self._console = console
        self._pace = _Pace(total)
        self._note = ""
        self._live = Live(get_renderable=self.__rich__, console=console, refresh_per_second=2)

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def resume(self, iteration: int) -> None:
        self._pace.resume(iteration)

    def iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._pace.iteration(iteration, metrics)

    def message(self, text: str) -> None:
        self._console.print(Text(f"[{self._stage}] {text}"))

    def notice(self, text: str) -> None:
        self._note = text

    def summary(self, summary: Summary) -> None:
        self._live.stop()
        title = Text(f"{self._stage}: done in {duration(summary.elapsed_s)}", style="bold green")
        self._console.print(Panel(_results(summary), title=title, box=ROUNDED, border_style="green"))
        if summary.samples:
            self._console.print(_sample_table(summary.samples))

    def show(self, tables: RenderableType) -> None:
        self._console.print(tables)

    def __rich__(self) -> RenderableType:
        pace = self._pace
        body = Table.grid(padding=(0, 2), expand=True)
        body.add_column(style="bold", no_wrap=True)
        body.add_column(ratio=1)
        bar = ProgressBar(total=max(pace.total, 1), completed=pace.done, complete_style="cyan")
        body.add_row(f"{self._unit} {pace.done}/{pace.total}", bar)
        if now := self._now():
            body.add_row("now", Text(now))
        for index, (label, value) in enumerate(shown(pace.latest)):
            line = Text(value)
            if index == 0 and len(pace.headline) > 1:
                line.append("  " + sparkline(list(pace.headline)), style="cyan")
            body.add_row(label, line)
        if pace.done < pace.total and (left := pace.left()):
            body.add_row("time left", Text(left))
        if self._note:
            body.add_row("", Text(self._note, style="yellow"))
        return Panel(body, title=Text(self._stage, style="bold"), box=ROUNDED, border_style="cyan")

    def _now(self) -> str:
        """The calls under way, those of one kind and time together."""
        phases = {phase(activity): activity.since for activity in reversed(self._recorder.active())}
        now = ", ".join(f"{name} {duration(time.time() - since)}" for name, since in reversed(phases.items()))
        return now or ("…" if self._pace.done < self._pace.total else "")


def _results(summary: Summary) -> Table:
    """The evaluation's metrics before and after, and where the models are."""
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(ratio=1)
    for index, (name, before, after) in enumerate(comparisons(summary)):
        value = after if before is None else f"{before} → {after}"
        table.add_row(name, Text(value, style="bold green" if index == 0 else ""))
    for name, path in summary.outputs.items():
        table.add_row(name, Text(_shown(path), overflow="fold"))
    return table


def _sample_table(samples: Sequence[SamplePair]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_lines=True, header_style="bold", expand=True)
    for heading, share in (("prompt", 2), ("before", 3), ("after", 3)):
        table.add_column(heading, ratio=share)
    for pair in samples:
        table.add_row(
            Text(clip(pair.prompt, 200)),
            Text.assemble((f"{_shown_score(pair.score_before)}  ", "bold yellow"), clip(pair.before, 300)),
            Text.assemble((f"{_shown_score(pair.score_after)}  ", "bold green"), clip(pair.after, 300)),
        )
    return table


def _shown_score(score: float) -> str:
    return "no score" if math.isnan(score) else f"{score:+.3f}"


def shown(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Label and value of the metrics that a person wants to see first."""
    return [
        (label, form.format(metrics[name]) + (_scorers(metrics) if name == "reward/mean" else ""))
        for label, name, form in _FIELDS
        if name in metrics and _LESS_THAN.get(name) not in metrics
    ]


def _scorers(metrics: Mapping[str, float]) -> str:
    """Name and mean of each scorer, weight 0 included, where there are several: ` (learned 0.894, sentiment 0.567)`."""
    found = {name: re.fullmatch(r"reward/([\w-]+)_mean", name) for name in metrics if name != "reward/shaped_mean"}
    parts = [f"{match[1]} {metrics[name]:z.3f}" for name, match in found.items() if match]
    return f" ({', '.join(parts)})" if len(parts) > 1 else ""


def comparisons(summary: Summary) -> list[tuple[str, str | None, str]]:
    """Name and values of each evaluation metric, before (None where it was not measured) and after."""

    def before(name: str) -> str | None:
        return f"{summary.before[name]:z.3f}" if name in summary.before else None

    names = [name for name in summary.after if name.startswith("evaluation/")]
    return [
        (_held_out(name), before(name), f"{summary.after[name]:z.3f}")
        for name in sorted(names, key=lambda name: (name != "evaluation/reward_mean", name))
    ]


def _held_out(metric: str) -> str:
    """`evaluation/reward_mean` -> `held-out reward mean`."""
    return metric.replace("evaluation/", "held-out ").replace("_", " ")


def phase(activity: Activity) -> str:
    """What a call does, in words: `generator: generate`."""
    return f"{activity.role}: {in_words(activity.method)}"


def in_words(method: str) -> str:
    """A worker's method as a person would call it."""
    name = "generate" if method in SAMPLING else method
    return name.rpartition(".")[2].replace("_", " ")


def sparkline(values: Sequence[float]) -> str:
    """Values as a row of bars from the lowest to the highest; a gap where one is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, high = min(finite), max(finite)
    bars = "▁▂▃▄▅▆▇█"

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return " "
        return bars[min(int((value - low) / (high - low) * len(bars)), len(bars) - 1)] if high > low else bars[0]

    return "".join(bar(value) for value in values)


def duration(seconds: float) -> str:
    """Seconds in words: `8 s`, `3 min 5 s`, `2 h 4 min`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


# Escape sequences; C0, DEL and C1 controls; marks that turn the direction of writing; line separators.
_ESCAPES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[0-~]?")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]+")


def printable(text: str) -> str:
    """Generated text on one line, without anything that moves a terminal's cursor or changes its colours."""
    return _CONTROLS.sub(" ", _ESCAPES.sub("", text)).encode("utf-8", "replace").decode("utf-8")


def clip(text: str, length: int) -> str:
    """The printable text, cut to a length with an ellipsis."""
    line = printable(text).strip()
    return line if len(line) <= length else line[: length - 1] + "…"


def _shown(path: Path) -> str:
    """The path from the working directory, where it is below that; else as it is."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
