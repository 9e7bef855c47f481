import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_ray.distributed.tracing import Recorder
from rlhf_ray.trainers import view as view_module
from rlhf_ray.trainers.view import (
    LiveView,
    PlainView,
    SamplePair,
    Summary,
    clip,
    duration,
    open_view,
    printable,
    shown,
    sparkline,
)

EVIL = "good \x1b[2J\x1b[31mfilm\x1b]0;title\x07 \x9b31mred\x00\r\n[bold]loud[/bold]\u202e"
SUMMARY = Summary(
    outputs={"model": Path("/runs/a/ppo/model"), "best model": Path("/runs/a/ppo/best")},
    before={"evaluation/reward_mean": 0.1},
    after={"evaluation/reward_mean": 0.9, "evaluation/length_mean": 20.0},
    samples=[SamplePair("The film was", EVIL, "[red]wonderful", -0.5, 0.9)],
    elapsed_s=65.0,
)


def live(recorder=None, total=10):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False, _environ={"TERM": "xterm"})
    view = open_view("ppo", total, recorder or Recorder(), console=console)
    assert isinstance(view, LiveView)
    return view, console.file


def test_generated_text_cannot_move_the_cursor():
    assert printable(EVIL) == "good film red [bold]loud[/bold] "
    assert printable("naïve 日本 🙂") == "naïve 日本 🙂"
    assert printable("\x1bcreset \x1b") == "reset "
    assert printable("\x1b]8;;unended link") == "8;;unended link"
    assert printable("a\ud800b") == "a?b"


def test_clip():
    assert clip("abcdef", 6) == "abcdef"
    assert clip("abcdefg", 6) == "abcde…"


def test_sparkline():
    assert sparkline([0, 0.5, 1]) == "▁▅█"
    assert sparkline([2, 2]) == "▁▁"
    assert sparkline([0, float("nan"), 1]) == "▁ █"
    assert sparkline([]) == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(-1, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7440, "2 h 4 min")]
)
def test_duration(seconds, words):
    assert duration(seconds) == words


def test_a_reward_run_shows_rewards_and_a_tuning_run_its_loss():
    rl = {"policy/loss": 0.1, "reward/mean": 0.5, "kl/per_sequence": 1.25, "generator/tokens_per_s": 1234.0}
    assert shown(rl) == [("reward", "0.500"), ("KL", "1.25 nats"), ("speed", "1,234 tokens/s")]
    assert shown({"policy/loss": 0.1}) == [("loss", "0.1000")]


def test_several_scorers_stand_beside_the_reward():
    one = {"reward/mean": 0.9, "reward/learned_mean": 0.9, "reward/shaped_mean": 0.8, "reward/max": 1.0}
    assert shown(one) == [("reward", "0.900")]
    assert shown(one | {"reward/true-joy_mean": 0.25}) == [("reward", "0.900 (learned 0.900, true-joy 0.250)")]


def test_a_pipe_gets_a_line_per_iteration():
    out = io.StringIO()
    view = open_view("ppo", 2, Recorder(), console=Console(file=out))
    assert isinstance(view, PlainView)
    with view:
        view.iteration(0, {"evaluation/reward_mean": 0.25})
        view.iteration(1, {"reward/mean": 0.5, "time/iteration_s": 2.0})
        view.iteration(2, {"reward/mean": 0.75})
        view.summary(SUMMARY)
    lines = out.getvalue().splitlines()
    assert lines[0] == "[ppo] before the first iteration | held-out reward 0.250"
    assert lines[1].startswith("[ppo] iteration 1/2 | reward 0.500 | 2.0 s | ")
    assert lines[1].endswith(" left")
    assert lines[2] == "[ppo] iteration 2/2 | reward 0.750"
    text = "\n".join(lines[3:])
    assert "held-out reward mean: 0.100 before, 0.900 after" in text
    assert "held-out length mean: 20.000\n" in text
    assert "after  (+0.900): [red]wonderful" in text
    assert "model: /runs/a/ppo/model" in text
    assert "\x1b" not in out.getvalue()


def test_fast_steps_do_not_flood_a_pipe():
    out = io.StringIO()
    view = open_view("sft", 500, Recorder(), unit="step", console=Console(file=out))
    with view:
        for step in range(1, 501):
            view.iteration(step, {"policy/loss": 1.0} | ({"evaluation/loss": 2.0} if step == 250 else {}))
    lines = out.getvalue().splitlines()
    assert [line.split(" |")[0] for line in lines] == ["[sft] step 1/500", "[sft] step 250/500", "[sft] step 500/500"]


def test_a_long_phase_is_mentioned_once(monkeypatch):
    monkeypatch.setattr(view_module, "LONG_PHASE_S", 0.06)
    out, recorder = io.StringIO(), Recorder()
    recorder.begin("generator", "generate")
    recorder.begin("generator", "generate")
    with open_view("ppo", 2, recorder, console=Console(file=out)):
        deadline = time.monotonic() + 10
        while not out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)
    assert out.getvalue() == "[ppo] generator: generate has been running for 0 s\n"


def test_the_live_view_shows_where_the_run_is():
    recorder = Recorder()
    recorder.begin("reward", "score")
    recorder.begin("reference", "logprobs")
    view, out = live(recorder)
    with view:
        view.iteration(1, {"reward/mean": 0.5, "kl/per_sequence": 1.0, "response/length_mean": 12.0})
        view.iteration(2, {"reward/mean": 0.9, "kl/per_sequence": 2.0})
        view.notice("Ctrl-C: finishing iteration 3")
    text = out.getvalue()
    for expected in (
        "ppo",
        "iteration 2/10",
        "reward: score 0 s, reference: logprobs 0 s",
        "0.900",
        "▁█",
        "2.00 nats",
        "12.0 tokens",
        "time left",
        "Ctrl-C: finishing iteration 3",
    ):
        assert expected in text, expected


def test_a_finished_run_waits_for_nothing():
    view, _ = live(total=1)
    with view:
        view.iteration(0, {})
        assert "…" in drawn(view)
        view.iteration(1, {"reward/mean": -0.0001})
    text = drawn(view)
    assert "0.000" in text
    assert "-0.000" not in text
    assert "time left" not in text
    assert "…" not in text


def drawn(view):
    console = Console(file=io.StringIO(), width=80)
    console.print(view)
    return console.file.getvalue()


def test_the_live_summary_shows_samples_as_plain_text():
    view, out = live()
    with view:
        view.summary(SUMMARY)
    text = out.getvalue()
    assert "0.100 → 0.900" in text
    assert "/runs/a/ppo/model" in text
    assert "[red]wonderful" in text
    assert "[bold]loud[/bold]" in text
    assert "\x1b[2J" not in text
    assert "title\x07" not in text


def test_time_left_is_of_this_session():
    pace = view_module._Pace(10)
    assert pace.left() == ""
    pace.resume(7)
    assert pace.left() == ""
    pace._ends[-1] -= 4
    pace.iteration(8, {})
    assert pace.left() == "8 s"
