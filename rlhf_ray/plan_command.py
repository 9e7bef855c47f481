"""`rlhf-ray plan PIPELINE`: what a pipeline needs, before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_ray.config.load import has_stages, load_pipeline
from rlhf_ray.errors import ConfigError
from rlhf_ray.options import Overrides, PipelineFile
from rlhf_ray.terminal import exit_codes, show

if TYPE_CHECKING:
    from rlhf_ray.plan.cluster import ClusterShape
    from rlhf_ray.plan.suggest import Suggestion


def add_plan(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("plan")(plan_command)


def plan_command(
    pipeline: PipelineFile,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="NODESxGPUSxNAME-GB[/GB]",
            help="Compare with 2x8xH100-80, with 2x8xH100-80/1024 where nodes have 1024 GB of host memory, or with "
            "2x16xCPU-64 without GPUs.",
            show_default=False,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Compare with a running cluster: its dashboard (HOST:8265), or on one of its machines HOST:6379 or "
            "auto.",
            show_default=False,
        ),
    ] = None,
    here: Annotated[bool, typer.Option("--here", help="Compare with this machine.")] = False,
    measured: Annotated[
        Path | None,
        typer.Option(metavar="RUN_DIR", help="Correct the times by what an earlier run took.", show_default=False),
    ] = None,
    gpu_hour_price: Annotated[
        float | None, typer.Option(min=0, metavar="PRICE", help="Of one GPU for an hour; gives the cost.")
    ] = None,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Find the placement that fits and is the fastest, and plan with it.")
    ] = False,
    scaling: Annotated[bool, typer.Option("--scaling", help="Show the time on up to 4096 GPUs.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Print batches, placement, memory and time of a pipeline; starts no Ray and loads no model.

    Exit code 1: it does not fit the cluster that is named by --cluster, --here or --address.
    """
    with exit_codes():
        given = [name for name, value in (("--here", here), ("--cluster", cluster), ("--address", address)) if value]
        if len(given) > 1:
            raise ConfigError(f"got {' and '.join(given)}, wanted one of them")
        config = load_pipeline(pipeline, overrides or [])
        shape = _cluster(here=here, cluster=cluster, address=address)
        from rlhf_ray.plan.measured import NOTHING, read_measured
        from rlhf_ray.plan.report import (
            as_json,
            check_options,
            make_plan,
            make_suggestions,
            plan_tables,
            suggested_overrides,
            suggestion_lines,
        )

        figures = NOTHING if measured is None else read_measured(measured, config, shape)
        lines: list[str] = []
        suggestions: tuple[Suggestion, ...] = ()
        if suggest:
            suggestions = make_suggestions(config, shape, figures)
            chosen = suggested_overrides(suggestions, named=has_stages(pipeline))
            lines = suggestion_lines(suggestions, chosen, shape)
            config = load_pipeline(pipeline, [*(overrides or ()), *chosen])
        plan = make_plan(config, shape, named=bool(given), measured=figures, price=gpu_hour_price)
        check_options(plan, scaling=scaling)
        if json_output:
            import json

            found = {each.stage: each.settings for each in suggestions}
            print(json.dumps(as_json(plan) | ({"suggested": found} if suggest else {}), indent=2))
        else:
            if lines:
                show("\n".join([*lines, ""]))
            show(plan_tables(plan, scaling=scaling))
        if given and not plan.fits:
            raise SystemExit(1)


def _cluster(*, here: bool, cluster: str | None, address: str | None) -> ClusterShape:
    from rlhf_ray.plan.cluster import parse_cluster, running_cluster, this_machine, unnamed_cluster

    if here:
        return this_machine()
    if address is not None:
        from rlhf_ray.distributed.nodes import cluster_nodes

        return running_cluster(cluster_nodes(address), address)
    return unnamed_cluster() if cluster is None else parse_cluster(cluster)
