"""The command line: `rlhf-ray run | resume | check | plan | settings | evaluate | generate | report | bench | doctor`;
for runs on a cluster `submit | status | logs | stop | list` (submit.py), and `scale` (scale_command.py).

Exit codes: 0 done, 1 an error, 2 a mistake in the user's input, 130 after Ctrl-C, 143 after SIGTERM.
torch and Ray are imported only once a pipeline file is found right.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from rlhf_ray.bench_commands import app as bench_app
from rlhf_ray.config import schema
from rlhf_ray.config.describe import METHODS, Setting, list_settings
from rlhf_ray.config.load import CONFIG_FILE, load_pipeline, read_origin
from rlhf_ray.config.problems import suggestion
from rlhf_ray.config.rules import warnings
from rlhf_ray.config.schema import Collect, NewModel, Pipeline, Ppo, Sft, Stage
from rlhf_ray.errors import ConfigError
from rlhf_ray.options import (
    Overrides,
    PipelineFile,
    as_options,
    check_target,
    columns_of,
    section,
    source,
    without_effect,
)
from rlhf_ray.plan_command import add_plan
from rlhf_ray.scale_command import add_scale
from rlhf_ray.start import check_functions, start_run
from rlhf_ray.submit import add_commands
from rlhf_ray.terminal import exit_codes, show, sigterm_exits

PROGRAM = "rlhf-ray"
SHOWN_PROMPTS = 3
"""Prompts whose responses are printed where all of them go to a file."""

app = typer.Typer(
    name=PROGRAM,
    help="RLHF on Ray: supervised fine-tuning and PPO with vLLM generators and DeepSpeed learners.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Directory of a model, of a stage or of a run, or a name on the Hugging Face hub.",
        show_default=False,
    ),
]
Rows = Annotated[int | None, typer.Option(min=1, help="Use only the first rows.")]
Split = Annotated[str | None, typer.Option(help="Split of a hub name, a `datasets` folder or a synthetic corpus.")]
Columns = Annotated[
    str | None, typer.Option(metavar="NAME=COLUMN,...", help="Names of the columns, such as prompt=question.")
]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Put texts into the tokenizer's chat template.", show_default=False),
]
DtypeOption = Annotated[str | None, typer.Option(help="Type of the weights: float32 (default) or bfloat16.")]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Workers, each a Ray actor.")]
Address = Annotated[
    str | None, typer.Option(help="A Ray cluster (auto, HOST:PORT); else RAY_ADDRESS, else a new local Ray.")
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
        start_run(config, pipeline_dir=pipeline.resolve().parent, resume=False)


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
        start_run(config, pipeline_dir=pipeline_dir, resume=True)


@app.command("check")
def check_command(pipeline: PipelineFile, overrides: Overrides = None) -> None:
    """Check a pipeline file and its data files; starts no Ray and loads no model."""
    with exit_codes():
        config = load_pipeline(pipeline, overrides or [])
        for line in warnings(config):
            print(f"warning: {line}", file=sys.stderr, flush=True)
        from rlhf_ray.plan import check_data

        rows = check_data(config)
        check_functions(config, pipeline.resolve().parent)
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


@app.command("evaluate")
def evaluate_command(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Preferences: JSONL(.gz), Parquet or CSV file, `datasets` folder, hub name, synthetic:preferences.",
            show_default=False,
        ),
    ],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON as well.")
    ] = None,
    rows: Rows = None,
    split: Split = None,
    columns: Columns = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Longest prompt and answer, in tokens.")] = None,
    too_long: Annotated[str | None, typer.Option(help="Longer pairs: error, drop, cut_left or cut_right.")] = None,
    unusable: Annotated[
        str | None, typer.Option(help="Pairs with equal or empty answers or different prompts: error or drop.")
    ] = None,
    answer_marker: Annotated[
        str | None, typer.Option(help="Where there is no prompt column: what stands before the answer.")
    ] = None,
    chat: Chat = None,
    dtype: DtypeOption = None,
    workers: WorkersOption = None,
    address: Address = None,
) -> None:
    """Measure how well a reward model agrees with preferences."""
    with exit_codes(), as_options():
        preferences = section(
            schema.PreferenceData,
            train=source(data, rows=rows, split=split),
            columns=columns_of(schema.PreferenceColumns, columns),
            max_length=max_length,
            too_long=too_long,
            unusable=unusable,
            answer_marker=answer_marker,
            chat_template=chat,
        )
        scorer = section(schema.ModelReward, kind="model", model=model, dtype=dtype, workers=workers)
        check_target("--json", json_file)
        from rlhf_ray.doctor import check_floors

        check_floors(engine=False)
        with sigterm_exits():
            from rlhf_ray.inference import evaluate
            from rlhf_ray.trainers.preference_report import report_tables, write_report

            report = evaluate(model, preferences, scorer=scorer, address=address)
        show(report_tables(report, histogram=True))
        if json_file is not None:
            write_report(json_file, report)


@app.command("generate")
def generate_command(
    model: ModelArgument,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A prompt; may be given again.", show_default=False)
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prompts: a data file, folder or hub name, as in a pipeline.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every response to this Parquet file.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A second model, on the same prompts and seeds.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(metavar="REWARD", help="What scores the responses: module:function, or a reward model."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Softmax temperature, 1 by default; 0 is greedy.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens of this probability mass.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Keep only the k likeliest tokens.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 128,
    samples: Annotated[int, typer.Option(min=1, help="Responses for each prompt.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a response; may be given again.")] = None,
    beams: Annotated[int | None, typer.Option(min=1, help="Beam search that follows so many responses.")] = None,
    length_penalty: Annotated[
        float | None,
        typer.Option(help="With --beams: log-probability / length ** penalty is compared; 1 by default."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Root of the seeds; the same seed gives the same responses.")] = 1,
    rows: Rows = None,
    split: Split = None,
    columns: Columns = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt of the file.")] = None,
    too_long: Annotated[str | None, typer.Option(help="Longer prompts: error, drop, cut_left or cut_right.")] = None,
    chat: Chat = None,
    engine: Annotated[str | None, typer.Option(help="vllm, or hf where vLLM has no build.")] = None,
    dtype: DtypeOption = None,
    workers: WorkersOption = None,
    address: Address = None,
) -> None:
    """Write responses to prompts, with one model or with two side by side."""
    with exit_codes(), as_options():
        if bool(prompt) == (prompts is not None):
            got = "both" if prompt else "neither"
            raise ConfigError(f"got {got} of --prompt TEXT and --prompts FILE, wanted one of them")
        if any(not text.strip() for text in prompt or ()):
            raise ConfigError("--prompt: got an empty text, wanted a prompt")
        if prompts is None:
            for_file = {"rows": rows, "split": split, "columns": columns, "max-prompt-tokens": max_prompt_tokens}
            without_effect(for_file | {"too-long": too_long}, "without --prompts")
        if beams is None:
            without_effect({"length-penalty": length_penalty}, "without --beams")
        else:
            sampled = {"temperature": temperature, "top-p": top_p, "top-k": top_k, "stop": stop or None}
            without_effect(sampled, "with --beams")
        if beams is not None and samples > beams:
            raise ConfigError(f"--samples: got {samples}, wanted at most --beams, {beams}")
        if beams is None and temperature == 0 and samples > 1:
            raise ConfigError(f"--samples: got {samples}, wanted 1: at temperature 0 they are all the same")
        data: schema.PromptData | tuple[str, ...] = tuple(prompt or ())
        if prompts is not None:
            data = section(
                schema.PromptData,
                train=source(prompts, rows=rows, split=split),
                columns=columns_of(schema.PromptColumns, columns),
                chat_template=chat,
                max_prompt_tokens=max_prompt_tokens or sys.maxsize,
                too_long=too_long,
            )
        sampling = section(
            schema.Sampling,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_new_tokens=max_new_tokens,
            stop=stop,
            samples_per_prompt=samples,
        )
        generator = section(schema.Generator, engine=engine, dtype=dtype, workers=workers)
        scorer = None if reward is None else _reward(reward)
        check_target("--output", output, ".parquet")
        from rlhf_ray.doctor import check_floors

        check_floors(engine=generator.engine == "vllm")
        with sigterm_exits():
            from rlhf_ray.inference import Generation, generate
            from rlhf_ray.responses import show_responses, show_scores, write_responses

            asked = Generation(
                models=(model,) if compare is None else (model, compare),
                prompts=data,
                chat=bool(chat),
                sampling=sampling,
                beams=beams,
                length_penalty=1.0 if length_penalty is None else length_penalty,
                seed=seed,
                generator=generator,
                reward=scorer,
            )
            answered = generate(asked, address=address)
        if output is not None:
            write_responses(output, answered)
        show(show_responses(answered, prompts=sys.maxsize if output is None else SHOWN_PROMPTS))
        show(show_scores(answered))
        if output is not None:
            show(f"all responses: {output}")


@app.command("report")
def report_command(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders of runs, done or not.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write the page; report.html in the first run's folder by default."),
    ] = None,
) -> None:
    """Write one HTML page about a run, or several runs side by side: curves, timeline, memory, samples, settings."""
    with exit_codes():
        check_target("--output", output, ".html")
        from rlhf_ray.report.page import FILE, write_report

        page = output or run_dirs[0] / FILE
        write_report(run_dirs, page)
        print(page)


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


app.add_typer(bench_app, name="bench")
add_commands(app)
add_plan(app)
add_scale(app)


# -------------------------------------------------------------------------------------- shared


def _reward(text: str) -> schema.ModelReward | schema.FunctionReward:
    """`module:function`, looked up in this folder or on the Python path, or the name of a reward model."""
    if ":" not in text:
        return section(schema.ModelReward, kind="model", model=text)
    from rlhf_ray.workers.reward_functions import check_function

    check_function(text, Path.cwd(), {})
    return section(schema.FunctionReward, kind="function", function=text)


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
