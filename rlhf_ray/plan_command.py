"""`rlhf-ray plan PIPELINE`: what a pipeline needs, before anything is started."""

from __future__ import annotations

from typing import Annotated

import typer

from rlhf_ray.config.load import load_pipeline
from rlhf_ray.errors import ConfigError
from rlhf_ray.options import Overrides, PipelineFile
from rlhf_ray.terminal import exit_codes, show


def add_plan(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("plan")(plan_command)


def plan_command(
    pipeline: PipelineFile,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="NODESxGPUSxNAME-GB",
            help="Compare with 2x8xH100-80, or 2x16xCPU-64 without GPUs.",
            show_default=False,
        ),
    ] = None,
    here: Annotated[bool, typer.Option("--here", help="Compare with this machine.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Print batches, placement and memory of a pipeline; starts no Ray and loads no model."""
    with exit_codes():
        if here and cluster is not None:
            raise ConfigError("got both of --here and --cluster, wanted one of them")
        config = load_pipeline(pipeline, overrides or [])
        from rlhf_ray.plan.cluster import parse_cluster, this_machine, unnamed_cluster

        shape = this_machine() if here else unnamed_cluster() if cluster is None else parse_cluster(cluster)
        from rlhf_ray.plan.report import as_json, make_plan, plan_tables

        plan = make_plan(config, shape, named=here or cluster is not None)
        if json_output:
            import json

            print(json.dumps(as_json(plan), indent=2))
        else:
            show(plan_tables(plan))
