"""What README.md claims holds: its commands, files, settings, examples and its picture."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from pyarrow import Table, parquet

from rlhf_ray import errors
from rlhf_ray.bench.figures import Figure
from rlhf_ray.bench.suite import Outcome
from rlhf_ray.cli import main
from rlhf_ray.config.describe import METHODS, Setting, list_settings
from rlhf_ray.config.load import load_pipeline
from rlhf_ray.config.schema import Pipeline
from rlhf_ray.data.batches import Rollouts, make_sequences, one_version
from rlhf_ray.trainers.journal import write_rollouts
from tests.readme_picture import draw
from tests.test_architecture import imported_modules, room_of

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
# The tables and sentences without the blocks of code.
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
SPANS = re.findall(r"`([^`\n]+)`", PROSE)
FILES_OF_A_RUN = {"config.yaml", "metrics.jsonl", "status.json", "trace.json"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def section(heading: str) -> str:
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    found = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    # In prose RUN_DIR and the like stand for what a user has.
    found += [
        span for span in SPANS if span.startswith(("make ", "rlhf-ray ")) and not re.search(r"\b[A-Z_]{3,}\b", span)
    ]
    return list(dict.fromkeys(command for command in found if command))


def settings() -> list[Setting]:
    return [setting for part in (Pipeline, *METHODS.values()) for setting in list_settings(part)]


def exit_code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code


@pytest.fixture
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_the_two_commands_come_first() -> None:
    assert commands()[:2] == ["make quickstart", "make test"]


@pytest.mark.parametrize("command", commands())
def test_a_command_works(
    command: str,
    in_repository: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":
        assert subprocess.run(["make", "-n", *arguments], capture_output=True, timeout=60).returncode == 0
        return
    if program == "pip":
        assert arguments == ["install", ".", "-c", "constraints.txt"]
        return
    assert program == "rlhf-ray"
    if arguments[0] == "run":
        assert load_pipeline(arguments[1], arguments[2:]).stages
    elif arguments[0] == "resume":
        runs = [shlex.split(other)[2:] for other in commands() if other.startswith("rlhf-ray run")]
        assert arguments[1:] in [[load_pipeline(file, overrides).run_dir] for file, *overrides in runs]
        monkeypatch.chdir(tmp_path)
        assert exit_code(*arguments) == 2
        assert "is not a folder" in capsys.readouterr().err
    elif arguments[0] in ("generate", "evaluate", "report"):
        # tests/integration/test_quickstart.py runs these for real; here the only mistake is that there is no such run.
        monkeypatch.chdir(tmp_path)
        assert exit_code(*arguments) == 2
        assert arguments[1] in capsys.readouterr().err
    elif "--measured" in arguments:
        *arguments, folder = arguments
        assert exit_code(*arguments, str(tmp_path / folder)) == 2
        assert f"{folder} holds no run" in capsys.readouterr().err
    elif arguments[0] in ("submit", "list", "stop") or "--address" in arguments:
        # tests/integration/test_submit.py has a cluster; here none is at the address.
        def nobody(address: str | None) -> None:
            raise errors.ConfigError(f"nobody at {address}")

        monkeypatch.setattr("rlhf_ray.distributed.jobs.connect", nobody)
        assert exit_code(*arguments) == 2
        assert capsys.readouterr().err == "nobody at http://head:8265\n"
    elif arguments[0] == "plan" and "dpo.policy.workers=9" in arguments:
        assert exit_code(*arguments) == 1
        assert "dpo does NOT fit" in capsys.readouterr().out
    elif arguments[0] == "bench":
        # tests/integration/test_bench.py measures for real.
        held = Outcome("learn", figures=(Figure("learn/tokens", 1.0, "s"),))
        monkeypatch.setattr("rlhf_ray.bench.suite.run_benchmark", lambda name, **settings: held)
        assert exit_code(*arguments) == 0
    else:
        assert exit_code(*arguments) == 0


def test_the_pipeline_and_the_reward_function_fit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pipeline,), (function,) = blocks("yaml"), blocks("python")
    (tmp_path / "pipeline.yaml").write_text(pipeline)
    (tmp_path / "rewards.py").write_text(function)
    (tmp_path / "texts.jsonl").write_text('{"text": "The film was a joy."}\n')
    prompt = {"prompt": "The film was"}
    (tmp_path / "held_out.jsonl").write_text(json.dumps(prompt) + "\n")
    parquet.write_table(Table.from_pylist([prompt]), tmp_path / "prompts.parquet")
    monkeypatch.chdir(tmp_path)
    assert exit_code("check", "pipeline.yaml") == 0


def test_the_reward_function_scores() -> None:
    names: dict[str, object] = {}
    exec(blocks("python")[0], names)
    (reward,) = [value for value in names.values() if callable(value)]
    assert reward(["a", "a"], ["b", "b c d"], [None, None]) == [0.5, 0.25]


def test_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link]
    links += re.findall(r'src="([^"]+)"', README)
    assert len(links) > 10
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_every_shipped_pipeline_and_every_room_is_listed() -> None:
    shipped = set(re.findall(r"\]\((pipelines/\w+\.yaml)\)", section("A pipeline file")))
    assert shipped == {path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("pipelines/*.yaml")}
    rooms = set(re.findall(r"\]\((rlhf_ray/\w+)\)", section("How it works")))
    assert rooms == {path.parent.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("rlhf_ray/*/*.py")}


def test_imports_point_upward_in_the_table_of_rooms() -> None:
    lines = [re.findall(r"\]\(rlhf_ray/(\w+)", line) for line in section("How it works").splitlines()]
    row = {room: number for number, rooms in enumerate(filter(None, lines)) for room in rooms}
    for path in (REPOSITORY / "rlhf_ray").rglob("*.py"):
        modules = imported_modules(ast.parse(path.read_text()))
        others = [name.split(".")[1] for name in modules if name.startswith("rlhf_ray.")]
        downward = [other for other in others if row.get(other, 0) > row.get(room_of(path), len(lines))]
        assert downward == [], path


def test_settings_in_backticks_exist() -> None:
    known = {setting.key for setting in settings()}
    written = [re.split(r"[=:]", span)[0] for span in SPANS]
    dotted = [name for name in written if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name) and name not in FILES_OF_A_RUN]
    assert len(dotted) >= 3
    assert [name for name in dotted if name not in known] == []


def test_the_methods_exist() -> None:
    words = {word for setting in settings() for word in re.findall(r"\w+", f"{setting.key} {setting.wanted}")}
    named = re.findall(r"`(\w+)`", section("Methods"))
    assert len(named) >= 7
    assert set(named) - words <= {"datasets"}


def test_errors_and_metrics_in_it_exist() -> None:
    named = set(re.findall(r"\b\w+Error\b", PROSE))
    assert named <= set(vars(errors))
    source = "".join(path.read_text() for path in REPOSITORY.glob("rlhf_ray/**/*.py"))
    metrics = [span for span in SPANS if re.fullmatch(r"[a-z]+/[a-z_]+_(mean|max|s)", span)]
    assert metrics
    assert all(f'"{metric}"' in source for metric in metrics)


def test_the_picture_is_a_drawing_of_this_program() -> None:
    shown = README.split("<!-- screen:quickstart -->")[1].split("<!-- /screen -->")[0]
    (path,) = re.findall(r"\]\(([^)]+\.svg)\)", shown)
    text = picture_text((REPOSITORY / path).read_text())
    for words in (
        "$ make quickstart",
        "iteration",
        "held-out reward",
        "KL",
        "ppo: done in",
        "runs/quickstart/ppo/model",
    ):
        assert words in text, words


def test_the_picture_can_be_drawn_anew(tmp_path: Path) -> None:
    rows = [
        {"iteration": 0, "evaluation/reward_mean": 0.1},
        {"iteration": 1, "reward/mean": 0.4, "kl/per_sequence": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"stage": "ppo"} | row) + "\n" for row in rows))
    samples = tmp_path / "ppo" / "evaluation"
    samples.mkdir(parents=True)
    for iteration, response, score in ((0, "dull", -1.0), (1, "a <joy>", 1.0)):
        rollouts = Rollouts(
            sequences=make_sequences([[5, 6]], [[7]]),
            generator_logprobs=torch.zeros(1, 3),
            finished=torch.ones(1, dtype=torch.bool),
            prompts=["The film was"],
            responses=[response],
            answers=[None],
            prompt_ids=torch.tensor([0]),
            policy_versions=one_version(make_sequences([[5, 6]], [[7]]), iteration),
        )
        write_rollouts(samples / f"iteration_{iteration:06d}.parquet", rollouts, scores=torch.tensor([score]))
    before, after = {"evaluation/reward_mean": 0.1}, {"evaluation/reward_mean": 0.9}
    done = {"iteration": 1, "output": "model", "best": None, "before": before, "after": after, "elapsed_s": 65.0}
    (tmp_path / "ppo" / "done.json").write_text(json.dumps(done))
    text = picture_text(draw(tmp_path, command="make quickstart"))
    for words in ("iteration 1/1", "2.00 nats", "0.100 → 0.900", "done in 1 min 5 s", "a <joy>", "-1.000"):
        assert words in text, words


def picture_text(svg: str) -> str:
    root = ElementTree.fromstring(svg)
    return "".join(text for text in root.itertext() if text).replace("\N{NO-BREAK SPACE}", " ")
