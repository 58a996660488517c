"""The plots: scores over the block that is cut, or over the rank, with the paper's beside where it has numbers."""

from __future__ import annotations

import statistics
from typing import Callable, Dict, Iterator, List, Mapping, Optional

from sft_edge.commands.compare import svg
from sft_edge.commands.compare.charts import Chart, Curve, Spot, picture
from sft_edge.commands.reproduce import paper
from sft_edge.commands.reproduce.comparison import Comparison
from sft_edge.commands.reproduce.grid import BASELINE, System


def plot_of(comparison: Comparison) -> Optional[str]:
    """An SVG; None while no run is finished that would be a point of it."""
    charts = list(_over_ranks(comparison) if comparison.figure == "table1" else over_blocks(comparison))
    return picture(charts) if charts else None


def over_blocks(comparison: Comparison) -> Iterator[Chart]:
    """One a task: a curve a system, and the baseline across."""
    for task in comparison.tasks:
        curves: Dict[str, List[Spot]] = {}
        for system in comparison.systems:
            scores = list(comparison.scores(system, task).values())
            if system != BASELINE and scores:
                curves.setdefault(system.curve, []).append(_spot(system.split_layer, scores, system.title))
        names = list(dict.fromkeys(system.curve for system in comparison.systems if system != BASELINE))
        drawn = [Curve(name, svg.mark_of(names.index(name) + 1), sorted(spots)) for name, spots in curves.items()]
        if not drawn:
            continue
        base = list(comparison.scores(BASELINE, task).values())
        if base:
            drawn.insert(0, Curve(BASELINE.title, svg.mark_of(0), [], statistics.fmean(base)))
        metric = comparison.metrics[task]
        yield Chart(f"{comparison.figure}: {task}", "block that is cut", metric, False, _count, drawn)


def _over_ranks(comparison: Comparison) -> Iterator[Chart]:
    """What is lost against the baseline: here, of each block that was cut, and in the paper."""
    layers = dict.fromkeys(system.split_layer for system in comparison.systems if system != BASELINE)
    for layer in layers:
        ranks = {system.split_rank: system for system in comparison.systems if system.split_layer == layer}
        curves = _curves(comparison, list(ranks), lambda task, rank, of=ranks: _lost(comparison, of[rank], task))
        if curves:
            yield Chart(f"points above local, cut at block {layer}", "rank", "points", False, _count, curves)
    if comparison.finished:

        def theirs(task: str, rank: int) -> Optional[float]:
            return paper.TABLE_1[rank][task] - paper.TABLE_1[None][task]

        title = f"the same in the paper, {paper.MODEL}, cut at block {paper.LAYER}"
        yield Chart(title, "rank", "points", False, _count, _curves(comparison, list(paper.RANKS), theirs))


def _lost(comparison: Comparison, system: System, task: str) -> Optional[float]:
    loss = comparison.loss(system, task)
    return None if loss is None else -loss


def _curves(comparison: Comparison, ranks: List[int], value: Callable[..., Optional[float]]) -> List[Curve]:
    """One a task."""
    curves = []
    for index, task in enumerate(comparison.tasks):
        points: Mapping[int, Optional[float]] = {rank: value(task, rank) for rank in ranks}
        spots = [_spot(rank, [at], task) for rank, at in sorted(points.items()) if at is not None]
        if spots:
            curves.append(Curve(task, svg.mark_of(index), spots))
    return curves


def _spot(x: int, values: List[float], name: str) -> Spot:
    mean = statistics.fmean(values)
    return Spot(x, mean, min(values), max(values), f"{name}: {mean:.2f}")


def _count(value: float) -> str:
    return f"{value:g}"
