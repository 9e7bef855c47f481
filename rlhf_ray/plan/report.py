"""A pipeline's plan as a whole, as tables and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_ray.config import schema
from rlhf_ray.config.layouts import layout_settings
from rlhf_ray.config.node_labels import in_words
from rlhf_ray.errors import ConfigError
from rlhf_ray.plan.arithmetic import StageArithmetic, arithmetic, known_rows
from rlhf_ray.plan.cluster import PLENTY, ClusterShape, cluster_as_object
from rlhf_ray.plan.data import check_data, data_lengths
from rlhf_ray.plan.estimate import (
    StageEstimate,
    Together,
    all_stages,
    estimate_stage,
    held_line,
    scaling_tables,
    seconds,
    time_lines,
    time_table,
)
from rlhf_ray.plan.measured import NOTHING, Measured
from rlhf_ray.plan.memory import StageMemory, plan_memory, yaml_text
from rlhf_ray.plan.placement import StagePlacement, plan_placement
from rlhf_ray.plan.suggest import Suggestion, refusal, suggest

_UNKNOWN = "?"


@dataclass(frozen=True)
class Plan:
    """What a pipeline needs.

    Args:
        cluster: what it was made for.
        named: whether the user named a cluster.
        layout: the settings that `placement.layout` stands for, by stage.
        placement: what is reserved, in the order of time.
        arithmetic: each stage in numbers.
        memory: of what is reserved, in the same order as the placement.
        time: of each stage.
        measured: how many calls of each stage have the figures of an earlier run.
        price: of a GPU-hour; None where none is given.
    """

    cluster: ClusterShape
    named: bool
    layout: dict[str, dict[str, Any]]
    placement: tuple[StagePlacement, ...]
    arithmetic: tuple[StageArithmetic, ...]
    memory: tuple[StageMemory, ...]
    time: tuple[StageEstimate, ...]
    measured: dict[str, int]
    price: float | None

    @property
    def misfits(self) -> set[str]:
        """The stages for which the cluster has no room, in workers or, as far as it is known, in memory."""
        lacking = {each.stage for each in self.placement if each.shortage is not None}
        return lacking | {each.stage for each in self.memory if each.fits is False}

    @property
    def fits(self) -> bool:
        """Whether the cluster has room for every stage."""
        return not self.misfits

    @property
    def together(self) -> Together | None:
        """What all stages take; None where that of one is not known."""
        return all_stages(self.time, gpus=self.cluster.total_gpus if self.named else None, price=self.price)


def make_plan(
    config: schema.Pipeline,
    cluster: ClusterShape,
    *,
    named: bool,
    measured: Measured = NOTHING,
    price: float | None = None,
) -> Plan:
    """The plan of a pipeline; reads and checks its data, and starts nothing.

    Args:
        config: the pipeline.
        cluster: what it is made for.
        named: whether the user named a cluster.
        measured: figures of an earlier run.
        price: of a GPU-hour.

    Raises:
        UserError: data is wrong, or a model cannot be read.
    """
    rows = check_data(config)
    gpus = cluster.total_gpus
    strategy = config.placement.strategy
    placement, numbers, memory, time = [], [], [], []
    for stage in config.stages:
        found = arithmetic(stage, known_rows(stage, rows[stage.name]), gpus=gpus)
        reserved = plan_placement(stage, cluster, strategy=strategy)
        of_stage = [plan_memory(config, stage, each, found, cluster) for each in reserved]
        numbers.append(found)
        placement += reserved
        memory += of_stage
        lengths = measured.lengths.get(stage.name) or data_lengths(stage)
        factors = measured.factors.get(stage.name, {})
        time.append(estimate_stage(config, stage, found, reserved[-1], of_stage[-1], cluster, lengths, factors))
    used = {name: len(factors) for name, factors in measured.factors.items()}
    return Plan(
        cluster, named, _layout(config), tuple(placement), tuple(numbers), tuple(memory), tuple(time), used, price
    )


def check_options(plan: Plan, *, scaling: bool) -> None:
    """Refuses options of which the plan shows nothing.

    Raises:
        ConfigError: more GPUs or a price are asked for, and nothing is known of GPUs, or no stage is on one.
    """
    asked = [name for name, on in (("--scaling", scaling), ("--gpu-hour-price", plan.price is not None)) if on]
    if asked and not any(each.time is not None and each.time.gpus for each in plan.time):
        why = refusal(plan.cluster) or f"no stage is on a GPU of {plan.cluster.text}"
        raise ConfigError(f"{asked[0]}: {why}")


def _layout(config: schema.Pipeline) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for (_, index, *key), value in layout_settings(config).items():
        assert isinstance(index, int), "settings of a layout are those of a stage"
        found.setdefault(config.stages[index].name, {})[".".join(map(str, key))] = value
    return found


def make_suggestions(
    config: schema.Pipeline, cluster: ClusterShape, measured: Measured = NOTHING
) -> tuple[Suggestion, ...]:
    """The fastest placement of every stage on a cluster.

    Raises:
        UserError: data is wrong, a model cannot be read, or nothing can be said of this cluster.
    """
    why = refusal(cluster)
    if why is not None:
        raise ConfigError(f"--suggest: {why}")
    rows = check_data(config)
    return tuple(
        suggest(
            config,
            stage,
            known_rows(stage, rows[stage.name]),
            cluster,
            measured.lengths.get(stage.name) or data_lengths(stage),
            measured.factors.get(stage.name, {}),
        )
        for stage in config.stages
    )


def suggested_overrides(suggestions: Sequence[Suggestion], *, named: bool) -> list[str]:
    """The settings as overrides, each behind its stage's name where stages are `named`."""
    return [
        f"{each.stage + '.' if named else ''}{key}={yaml_text(value)}"
        for each in suggestions
        for key, value in each.settings.items()
    ]


def suggestion_lines(suggestions: Sequence[Suggestion], overrides: Sequence[str], cluster: ClusterShape) -> list[str]:
    """What is suggested, in words and as overrides to be put behind the pipeline's file."""
    lines = []
    if overrides:
        lines.append(f"Suggested for {cluster.text}, the fastest that fits by the estimate:")
        lines += [f"  {each}" for each in overrides]
    for each in suggestions:
        if each.reason:
            lines.append(f"{each.stage}: nothing fits: {each.reason}.")
        elif not each.settings:
            lines.append(f"{each.stage}: its own settings are the fastest.")
        else:
            assert each.iteration_s is not None, "a suggestion has its time"
            before = "does not fit" if each.before_s is None else f"takes {seconds(each.before_s)}"
            lines.append(f"{each.stage}: an iteration takes {seconds(each.iteration_s)}; as it is it {before}.")
    return lines


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON can write it; what is not limited or not known is null."""
    found: dict[str, Any] = _plain(asdict(plan) | {"cluster": cluster_as_object(plan.cluster)})
    for stage, written in zip(plan.memory, found["memory"], strict=True):
        written["fits"] = stage.fits
        for role, of_role in zip(stage.roles, written["roles"], strict=True):
            of_role |= {"total": role.total, "fits": role.fits}
        for shared, of_shared in zip(stage.shared, written["shared"], strict=True):
            of_shared["fits"] = shared.fits
    for estimate, written in zip(plan.time, found["time"], strict=True):
        if (time := estimate.time) is not None:
            written["time"] |= {
                "iteration_s": time.iteration_s,
                "run_s": time.run_s,
                "gpu_hours": time.gpu_hours,
                "cost": None if plan.price is None or time.gpu_hours is None else plan.price * time.gpu_hours,
            }
    found["together"] = None if plan.together is None else asdict(plan.together)
    return {"fits": plan.fits if found.pop("named") else None} | found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def plan_tables(plan: Plan, *, scaling: bool) -> RenderableType:
    """The tables, each under its heading.

    Args:
        plan: what they show.
        scaling: the time on more GPUs too, a table for each stage.
    """
    parts: list[RenderableType] = [_heading("Batches"), _arithmetic_table(plan.arithmetic)]
    parts += [_heading(f"Placement on {plan.cluster.text}"), _placement_table(plan)]
    parts += [Text(line) for line in _placement_lines(plan)]
    parts += [_heading("\nMemory of one worker at its peak, GiB"), _memory_table(plan.memory)]
    parts += [Text(line) for line in _memory_lines(plan)]
    if any(each.time is not None for each in plan.time):
        misfits = plan.misfits if plan.named else ()
        table = time_table(plan.time, plan.price, plan.together, misfits)
        parts += [_heading(f"\nTime of an iteration on {plan.cluster.text}"), table]
        parts += [Text(line) for line in time_lines(plan.time, measured=plan.measured)]
        if plan.named and plan.price is not None and plan.together is not None:
            parts.append(Text(held_line(plan.together, plan.cluster)))
        for stage, table, ended in scaling_tables(plan.time) if scaling else ():
            parts += [_heading(f"\n{stage} on more GPUs, the batch unchanged"), table]
            parts += [Text(ended)] if ended else []
    elif plan.named:
        parts += [Text(line) for line in time_lines(plan.time, measured=plan.measured)]
    return Group(*parts)


def _heading(text: str) -> Text:
    return Text(text, style="bold")


# ------------------------------------------------------------------------------------- batches


def _arithmetic_table(stages: Sequence[StageArithmetic]) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("")
    for stage in stages:
        table.add_column(stage.stage, justify="right")
    for name, cell in _ARITHMETIC.items():
        cells = [cell(stage) for stage in stages]
        if any(cells):
            table.add_row(name, *cells)
    return table


def _number(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:,.3g}" if value < 100 and value != int(value) else f"{value:,.0f}"


def _sizes(sizes: dict[int, int]) -> str:
    """`3 x 16, 1 x 12`; nothing for none."""
    return ", ".join(f"{number:,} x {size:,}" for size, number in sizes.items())


def _of_learners(stage: StageArithmetic, value: Callable[[Any], str]) -> str:
    found = {role: value(learner) for role, learner in stage.learners.items()}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ", ".join(f"{role} {text}" for role, text in found.items())


_ARITHMETIC: dict[str, Callable[[StageArithmetic], str]] = {
    "rows of data": lambda s: _number(s.rows),
    "passes over them": lambda s: _number(s.passes),
    "iterations": lambda s: _number(s.iterations),
    "batch": lambda s: f"{s.batch:,} {s.unit}",
    "smaller batches": lambda s: _sizes(s.last_batches),
    "samples of a batch": lambda s: _number(s.samples) if s.samples else "",
    "handed over in": lambda s: _sizes(s.chunks),
    "sampled ahead": lambda s: f"{s.staleness} iteration" if s.staleness else "",
    "epochs of a batch": lambda s: _number(s.epochs) if s.epochs > 1 else "",
    "mini-batches": lambda s: _sizes(s.mini_batches),
    "longest row, tokens": lambda s: _of_learners(s, lambda each: _number(each.row_tokens)),
    "micro-batches of such rows": lambda s: _of_learners(s, lambda each: _number(each.micro_batches)),
    "steps per iteration": lambda s: _number(s.steps) if s.steps else "",
    "optimizer steps in all": lambda s: _of_learners(s, lambda each: _number(each.steps)),
}


# ----------------------------------------------------------------------------------- placement


def _placement_table(plan: Plan) -> Table:
    several = plan.cluster.nodes > 1
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("stage")
    table.add_column("role")
    for heading in ("workers", "CPUs each", "GPUs each"):
        table.add_column(heading, justify="right")
    table.add_column("bundles" + (" (workers on node)" if several else ""))
    for stage in plan.placement:
        name = f"{stage.stage}, {stage.while_}" if stage.while_ else stage.stage
        for role in stage.roles:
            nodes = ", ".join(f"{count} on {node + 1}" for node, count in sorted(role.nodes.items()))
            bundles = f"those of {role.shares_with}" if role.shares_with else _bundles(stage, role.role)
            if role.node_labels:
                bundles += f" where {in_words(role.node_labels)}"
            table.add_row(
                name,
                role.role,
                str(role.workers),
                f"{role.share.cpus:g}",
                f"{role.share.gpus:g}",
                bundles + (f" ({nodes})" if several and nodes else ""),
            )
            name = ""
        table.add_row("", "together", "", f"{stage.wanted.cpus:g}", f"{stage.wanted.gpus:g}", _groups(stage))
        table.add_section()
    return table


def _bundles(stage: StagePlacement, role: str) -> str:
    """`4 x {CPU 2, GPU 1}` for the bundles whose first role it is."""
    own = Counter(share for group in stage.groups for roles, share in group if roles.split(" + ")[0] == role)
    return ", ".join(
        f"{number} x {{{', '.join(f'{what} {amount:g}' for what, amount in share.bundle().items())}}}"
        for share, number in own.items()
    )


def _groups(stage: StagePlacement) -> str:
    count = len(stage.groups)
    return f"{sum(map(len, stage.groups))} in {count} placement group{'s' if count > 1 else ''}"


def _placement_lines(plan: Plan) -> list[str]:
    cluster = plan.cluster
    lines = [
        f"placement.layout makes of {stage}: {' '.join(f'{key}={yaml_text(value)}' for key, value in settings.items())}"
        for stage, settings in plan.layout.items()
    ]
    if not plan.named:
        lines.append(
            "No cluster is named: every worker gets what it asks for. --here or --cluster 2x8xH100-80 compares."
        )
    elif cluster.running:
        for node in cluster.running:
            free, has = node.free, node.has
            lines.append(
                f"{node.address}: {free.cpus:g} of {has.cpus:g} CPUs and {free.gpus:g} of {has.gpus:g} GPUs are free"
                f"{f' ({node.gpu})' if node.gpu else ''}."
            )
    else:
        cpus = "unknown CPUs" if cluster.cpus >= PLENTY else f"{cluster.cpus:g} CPUs"
        lines.append(f"There are {cluster.nodes} x ({cpus}, {cluster.gpus:g} GPUs).")
    for stage in plan.placement:
        if stage.shortage is not None:
            lines.append(f"{stage.stage} does NOT fit: {stage.shortage}")
            lines += [f"  it would with {change}" for change in stage.changes]
    if plan.named and all(stage.shortage is None for stage in plan.placement):
        lines.append("Every stage has its workers' room.")
    return lines


# -------------------------------------------------------------------------------------- memory

_PARTS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "Adam",
    "activations": "activ.",
    "logits": "logits",
    "file": "file",
    "cache": "cache",
    "buckets": "buckets",
    "sync": "sync",
    "reserve": "reserve",
}

_MOMENTS = {
    "sampling": "the engines sample",
    "transfer": "weights are sent",
    "proof": "the engines prove their weights",
    "learning": "the learners learn",
}


def _memory_table(stages: Sequence[StageMemory]) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("stage", "role", "on"):
        table.add_column(heading, overflow="fold")
    shown = [part for part in _PARTS if any(part in role.parts for stage in stages for role in stage.roles)]
    for heading in (*(_PARTS[part] for part in shown), "total", "room"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in stages:
        name = f"{stage.stage}, {stage.while_}" if stage.while_ else stage.stage
        for role in stage.roles:
            cells = [_gib(role.parts.get(part)) for part in shown]
            table.add_row(name, role.role, role.device, *cells, _gib(role.total), _gib(role.room))
            name = ""
        for shared in stage.shared:
            where = [f"all on {shared.roles[0]}'s", "GPU", *[""] * len(shown)]
            table.add_row("", *where, _gib(shared.total), _gib(shared.room))
        total, room = _gib(stage.host), _gib(stage.host_room)
        table.add_row("", "the fullest node", "host", *[""] * len(shown), total, room)
        table.add_section()
    return table


def _gib(value: float | None) -> str:
    if value is None or 0 < value < 0.005:
        return "" if value is None else "<0.01"
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _memory_lines(plan: Plan) -> list[str]:
    lines = []
    for stage in plan.memory:
        for role in stage.roles:
            where = f"{stage.stage} {role.role}"
            if role.note:
                lines.append(f"{where}: {role.note}.")
            if role.fits is False:
                lines.append(f"{where} does NOT fit: {_gib(role.total)} GiB for {_gib(role.room)} GiB of its GPU.")
                lines += [f"  what helps most: {role.advice}"] if role.advice else []
        for shared in stage.shared:
            if shared.moment:
                lines.append(
                    f"{stage.stage}: what is on {shared.roles[0]}'s GPU takes most while {_MOMENTS[shared.moment]}."
                )
            if shared.fits is False:
                lines.append(
                    f"{stage.stage} {', '.join(shared.roles)} do NOT fit: {_gib(shared.total)} GiB for "
                    f"{_gib(shared.room)} GiB of the GPU that they share."
                )
                lines += [f"  what helps most: {shared.advice}"] if shared.advice else []
        if stage.host_room is not None and stage.host > stage.host_room:
            lines.append(
                f"{stage.stage} does NOT fit: {_gib(stage.host)} GiB for a node's {_gib(stage.host_room)} GiB."
            )
            lines += [f"  what helps most: {stage.advice}"] if stage.advice else []
    unknown = plan.named and plan.cluster.host_gib is None
    if plan.named and all(stage.fits for stage in plan.memory):
        lines.append(f"Every stage has the {'GPU ' if unknown else ''}memory that it needs.")
    if unknown:
        most = max(plan.memory, key=lambda stage: stage.host)
        lines.append(
            f"Host memory of such nodes is not known: the fullest takes {_gib(most.host)} GiB ({most.stage}); "
            f"--cluster {plan.cluster.text}/GB compares."
        )
    return lines
