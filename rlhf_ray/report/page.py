"""One HTML page about one run or several, with everything in it: it asks for nothing from anywhere.

Its content security policy lets only the page's own two scripts run, so that no text of a model ever does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.errors import ConfigError
from rlhf_ray.report.charts import learning_charts, share_charts
from rlhf_ray.report.history import RunHistory, Sample, Samples, StageHistory, read_run
from rlhf_ray.report.timeline import timelines
from rlhf_ray.trainers.durable import write_text
from rlhf_ray.trainers.timing import phase_name

FILE = "report.html"
RUN_COLORS = ("#5b6cf0", "#e07a3f", "#16a37f", "#b455c9", "#d64f6e", "#1f9fc4", "#9a8a1f", "#7a7f8c")

# The first of these that a stage has is what it is about: metric, its name, form of its value.
_GOALS = (
    ("evaluation/reward_mean", "held-out reward", "{:z.3f}"),
    ("reward/mean", "reward", "{:z.3f}"),
    ("evaluation/accuracy", "held-out accuracy", "{:.1%}"),
    ("evaluation/loss", "held-out loss", "{:.3f}"),
    ("policy/loss", "loss", "{:.3f}"),
    ("collect/kept", "kept rows", "{:,.0f}"),
)


def write_report(run_dirs: Sequence[Path], output: Path) -> None:
    """Writes the page about these runs; ConfigError where one of them is no run or the page cannot be written."""
    text = report_page([read_run(path) for path in run_dirs])
    try:
        write_text(output, text)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror}; choose another file by --output") from error


def report_page(runs: Sequence[RunHistory]) -> str:
    """The page, as HTML."""
    from plotly.offline import get_plotlyjs

    names = run_names(runs)
    room = files("rlhf_ray.report")
    style, own = (room.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    scripts = [get_plotlyjs(), own]
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    stages = list(dict.fromkeys(stage.name for run in runs for stage in run.stages))
    data = {
        "runs": [{"name": name, "color": _color(number)} for number, name in enumerate(names)],
        "stages": [_stage_charts(name, runs) for name in stages],
        "timelines": [timelines(run) for run in runs],
    }
    title = " and ".join(names) if len(names) < 4 else f"{len(names)} runs"
    body = [
        _header(title, runs, stages),
        _overview(runs, names),
        _learning(),
        _time(runs, names),
        *(_samples(run, name if len(runs) > 1 else None) for run, name in zip(runs, names, strict=True)),
        _settings(runs, names),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)} · rlhf_ray</title>",
            f"<style>{style}</style></head><body>",
            *body,
            "<footer>Written by <code>rlhf-ray report</code>; nothing on this page is loaded from anywhere.</footer>",
            f'<script type="application/json" id="data">{_embedded(data)}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>",
        ]
    )


def run_names(runs: Sequence[RunHistory]) -> list[str]:
    """A name for each run: its folder's, with the folder above in front where that alone is not unique."""
    short = [run.name for run in runs]
    if len(set(short)) == len(short):
        return short
    longer = [f"{run.path.resolve().parent.name}/{run.name}" for run in runs]
    return longer if len(set(longer)) == len(longer) else [str(run.path) for run in runs]


def _stage_charts(name: str, runs: Sequence[RunHistory]) -> dict[str, Any]:
    found = [(number, stage) for number, run in enumerate(runs) for stage in run.stages if stage.name == name]
    return {"name": name, "charts": learning_charts(found), "shares": share_charts(found)}


def _header(title: str, runs: Sequence[RunHistory], stages: Sequence[str]) -> str:
    """The title, and the stages, of which the page shows the one that is chosen."""
    if len(runs) == 1:
        by_name = {stage.name: stage for stage in runs[0].stages}
        buttons = [_step(name, by_name.get(name)) for name in runs[0].planned]
    else:
        buttons = [
            f'<button type="button" class="step" data-stage="{escape(name)}">{escape(name)}</button>' for name in stages
        ]
    steps = '<span class="arrow">→</span>'.join(buttons)
    return (
        '<header><div><p class="brand">rlhf_ray</p>'
        f"<h1>{escape(title)}</h1></div>"
        '<button id="theme" type="button" title="Light or dark">◐</button></header>'
        f'<nav class="steps">{steps}</nav>'
    )


def _step(name: str, stage: StageHistory | None) -> str:
    """The button of one stage of one run, which says how far it got."""
    if stage is None:
        return f'<button type="button" class="step" disabled>{escape(name)}<small>not begun</small></button>'
    state, told = "open", f"at {stage.iteration}"
    if stage.elapsed_s is not None:
        state, told = "done", f"{stage.iteration} · {_duration(stage.elapsed_s)}"
    return (
        f'<button type="button" class="step {state}" data-stage="{escape(name)}">{escape(name)}'
        f"<small>{told}</small></button>"
    )


def _overview(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    figures = [_figures(run) for run in runs]
    if len(runs) == 1:
        cards = "".join(
            f'<div class="card figure"><p class="label">{escape(label)}</p>'
            f'<p class="value">{escape(value)}</p><p class="note">{escape(note)}</p></div>'
            for label, value, note in figures[0]
        )
        return f'<section class="figures">{cards}</section>'
    labels = list(dict.fromkeys(label for found in figures for label, _, _ in found))
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    rows = []
    for number, (name, found) in enumerate(zip(names, figures, strict=True)):
        by_label = {label: (value, note) for label, value, note in found}
        cells = "".join(
            f"<td>{escape(by_label[label][0])}<small>{escape(by_label[label][1])}</small></td>"
            if label in by_label
            else "<td>–</td>"
            for label in labels
        )
        rows.append(f"<tr><th>{_chip(number)}{escape(name)}</th>{cells}</tr>")
    table = f"<table><thead><tr><th>run</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<section class="card scroll">{table}</section>'


def _figures(run: RunHistory) -> list[tuple[str, str, str]]:
    """(label, value, note) of what a reader wants first, of the last stage that has it."""
    last = run.stages[-1]
    found: list[tuple[str, str, str]] = []
    for metric, label, form in _GOALS:
        values = last.values(metric)
        if values:
            first, end = form.format(values[0][1]), form.format(values[-1][1])
            text = end if len(values) == 1 else f"{first} → {end}"
            where = f"{last.name}, iteration {values[0][0]} → {values[-1][0]}"
            found.append((label, text, where))
            break
    if values := last.values("kl/per_sequence"):
        found.append(("KL", f"{values[-1][1]:z.2f}", "nats per response"))
    if values := last.values("response/length_mean"):
        found.append(("response length", f"{values[0][1]:.0f} → {values[-1][1]:.0f}", "tokens"))
    if values := last.values("generator/logprob_diff_mean"):
        found.append(("generator − learner", f"{values[-1][1]:.1e}", "nats per token"))
    done = [stage.elapsed_s for stage in run.stages if stage.elapsed_s is not None]
    seconds = sum(done) + sum(
        value for stage in run.stages if stage.elapsed_s is None for _, value in stage.values("time/iteration_s")
    )
    found.append(("time", _duration(seconds), "all stages" if run.is_done else "so far; not finished"))
    for role, what in (("generator", "sampled"), ("policy", "learnt")):
        if values := last.values(f"{role}/tokens_per_s"):
            found.append((f"{what} tokens/s", f"{_median(values):,.0f}", "median at work"))
            break
    if values := last.values("time/idle_share"):
        found.append(("idle", f"{statistics.fmean(value for _, value in values):.1%}", "no worker at work"))
    return found


def _learning() -> str:
    return (
        '<section><div class="title"><h2>Learning<small><span class="stage-name"></span>, over its iterations</small>'
        '</h2></div><div id="run-legend" class="legend"></div><div class="grid" id="charts"></div>'
        '<div class="grid" id="more-charts" hidden></div>'
        '<button type="button" class="more" id="more"></button></section>'
    )


def _time(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    choices = "".join(f'<option value="{number}">{escape(name)}</option>' for number, name in enumerate(names))
    chosen = f'<select id="timeline-run">{choices}</select>' if len(runs) > 1 else ""
    tables = "".join(
        _roles(run, stage, name if len(runs) > 1 else "Roles")
        for run, name in zip(runs, names, strict=True)
        for stage in run.stages
    )
    return (
        '<section><div class="title"><h2>Where the time goes<small class="stage-name"></small></h2></div>'
        f'<div class="card"><div class="controls"><strong>Timeline</strong>{chosen}<span id="iterations">'
        '<button type="button" id="earlier" title="Earlier">‹</button><input type="range" id="timeline-number" min="0">'
        '<button type="button" id="later" title="Later">›</button></span><output id="timeline-told"></output></div>'
        '<div id="timeline"></div></div>'
        f'<div class="grid" id="shares"></div><div class="tables">{tables}</div></section>'
    )


def _roles(run: RunHistory, stage: StageHistory, title: str) -> str:
    """A table of the stage's roles: how busy, how fast, how much memory, and what they did."""
    names = {name for row in stage.rows for name in row}
    roles = sorted(name.removesuffix("/busy_share") for name in names if name.endswith("/busy_share"))
    if not roles:
        return ""
    wall = _median(stage.values("time/iteration_s")) or 1.0
    peaks = {role: max((value for _, value in stage.values(f"{role}/peak_memory_gib")), default=0.0) for role in roles}
    most = max(peaks.values())
    roles.sort(key=lambda role: -_median(stage.values(f"{role}/busy_share")))
    rows = []
    for role in roles:
        busy = _median(stage.values(f"{role}/busy_share"))
        rate = stage.values(f"{role}/tokens_per_s")
        own = phase_name(role, "")
        phases = [name for name in names if name.startswith(f"time/{own}") or (role, name) == _SAMPLING]
        # A role whose name begins another one's has only its own phases.
        longer = [phase_name(other, "") for other in roles if other != role and other.startswith(role)]
        phases = [name for name in phases if not any(name.startswith(f"time/{other}") for other in longer)]
        seconds = {name: _median(stage.values(name)) for name in phases}
        planned = stage.planned_gib.get(role)
        memory = f"{peaks[role]:.2f} GiB" + ("" if planned is None else f", planned {planned:.2f}")
        told = " · ".join(
            f"{escape(name.removeprefix('time/').removeprefix(own).removesuffix('_s').replace('_', ' '))}"
            f"&nbsp;{_seconds(value)}"
            for name, value in sorted(seconds.items(), key=lambda item: -item[1])
        )
        rows.append(
            f"<tr><th>{escape(role)}</th><td>{_bar(busy, f'{busy:.0%}')}</td>"
            f"<td>{f'{_median(rate):,.0f}' if rate else '–'}</td>"
            f"<td>{_bar(peaks[role] / most, memory) if peaks[role] else '–'}</td>"
            f'<td class="wide">{told}</td></tr>'
        )
    idle = stage.values("time/idle_share")
    driver = stage.values("driver/cpu_share")
    notes = [f"{_seconds(wall)} an iteration"]
    notes += [f"idle {_median(idle):.1%}"] if idle else []
    notes += [f"driver {_median(driver):.1%} CPU"] if driver else []
    head = "".join(f"<th>{name}</th>" for name in ("role", "busy", "tokens/s", "peak memory", "seconds an iteration"))
    return (
        f'<div class="card scroll" data-stage="{escape(stage.name)}">'
        f"<h3>{escape(title)}<small>{' · '.join(notes)}; medians</small></h3>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


_SAMPLING = ("generator", "time/generate_s")


def _samples(run: RunHistory, name: str | None) -> str:
    found = [(stage, stage.samples) for stage in run.stages if stage.samples is not None]
    if not found:
        return ""
    stage, samples = found[-1]
    what = "held-out prompts" if samples.kind == "evaluation" else "prompts"
    of = f"{name}, {stage.name}" if name else stage.name
    told = f"{of}: the first {len(samples.after)} of {samples.total} {what}"
    return (
        f'<section><div class="title"><h2>Samples before and after<small>{escape(told)}</small></h2></div>'
        f'<div class="card samples">{_sample_rows(samples)}</div></section>'
    )


def _sample_rows(samples: Samples) -> str:
    def cell(sample: Sample) -> str:
        score = "" if math.isnan(sample.score) else f'<span class="score">{sample.score:z.2f}</span>'
        return f'{score}<span class="prompt">{escape(sample.prompt)}</span>{escape(sample.response)}'

    head = f'<div class="head">iteration {samples.first}</div><div class="head">iteration {samples.last}</div>'
    rows = []
    for before, after in zip(samples.before, samples.after, strict=False):
        better = after.score - before.score
        side = "" if samples.kind != "evaluation" or math.isnan(better) else " up" if better > 0 else " down"
        rows.append(f'<div class="text">{cell(before)}</div><div class="text{side}">{cell(after)}</div>')
    return head + "".join(rows)


def _settings(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    parts = []
    if len(runs) > 1:
        flat = [dict(_flat(run.settings)) for run in runs]
        keys = list(dict.fromkeys(key for found in flat for key in found))
        differing = [key for key in keys if len({json.dumps(found.get(key)) for found in flat}) > 1]
        head = "".join(f"<th>{_chip(number)}{escape(name)}</th>" for number, name in enumerate(names))
        rows = "".join(
            f"<tr><th>{escape(key)}</th>"
            + "".join(f"<td>{escape(_plain(found[key])) if key in found else '–'}</td>" for found in flat)
            + "</tr>"
            for key in differing
        )
        parts.append(
            '<div class="card scroll"><h3>What differs</h3>'
            f"<table><thead><tr><th>setting</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        )
    for run, name in zip(runs, names, strict=True):
        text = yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True, width=110)
        of = f" of {escape(name)}" if len(runs) > 1 else ""
        parts.append(f"<details><summary>Resolved settings{of}</summary><pre>{escape(text)}</pre></details>")
    return f'<section><div class="title"><h2>Settings</h2></div>{"".join(parts)}</section>'


def _flat(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, value) of every setting; a stage is known by its name."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            name = item.get("name", number) if isinstance(item, dict) else number
            yield from _flat(item, str(name) if path == "stages" else f"{path}.{name}")
    else:
        yield path, value


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _embedded(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _color(run: int) -> str:
    return RUN_COLORS[run % len(RUN_COLORS)]


def _chip(run: int) -> str:
    return f'<i class="chip" style="background:{_color(run)}"></i>'


def _bar(share: float, text: str) -> str:
    width = min(max(share, 0.0), 1.0)
    return f'<span class="bar"><i style="width:{width:.1%}"></i></span><span class="of">{text}</span>'


def _median(values: Sequence[tuple[int, float]]) -> float:
    return statistics.median(value for _, value in values) if values else 0.0


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.1f} ms" if value < 0.01 else f"{value * 1000:.0f} ms"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
