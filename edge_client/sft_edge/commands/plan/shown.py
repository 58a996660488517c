"""Plans as a table, as JSON, and as a chart."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence

from sft.plan.plans import Limits, Plan, by_time
from sft.printable import format_bytes, format_seconds
from sft_edge.commands.compare import svg
from sft_edge.commands.compare.charts import Chart, Curve, Spot, picture
from sft_edge.commands.plan.measure import Measured
from sft_edge.commands.plan.predict import Run
from sft_edge.commands.reproduce.tables import Table, print_table

FLAGS = {
    "step_bytes": "--max-bytes-per-step",
    "run_bytes": "--data-cap",
    "edge_memory_bytes": "--max-edge-memory",
    "run_seconds": "--max-run-time",
    "points": "--min-accuracy",
}
"""Of limits."""

_FEW = 3
"""Of each mode, in the table."""


def figure(name: str, value: Optional[float]) -> str:
    """Of a plan, or its limit, by the name that it has there."""
    if value is None:
        return "-"
    if name.endswith("bytes"):
        return format_bytes(value)
    return f"{value:+.1f}" if name == "points" else format_seconds(value)


def print_plans(run: Run, plans: Sequence[Plan], limits: Limits, chosen: Optional[Plan], every: bool) -> None:
    """The fastest first; without `every` the best few of each mode."""
    shown = [one for one in by_time(plans) if every or one in _few(plans, limits)]
    with_price = any(one.price is not None for one in plans)
    columns = ["", "s/step", "run", "bytes/step", "bytes", "price", "edge memory", "edge CPU", "points", ""]
    rows = [_row(one, limits, chosen) for one in shown]
    if not with_price:
        columns, rows = [_without_price(columns), [_without_price(row) for row in rows]]
    title = f"{run.steps} steps, {run.steps_in_epoch} an epoch; points are against the whole model in one process"
    print_table(Table(title, columns, rows))


def _without_price(cells: List[str]) -> List[str]:
    return [*cells[:5], *cells[6:]]


def _few(plans: Sequence[Plan], limits: Limits) -> List[Plan]:
    """Of each mode: those within limits first."""
    found: List[Plan] = []
    for mode in dict.fromkeys(plan.mode for plan in plans):
        of_mode = sorted(
            by_time([plan for plan in plans if plan.mode == mode]), key=lambda one: len(limits.excess(one))
        )
        found += of_mode[:_FEW]
    return found


def _row(plan: Plan, limits: Limits, chosen: Optional[Plan]) -> List[str]:
    points = figure("points", plan.points)
    if plan.points is not None:
        points += " +/- ?" if plan.spread is None else f" +/- {plan.spread:.1f}"
    broken = ", ".join(FLAGS[name] for name in limits.excess(plan))
    return [
        plan.name,
        f"{plan.step_seconds:.3f}",
        figure("run_seconds", plan.run_seconds),
        figure("step_bytes", plan.step_bytes),
        figure("run_bytes", plan.run_bytes),
        "-" if plan.price is None else f"{plan.price:.2f}",
        figure("edge_memory_bytes", plan.edge_memory_bytes),
        figure("edge_processor_seconds", plan.edge_processor_seconds),
        points,
        "best" if plan == chosen else f"not within {broken}" if broken else "",
    ]


def as_json(
    run: Run, measured: Mapping[str, Measured], plans: Sequence[Plan], limits: Limits, chosen: Optional[Plan]
) -> Dict[str, Any]:
    """All of it."""
    return {
        "best": None if chosen is None else asdict(chosen),
        "plans": [{**asdict(one), "breaks": [FLAGS[name] for name in limits.excess(one)]} for one in by_time(plans)],
        "limits": {FLAGS[name]: value for name, value in limits._asdict().items()},
        "steps": run.steps,
        "steps_in_epoch": run.steps_in_epoch,
        "way": run.way._asdict(),
        "measured": [
            {"mode": mode, "split_layer": layer, "padded_length": length, **sample._asdict()}
            for mode, one in measured.items()
            for (layer, length), sample in one.samples.items()
        ],
    }


def picture_of(plans: Sequence[Plan], blocks: int) -> str:
    """Seconds a step over the block that is cut: a curve for each mode and code; one process as a line across."""
    curves = list(_curves(plans))
    chart = Chart("seconds a step", f"block that is cut, of {blocks}", "seconds", False, lambda x: f"{x:g}", curves)
    return picture([chart]) + "\n"


def _curves(plans: Sequence[Plan]) -> Iterator[Curve]:
    kinds: Dict[str, List[Plan]] = {}
    for plan in plans:
        rank = f" R={plan.split_rank}" if plan.split_rank else ""
        kinds.setdefault(f"{plan.mode}{rank} {plan.codec}".rstrip(), []).append(plan)
    for index, (name, some) in enumerate(kinds.items()):
        spots = [
            Spot(one.split_layer, one.step_seconds, one.step_seconds, one.step_seconds, _says(one)) for one in some
        ]
        if some[0].split_layer:
            yield Curve(name, svg.mark_of(index), sorted(spots))
        elif len(kinds) > 1:  # a chart needs a point
            yield Curve(name, svg.mark_of(index), [], some[0].step_seconds)
        else:
            yield Curve(name, svg.mark_of(index), spots)


def _says(plan: Plan) -> str:
    return f"{plan.name}: {plan.step_seconds:.3f} s and {format_bytes(plan.step_bytes)} a step"
