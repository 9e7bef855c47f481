"""The time of every stage of a plan, what it costs, and how far it scales, as figures and as tables."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rlhf_ray.config import schema
from rlhf_ray.plan.arithmetic import StageArithmetic
from rlhf_ray.plan.cluster import PLENTY, ClusterShape
from rlhf_ray.plan.data import Lengths
from rlhf_ray.plan.memory import StageMemory
from rlhf_ray.plan.placement import StagePlacement
from rlhf_ray.plan.scaling import MOST_GPUS, Scale, scaling
from rlhf_ray.plan.time import Factors, Hardware, StageTime, stage_time

HALF = 0.5
"""Efficiency below which more GPUs are called too many."""
_GPUS_PER_NODE = 8
"""Of a cluster of which that is not known."""


@dataclass(frozen=True)
class StageEstimate:
    """A stage's time.

    Args:
        stage: its name.
        time: None where nothing is known of the hardware.
        scales: the same on more GPUs; empty without a GPU.
        stops: why there are no more of them; empty where there are enough.
        lacks: why there is no time.
    """

    stage: str
    time: StageTime | None
    scales: tuple[Scale, ...]
    stops: str
    lacks: str

    @property
    def worthless(self) -> Scale | None:
        """The first of the larger sizes at which less than half of the GPUs' work counts; None: it is not reached."""
        return next((scale for scale in self.scales if scale.efficiency < HALF), None)


@dataclass(frozen=True)
class Together:
    """What all stages take, one after the other.

    Args:
        run_s: seconds of all iterations.
        gpu_hours: of the GPUs that each stage holds.
        cost: of those; None without a price.
        held_gpu_hours: of all GPUs of the cluster from the first stage to the last; None where none is named.
        held_cost: of those; None without a price or a cluster.
    """

    run_s: float
    gpu_hours: float
    cost: float | None
    held_gpu_hours: float | None
    held_cost: float | None


def all_stages(estimates: Sequence[StageEstimate], *, gpus: float | None, price: float | None) -> Together | None:
    """What all stages take together; None where that of one is not known.

    Args:
        estimates: of every stage.
        gpus: of the cluster; None where none is named.
        price: of a GPU-hour.
    """
    run_s = gpu_hours = 0.0
    for each in estimates:
        if each.time is None or each.time.run_s is None or each.time.gpu_hours is None:
            return None
        run_s += each.time.run_s
        gpu_hours += each.time.gpu_hours
    held = None if gpus is None else gpus * run_s / 3600
    cost, held_cost = (None if price is None or hours is None else price * hours for hours in (gpu_hours, held))
    return Together(run_s, gpu_hours, cost, held, held_cost)


def hardware(cluster: ClusterShape) -> Hardware:
    """What the workers of a cluster compute on."""
    each = _GPUS_PER_NODE if cluster.gpus >= PLENTY else int(cluster.gpus)
    return Hardware(cluster.gpu, cluster.core, each, cluster.total_cpus)


def estimator(
    config: schema.Pipeline,
    numbers: StageArithmetic,
    placement: StagePlacement,
    memory: StageMemory,
    cluster: ClusterShape,
    lengths: Lengths,
    factors: Factors,
) -> Callable[[schema.Stage], StageTime]:
    """Gives the time of a stage, also with other numbers of workers than those of its placement."""
    shares = {role.role: role.share for role in placement.roles}
    cache = {role.role: role.parts.get("cache") for role in memory.roles if cluster.gpu_gib or role.device == "host"}

    def estimate(stage: schema.Stage) -> StageTime:
        return stage_time(
            config,
            stage,
            numbers,
            shares,
            lengths,
            hardware(cluster),
            cache_gib=cache.get("generator"),
            factors=factors,
        )

    return estimate


def estimate_stage(
    config: schema.Pipeline,
    stage: schema.Stage,
    numbers: StageArithmetic,
    placement: StagePlacement,
    memory: StageMemory,
    cluster: ClusterShape,
    lengths: Lengths,
    factors: Factors,
    *,
    most_gpus: int = MOST_GPUS,
) -> StageEstimate:
    """The time of a stage and how it scales, up to so many GPUs."""
    on_gpu = any(role.share.gpus for role in placement.roles)
    if on_gpu and cluster.gpu is None:
        return StageEstimate(stage.name, None, (), "", "there are no figures of its GPUs")
    estimate = estimator(config, numbers, placement, memory, cluster, lengths, factors)
    roles = [role.role for role in placement.roles]
    scales, stops = scaling(estimate, stage, roles, most=most_gpus) if on_gpu else ([], "")
    return StageEstimate(stage.name, estimate(stage), tuple(scales), stops, "")


# -------------------------------------------------------------------------------------- tables


def time_table(
    estimates: Sequence[StageEstimate], price: float | None, together: Together | None, misfits: Collection[str]
) -> Table:
    """One column for each stage, and one for all of several.

    Args:
        estimates: of every stage.
        price: of a GPU-hour.
        together: what all stages take; None where it is not known.
        misfits: stages that do not fit the cluster.
    """
    times = [each.time for each in estimates if each.time is not None]
    sums = {"whole stage": "?"} if together is None else _sums(together)
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for name in ("", *(time.stage for time in times), *(["together"] if len(estimates) > 1 else [])):
        table.add_column(name, justify="right" if name else "left")
    for name, cell in _rows(price).items():
        cells = [cell(time) for time in times]
        if any(cells):
            table.add_row(name, *cells, *([sums.get(name, "")] if len(estimates) > 1 else []))
    if misfits:
        table.add_row("on this cluster", *("does NOT fit" if time.stage in misfits else "fits" for time in times))
    return table


def _sums(together: Together) -> dict[str, str]:
    return {
        "whole stage": seconds(together.run_s),
        "GPU-hours": _amount(together.gpu_hours),
        "cost": "" if together.cost is None else _amount(together.cost),
    }


def _rows(price: float | None) -> dict[str, Callable[[StageTime], str]]:
    def phase(name: str) -> Callable[[StageTime], str]:
        return lambda time: seconds(time.phases[name]) if name in time.phases else ""

    def cost(time: StageTime) -> str:
        return "" if price is None or time.gpu_hours is None else _amount(price * time.gpu_hours)

    return {
        "row, tokens (mean)": lambda time: f"{time.lengths.row:,.0f}",
        "longest response": lambda time: f"{time.lengths.longest:,.0f}" if time.lengths.longest else "",
        **{name: phase(name) for name in ("generate", "score", "learn", "turns", "sync", "driver")},
        "of which overlaps": lambda time: seconds(time.hidden_s) if time.hidden_s else "",
        "iteration": lambda time: seconds(time.iteration_s),
        "whole stage": lambda time: "?" if time.run_s is None else seconds(time.run_s),
        "GPU-hours": lambda time: _amount(time.gpu_hours) if time.gpu_hours else "",
        "cost": cost,
    }


def _amount(value: float) -> str:
    return "<0.01" if 0 < value < 0.005 else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def scaling_tables(estimates: Sequence[StageEstimate]) -> list[tuple[str, Table, str]]:
    """Of each stage that scales its name, a table, and in words why it ends where it does; empty where it need not."""
    tables = []
    for each in estimates:
        if not each.scales:
            continue
        table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
        for heading in ("workers", "GPUs", "iteration", "efficiency"):
            table.add_column(heading, justify="right")
        table.add_column("held up by")
        for scale in each.scales:
            cells = (f"{scale.factor}x", f"{scale.gpus:,}", seconds(scale.iteration_s), f"{scale.efficiency:.0%}")
            table.add_row(*cells, scale.limit)
        tables.append((each.stage, table, f"{each.stage}: no more: {each.stops}." if each.stops else ""))
    return tables


def held_line(together: Together, cluster: ClusterShape) -> str:
    """What all GPUs of a cluster cost that is there for as long as the pipeline takes."""
    assert together.held_gpu_hours is not None, "there is a cluster"
    assert together.held_cost is not None, "there is a price"
    return (
        f"All {cluster.total_gpus:,.0f} GPUs of {cluster.text} held for the whole pipeline: "
        f"{_amount(together.held_gpu_hours)} GPU-hours, cost {_amount(together.held_cost)}."
    )


def time_lines(estimates: Sequence[StageEstimate], *, measured: Mapping[str, int]) -> list[str]:
    """What the tables do not say; `measured`: how many tasks of each stage have an earlier run's figures."""
    lines = []
    for each in estimates:
        if each.time is None:
            lines.append(f"{each.stage}: no time, {each.lacks}.")
            continue
        if measured.get(each.stage):
            lines.append(f"{each.stage}: {measured[each.stage]} of {len(each.time.tasks)} calls as measured.")
        if each.worthless is not None:
            scale = each.worthless
            lines.append(f"{each.stage}: below 50 % efficiency from {scale.gpus:,} GPUs on: {scale.limit}.")
    return lines


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    if value < 1:
        return f"{1000 * value:,.0f} ms"
    if value < 120:
        return f"{value:,.1f} s"
    return f"{value / 60:,.0f} min" if value < 7200 else f"{value / 3600:,.1f} h"
