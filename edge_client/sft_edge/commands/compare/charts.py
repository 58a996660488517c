"""The two charts: what each score cost in bytes, and how losses fell."""

from __future__ import annotations

import math
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from sft.printable import format_bytes
from sft_edge.commands.compare import svg
from sft_edge.commands.compare.columns import Column
from sft_edge.commands.compare.comparison import Comparison, alike
from sft_edge.commands.compare.reading import Point, Run

WIDTH, HEIGHT = 720, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 40, 52
_LEGEND_ROW, _LEGEND_CELL = 20, 214
_MOST_POINTS = 300
"""More than a chart has pixels for would only make the file large."""

_MOST_MARKERS = 40


class Spot(NamedTuple):
    """A point of a curve: where it is, how far the runs of a group reach, and what it says."""

    x: float
    y: float
    low: float
    high: float
    says: str


class Curve(NamedTuple):
    """Of a column."""

    name: str
    mark: svg.Mark
    spots: Sequence[Spot]
    level: Optional[float] = None
    """instead: the same at every place, as of one that moves no bytes"""


class Chart(NamedTuple):
    """Curves with their axes."""

    title: str
    x_label: str
    y_label: str
    is_log: bool
    x_text: Callable[[float], str]
    curves: Sequence[Curve]


def charts_of(comparison: Comparison) -> List[Chart]:
    """Those that there is something for."""
    return [chart for chart in (_scores(comparison), _losses(comparison)) if chart.curves]


def picture(charts: Sequence[Chart], style: bool = True) -> str:
    """One SVG: the charts below each other, and a legend. `style`: with its own rules for dark pages."""
    named = list(dict.fromkeys((curve.name, curve.mark) for chart in charts for curve in chart.curves))
    per_row = max(1, (WIDTH - _LEFT) // _LEGEND_CELL)
    height = HEIGHT * len(charts) + _LEGEND_ROW * math.ceil(len(named) / per_row) + 12
    parts = [svg.element("style", [svg.STYLE])] if style else []
    parts.append(svg.element("rect", width=WIDTH, height=height, fill=svg.PAPER, class_="paper"))
    for index, chart in enumerate(charts):
        parts.append(svg.element("g", _drawn(chart), transform=f"translate(0 {index * HEIGHT})"))
    for index, (name, mark) in enumerate(named):
        x = _LEFT + index % per_row * _LEGEND_CELL
        y = HEIGHT * len(charts) + 8 + index // per_row * _LEGEND_ROW
        parts.append(svg.polyline([(x, y), (x + 26, y)], mark) + svg.marker(x + 13, y, mark))
        parts.append(svg.text(x + 33, y + 4, name if len(name) <= 28 else f"{name[:27]}…"))
    return svg.element(
        "svg",
        parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height}",
        width=WIDTH,
        height=height,
        font_family=svg.FONT,
        role="img",
        aria_label="; ".join(chart.title for chart in charts),
    )


def _scores(comparison: Comparison) -> Chart:
    shown = list(_alike(comparison, "score"))
    metric = comparison.columns[comparison.baseline].metric or comparison.metric
    moved = any(run.bytes_at(point.step) for _, column in shown for run in column.runs for point in run.scores)
    curves = []
    for mark, column in shown:
        spots = list(_spots(column, lambda run: run.scores, Run.bytes_at if moved else None, metric))
        level = _level(column) if moved and not spots else None
        if spots or level is not None:
            curves.append(Curve(column.name, mark, spots, level))
    if moved:
        title = f"{metric} against bytes on the wire"
        return Chart(title, "bytes of training, both ways (log)", metric, True, format_bytes, curves)
    return Chart(f"{metric} over steps", "steps", metric, False, _count, curves)


def _losses(comparison: Comparison) -> Chart:
    curves = []
    for mark, column in _alike(comparison, "loss"):
        spots = list(_spots(column, lambda run: run.losses, None, "loss"))
        if spots:
            curves.append(Curve(column.name, mark, spots))
    return Chart("training loss over steps", "steps", "loss", False, _count, curves)


def _alike(comparison: Comparison, kind: str) -> Iterator[Tuple[svg.Mark, Column]]:
    """The columns that belong on one axis with the baseline."""
    for index, column in enumerate(comparison.columns):
        if alike(kind, column, comparison.columns[comparison.baseline]):
            yield svg.mark_of(index), column


def _level(column: Column) -> Optional[float]:
    """The best score of a column whose runs moved nothing; None where it is not known what they moved."""
    if not all(run.wire_bytes and run.wire_bytes[-1] == 0 for run in column.runs):
        return None
    best, _ = column.mean_and_spread(lambda run: run.figures.get("best"))
    return best


def _spots(
    column: Column,
    curve_of: Callable[[Run], Sequence[Point]],
    x_of: Optional[Callable[[Run, int], Optional[int]]],
    what: str,
) -> Iterator[Spot]:
    """Of the steps that all runs of the column have a point of: the mean, the lowest and the highest."""
    curves = [dict(curve_of(run)) for run in column.runs]
    steps = [step for step in sorted(curves[0]) if all(step in curve for curve in curves)]
    every = max(1, math.ceil(len(steps) / _MOST_POINTS))
    for step in [*steps[:-1:every], *steps[-1:]]:
        places = [step if x_of is None else x_of(run, step) or 0 for run in column.runs]
        x = sum(places) / len(places)
        if x_of is not None and x <= 0:
            continue
        values = [curve[step] for curve in curves]
        mean = sum(values) / len(values)
        says = f"{column.name}: {what} {mean:.4g} at step {step:,}"
        if x_of is not None:
            says += f", {format_bytes(x)}"
        yield Spot(x, mean, min(values), max(values), says)


def _drawn(chart: Chart) -> Iterator[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    spots = [spot for curve in chart.curves for spot in curve.spots]
    levels = [curve.level for curve in chart.curves if curve.level is not None]
    y_ticks = svg.ticks(min([*(spot.low for spot in spots), *levels]), max([*(spot.high for spot in spots), *levels]))
    x_low, x_high = min(spot.x for spot in spots), max(spot.x for spot in spots)
    if chart.is_log:
        begin, end, x_ticks = svg.log_ticks(x_low, x_high)
    else:
        begin, end = min(x_low, 0.0), max(x_high, 1.0)
        x_ticks = [tick for tick in svg.ticks(begin, end, 6) if begin <= tick <= end]

    def across(value: float) -> float:
        low, high, at = begin, end, value
        if chart.is_log:
            low, high, at = math.log10(low), math.log10(high), math.log10(at)
        return _LEFT + (at - low) / (high - low) * (right - _LEFT)

    def up(value: float) -> float:
        return bottom - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - _TOP)

    yield svg.text(_LEFT, 22, chart.title, size=15, font_weight="600")
    yield from _axes(chart, [(across(x), x) for x in x_ticks], [(up(y), y) for y in y_ticks])
    for curve in chart.curves:
        if curve.level is not None:
            y = up(curve.level)
            yield svg.polyline([(_LEFT, y), (right, y)], curve.mark._replace(dashes="5 4"))
            says = f"{curve.name}: {curve.level:.4g}, and no byte on the wire"
            yield svg.marker(_LEFT, y, curve.mark, says)
            continue
        if any(spot.low < spot.high for spot in curve.spots):
            upper = [(across(spot.x), up(spot.high)) for spot in curve.spots]
            lower = [(across(spot.x), up(spot.low)) for spot in curve.spots]
            yield svg.band(upper, lower, curve.mark)
            yield from (svg.polyline([high, low], curve.mark) for high, low in zip(upper[-1:], lower[-1:]))
        places = [(across(spot.x), up(spot.y)) for spot in curve.spots]
        if len(places) > 1:
            yield svg.polyline(places, curve.mark)
        every = max(1, math.ceil(len(places) / _MOST_MARKERS))
        for (x, y), spot in list(zip(places, curve.spots))[::-every]:
            yield svg.marker(x, y, curve.mark, spot.says)


def _axes(
    chart: Chart, x_ticks: Sequence[Tuple[float, float]], y_ticks: Sequence[Tuple[float, float]]
) -> Iterator[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    digits = svg.decimals([value for _, value in y_ticks])
    for y, value in y_ticks:
        yield svg.element("line", x1=_LEFT, x2=right, y1=y, y2=y, stroke=svg.PALE, class_="line")
        yield svg.text(_LEFT - 8, y + 4, f"{value:.{digits}f}", "end")
    for x, value in x_ticks:
        yield svg.element("line", x1=x, x2=x, y1=bottom, y2=bottom + 5, stroke=svg.INK, class_="axis")
        yield svg.text(x, bottom + 19, chart.x_text(value), "middle")
    yield svg.element("line", x1=_LEFT, x2=right, y1=bottom, y2=bottom, stroke=svg.INK, class_="axis")
    yield svg.text((_LEFT + right) / 2, HEIGHT - 12, chart.x_label, "middle")
    middle = (_TOP + bottom) / 2
    yield svg.text(16, middle, chart.y_label, "middle", transform=f"rotate(-90 16 {middle:g})")


def _count(value: float) -> str:
    return f"{value:,.10g}"
