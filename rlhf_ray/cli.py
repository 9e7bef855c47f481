"""The command line: `rlhf-ray run | resume | check | settings | doctor`.

Exit codes: 0 done, 1 an error, 2 a mistake in the user's input, 130 after Ctrl-C, 143 after SIGTERM.
torch and Ray are imported only once a pipeline file is found right.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from rlhf_ray.config.describe import METHODS, Setting, list_settings
from rlhf_ray.config.effects import generator_of, rewards_of
from rlhf_ray.config.load import CONFIG_FILE, load_pipeline, read_origin
from rlhf_ray.config.problems import suggestion
from rlhf_ray.config.rules import warnings
from rlhf_ray.config.schema import Collect, FunctionReward, NewModel, Pipeline, Ppo, Sft, Stage
from rlhf_ray.errors import ConfigError, Interrupted, RlhfRayError, UserError

PROGRAM = "rlhf-ray"
DEBUG = "RLHF_RAY_DEBUG"

app = typer.Typer(
    name=PROGRAM,
    help="RLHF on Ray: supervised fine-tuning and PPO with vLLM generators and DeepSpeed learners.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PipelineFile = Annotated[Path, typer.Argument(metavar="PIPELINE", help="Pipeline file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings to change, a stage's name in front, such as ppo.sampling.temperature=0.7 or seed=3.",
        show_default=False,
    ),
]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line (by default that of this process) and exits with its code."""
    app(args=None if arguments is None else list(arguments), prog_name=PROGRAM)
    raise SystemExit(0)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {version('rlhf_ray')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands in front of every command."""


@app.command("run")
def run_command(pipeline: PipelineFile, overrides: Overrides = None) -> None:
    """Run a pipeline, on this machine or on the Ray cluster that the placement section names."""
    with exit_codes():
        config = load_pipeline(pipeline, overrides or [])
        if (Path(config.run_dir).expanduser() / CONFIG_FILE).exists():
            raise ConfigError(
                f"run_dir: got {config.run_dir!r}, which holds another run; go on with it by\n"
                f"  {PROGRAM} resume {config.run_dir}\n"
                "or choose another folder: run_dir=FOLDER"
            )
        _start(config, pipeline_dir=pipeline.resolve().parent, resume=False)


@app.command("resume")
def resume_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.", show_default=False)],
) -> None:
    """Go on with a run at the stage and iteration where it stopped."""
    with exit_codes():
        folder = run_dir.expanduser().absolute()
        if not (folder / CONFIG_FILE).is_file():
            what = "holds no run (there is no config.yaml)" if folder.is_dir() else "is not a folder"
            text = f"{run_dir} {what}; wanted the run_dir of an earlier `{PROGRAM} run`"
            raise ConfigError(f"{text}, not a pipeline file" if folder.is_file() else text)
        pipeline_dir, working_directory = read_origin(folder)
        if working_directory.is_dir() and working_directory != Path.cwd():
            print(f"Relative paths start at {working_directory}, where this run was started.", flush=True)
            os.chdir(working_directory)
        config = load_pipeline(folder / CONFIG_FILE, pipeline_dir=pipeline_dir)
        config = config.model_copy(update={"run_dir": str(folder)})
        _start(config, pipeline_dir=pipeline_dir, resume=True)


@app.command("check")
def check_command(pipeline: PipelineFile, overrides: Overrides = None) -> None:
    """Check a pipeline file and its data files; starts no Ray and loads no model."""
    with exit_codes():
        config = load_pipeline(pipeline, overrides or [])
        for line in warnings(config):
            print(f"warning: {line}", file=sys.stderr, flush=True)
        from rlhf_ray.plan import check_data

        rows = check_data(config)
        _check_functions(config, pipeline.resolve().parent)
        count = "1 stage" if len(config.stages) == 1 else f"{len(config.stages)} stages"
        print(f"ok: {pipeline}, {count}")
        for stage in config.stages:
            print(f"  {summary(config, stage)}")
            counts = [f"{count} rows of {split} data" for split, count in rows[stage.name].items() if count]
            if counts:
                print(f"    {', '.join(counts)}")


@app.command("settings")
def settings_command(
    method: Annotated[
        str | None,
        typer.Argument(help="Method, or a section of it, such as ppo or ppo.kl.", show_default=False),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="One tab-separated line for each setting.")] = False,
) -> None:
    """Print every setting with its default and meaning."""
    with exit_codes():
        groups = _setting_groups(method)
        if plain:
            for name, settings in groups:
                for setting in settings:
                    meaning = " ".join(setting.meaning.split())
                    print(f"{name}\t{setting.key}\t{setting.wanted}\t{setting.default}\t{meaning}")
        else:
            _print_settings(groups)


@app.command("doctor")
def doctor_command() -> None:
    """Print versions, devices, what is missing and how to get it; exit code 1 where a run could not start."""
    with exit_codes():
        from rlhf_ray.doctor import examine

        findings = examine()
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            mark = {"ok": "ok     ", "note": "note   ", "missing": "MISSING"}[finding.state]
            print(f"{mark} {finding.name:<{width}}  {finding.text}")
            if finding.remedy:
                print(f"{'':8}{'':<{width}}  -> {finding.remedy}")
        missing = [finding.name for finding in findings if finding.state == "missing"]
        if missing:
            print(f"A run cannot start: {', '.join(missing)}.")
            raise SystemExit(1)
        print("Everything that a run needs is here.")


# -------------------------------------------------------------------------------------- shared


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turns every way in which a command can end into its message and exit code."""
    try:
        yield
    except UserError as error:
        _fail(str(error), 2)
    except Interrupted as error:
        _fail(str(error), error.exit_code)
    except RlhfRayError as error:
        if os.environ.get(DEBUG) == "1":
            traceback.print_exc()
        _fail(f"{type(error).__name__}: {error}", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output has gone (`rlhf-ray settings | head`): nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Exception:
        traceback.print_exc()
        _fail("an unexpected error; please report it with the lines above", 1)


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def _start(config: Pipeline, *, pipeline_dir: Path, resume: bool) -> None:
    from rlhf_ray.doctor import check_floors

    generators = [generator for stage in config.stages if (generator := generator_of(stage)) is not None]
    check_floors(engine=any(generator.engine == "vllm" for generator in generators))
    _check_functions(config, pipeline_dir)
    for line in warnings(config):
        print(f"warning: {line}", file=sys.stderr, flush=True)
    with _sigterm_exits():
        from rlhf_ray.pipeline import run_pipeline

        run_pipeline(config, pipeline_dir=pipeline_dir, resume=resume)


def _check_functions(config: Pipeline, pipeline_dir: Path) -> None:
    """Loads every reward function here, so that a wrong one is not found by its worker, after an earlier stage."""
    from rlhf_ray.workers.reward_functions import check_function

    for stage in config.stages:
        for reward in rewards_of(stage):
            if isinstance(reward, FunctionReward):
                check_function(reward.function, pipeline_dir, reward.arguments)


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM unwinds the process like Ctrl-C does, with exit code 143; the run itself may take the signal over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def summary(config: Pipeline, stage: Stage) -> str:
    """One line on a stage: what is trained, for how long, and where the result goes."""
    model = stage.policy.model
    name = f"a fresh {model.size} {model.family}" if isinstance(model, NewModel) else model
    if isinstance(stage, Ppo):
        samples = stage.prompts_per_iteration * stage.sampling.samples_per_prompt
        length = f"{stage.iterations} iterations of {samples} samples, {stage.advantages.estimator}"
    elif isinstance(stage, Collect):
        prompts = "every prompt" if stage.prompts is None else f"{stage.prompts} prompts"
        length = f"{stage.sampling.samples_per_prompt} samples for {prompts}, {stage.keep}"
        return f"{stage.name} ({stage.method}): {name}, {length} -> {Path(config.run_dir) / stage.name / 'data'}"
    elif stage.steps is not None:
        length = f"{stage.steps} steps of {stage.batch_size} {'sequences' if isinstance(stage, Sft) else 'pairs'}"
    else:
        length = f"{stage.epochs or 1:g} epochs in batches of {stage.batch_size}"
    return f"{stage.name} ({stage.method}): {name}, {length} -> {Path(config.run_dir) / stage.name / 'model'}"


def _setting_groups(method: str | None) -> list[tuple[str, list[Setting]]]:
    """The settings to show, by heading: the pipeline's and every method's, or those below one key."""
    pipeline = [setting for setting in list_settings(Pipeline) if setting.key.split(".")[0].split(" ")[0] != "stages"]
    groups = [("pipeline", pipeline)]
    groups += [(name, list(list_settings(section))) for name, section in METHODS.items()]
    if method is None:
        return groups
    head, _, below = method.partition(".")
    known = [name for name, _ in groups]
    chosen = dict(groups).get(head)
    if chosen is None:
        raise ConfigError(f"settings: there is no method {head!r}{suggestion(head, known)} (known: {', '.join(known)})")
    if below:
        keys = [setting.key for setting in chosen]
        chosen = [
            setting for setting in chosen if setting.key == below or setting.key.startswith((f"{below}.", f"{below} "))
        ]
        if not chosen:
            raise ConfigError(f"settings: {head} has no setting {below!r}{suggestion(below, keys)}")
    return [(head, chosen)]


def _print_settings(groups: list[tuple[str, list[Setting]]]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    for name, settings in groups:
        console.print(Text(f"\n{name}", style="bold underline"))
        for setting in settings:
            line = Text(setting.key, style="bold cyan" if setting.is_section else "bold")
            depth = setting.key.count(".")
            if setting.is_section:
                required = " (required)" if setting.default == "required" else ""
                line.append(f"{required}  {setting.meaning}", style="not bold")
            else:
                line.append(f" = {setting.default}" if setting.default else "", style="not bold green")
                line.append(f"  {setting.wanted}", style="not bold dim")
            console.print(Padding(line, (0, 0, 0, 2 + 2 * depth)))
            if not setting.is_section:
                console.print(Padding(Text(" ".join(setting.meaning.split())), (0, 0, 0, 6 + 2 * depth)))
