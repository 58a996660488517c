"""The comparison itself, as texts and numbers: what a table, a page and JSON all show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

from sft.printable import format_bytes, format_seconds
from sft_edge.commands.compare.columns import Column
from sft_edge.commands.compare.reading import Run

UNKNOWN = "?"


class Figure(NamedTuple):
    """A row of numbers."""

    key: str
    section: str
    label: str
    kind: str
    """score and loss are held against the baseline by difference, bytes, seconds and speed by ratio"""

    better: int
    """1 where more is better, -1 where less is"""

    value: Callable[[Run], Optional[float]]


class Cell(NamedTuple):
    """A figure of a column."""

    text: str
    difference: str = ""
    is_best: bool = False
    mean: Optional[float] = None
    spread: Optional[float] = None


class Row(NamedTuple):
    """A cell a column."""

    key: str
    section: str
    label: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Comparison:
    """Of columns, with the one that the others are held against."""

    columns: Sequence[Column]
    baseline: int
    rows: Sequence[Row]
    differing: Dict[str, List[str]]
    """options, by name, whose value is not the same in all columns"""

    shared: Dict[str, str]
    """those that are the same wherever they are known"""

    notes: Sequence[str]

    @property
    def metric(self) -> str:
        """What scores are of."""
        metrics = {column.metric for column in self.columns if column.metric}
        return metrics.pop() if len(metrics) == 1 else "metric"


def compared(columns: Sequence[Column], baseline: int, notes: Sequence[str]) -> Comparison:
    """Holds the columns against each other."""
    names = list(dict.fromkeys(name for column in columns for run in column.runs for name in run.options))
    differing, shared = {}, {}
    for name in names:
        values = [column.option(name) for column in columns]
        if len({value for value in values if value is not None}) > 1:
            differing[name] = [_missing(column) if value is None else value for column, value in zip(columns, values)]
        else:
            shared[name] = next(value for value in values if value is not None)
    rows = [row for row in (_row(figure, columns, baseline) for figure in FIGURES) if row is not None]
    metric = Comparison(columns, baseline, [], {}, {}, []).metric
    rows = [row._replace(label=row.label.replace("METRIC", metric)) for row in rows]
    said = [*notes, *_notes(columns)]
    return Comparison(columns, baseline, [*_texts(columns), *rows], differing, shared, said)


def _missing(column: Column) -> str:
    return "-" if all(run.knows_options for run in column.runs) else UNKNOWN


def _notes(columns: Sequence[Column]) -> List[str]:
    notes = []
    tasks = list(dict.fromkeys(run.task for column in columns for run in column.runs if run.task))
    metrics = list(dict.fromkeys(column.metric for column in columns if column.metric))
    if len(tasks) > 1:
        notes.append(f"of different tasks ({', '.join(tasks)}): their scores and losses say nothing about each other")
    elif len(metrics) > 1:
        notes.append(f"judged by different metrics ({', '.join(metrics)}), which say nothing about each other")
    unknown = [column.name for column in columns for run in column.runs if not run.knows_options]
    if unknown:
        notes.append(f"without options.json, so that most options are not known: {', '.join(unknown)}")
    return notes


def _texts(columns: Sequence[Column]) -> List[Row]:
    """What is no number."""
    states = [Cell(" / ".join(dict.fromkeys(run.status for run in column.runs))) for column in columns]
    steps = [Cell(", ".join(dict.fromkeys(map(_steps, column.runs)))) for column in columns]
    rows = [Row("state", "Run", "state", states), Row("steps", "Run", "steps", steps)]
    if len({column.metric for column in columns}) > 1:
        rows.append(Row("metric", "Run", "metric", [Cell(column.metric or "-") for column in columns]))
    return rows


def _steps(run: Run) -> str:
    is_short = run.planned_steps is not None and run.steps < run.planned_steps
    return f"{run.steps:,} of {run.planned_steps:,}" if is_short else f"{run.steps:,}"


def _row(figure: Figure, columns: Sequence[Column], baseline: int) -> Optional[Row]:
    """None where no column has the figure."""
    found = [column.mean_and_spread(figure.value) for column in columns]
    means = [mean for mean, _ in found]
    if all(mean is None for mean in means):
        return None
    comparable = [
        mean is not None
        and (mean > 0 or figure.kind not in ("bytes", "seconds"))  # nothing on a wire that is not there is no feat
        and column.is_finished
        and alike(figure.kind, column, columns[baseline])
        for column, mean in zip(columns, means)
    ]
    candidates = [mean for mean, fits in zip(means, comparable) if fits and mean is not None]
    best = (max if figure.better > 0 else min)(candidates) if len(set(candidates)) > 1 else None
    cells = []
    for index, (mean, spread) in enumerate(found):
        base, beside = means[baseline], ""
        if (
            mean is not None
            and base is not None
            and index != baseline
            and alike(figure.kind, columns[index], columns[baseline])
        ):
            beside = _difference(figure.kind, mean, base)
        cells.append(Cell(_text(figure.kind, mean, spread), beside, comparable[index] and mean == best, mean, spread))
    return Row(figure.key, figure.section, figure.label, cells)


def alike(kind: str, one: Column, other: Column) -> bool:
    """Whether their figures of this kind say anything about each other."""
    same_task = one.runs[0].task == other.runs[0].task
    return kind not in ("score", "loss") or (same_task and (kind == "loss" or one.metric == other.metric))


def _text(kind: str, mean: Optional[float], spread: Optional[float]) -> str:
    if mean is None:
        return "-"
    return _shown(kind, mean) if spread is None else f"{_shown(kind, mean)} ± {_shown(kind, spread)}"


def _shown(kind: str, value: float) -> str:
    if kind == "bytes":
        return format_bytes(value)
    if kind == "seconds":
        return f"{value:.2g}s" if value < 10 else format_seconds(value)
    return f"{value:.4f}" if kind == "loss" else f"{value:.4g}" if kind == "speed" else f"{value:.2f}"


def _difference(kind: str, value: float, base: float) -> str:
    """To the baseline, in ASCII: a terminal on a device may know nothing else."""
    if kind in ("score", "loss"):
        return f"{value - base:+.{2 if kind == 'score' else 4}f}"
    if value <= 0 or base <= 0:
        return ""
    ratio = value / base
    if 0.5 <= ratio <= 2:
        return f"{100 * (ratio - 1):+.0f}%"
    return f"{ratio:.3g}x" if ratio > 2 else f"1/{1 / ratio:.3g}"


def _named(name: str) -> Callable[[Run], Optional[float]]:
    return lambda run: run.figures.get(name)


def _bytes_a_step(run: Run) -> Optional[float]:
    sent, received = run.figures.get("wire_bytes_sent"), run.figures.get("wire_bytes_received")
    return (sent + received) / run.steps if sent is not None and received is not None and run.steps else None


def _speed(run: Run) -> Optional[float]:
    rows, seconds = run.figures.get("train_samples"), run.figures.get("train_runtime")
    return rows / seconds if rows is not None and seconds else None


_SCORES, _BYTES, _SECONDS = "Scores", "Bytes on the wire", "On the edge"

FIGURES = [
    Figure("best", _SCORES, "METRIC, best", "score", 1, _named("best")),
    Figure("last", _SCORES, "METRIC, last", "score", 1, _named("last")),
    Figure("eval_loss", _SCORES, "validation loss, last", "loss", -1, _named("eval_loss")),
    Figure("train_loss", _SCORES, "training loss, mean", "loss", -1, _named("train_loss")),
    Figure("loss", _SCORES, "training loss, last", "loss", -1, _named("loss")),
    Figure("wire_bytes_sent", _BYTES, "training, sent", "bytes", -1, _named("wire_bytes_sent")),
    Figure("wire_bytes_received", _BYTES, "training, received", "bytes", -1, _named("wire_bytes_received")),
    Figure("wire_bytes_per_step", _BYTES, "a step, both ways", "bytes", -1, _bytes_a_step),
    Figure("eval_wire_bytes_sent", _BYTES, "evaluation, sent", "bytes", -1, _named("eval_wire_bytes_sent")),
    Figure("eval_wire_bytes_received", _BYTES, "evaluation, received", "bytes", -1, _named("eval_wire_bytes_received")),
    Figure("train_runtime", _SECONDS, "training", "seconds", -1, _named("train_runtime")),
    Figure("edge_forward_seconds", _SECONDS, "edge, forward", "seconds", -1, _named("edge_forward_seconds")),
    Figure("edge_backward_seconds", _SECONDS, "edge, backward", "seconds", -1, _named("edge_backward_seconds")),
    Figure("uplink_wait_seconds", _SECONDS, "waiting for the link", "seconds", -1, _named("uplink_wait_seconds")),
    Figure("cloud_seconds", _SECONDS, "waiting for the cloud", "seconds", -1, _named("cloud_seconds")),
    Figure("train_samples_per_second", _SECONDS, "rows a second", "speed", 1, _speed),
    Figure("edge_peak_memory_bytes", _SECONDS, "memory, at most", "bytes", -1, _named("edge_peak_memory_bytes")),
]


def as_json(comparison: Comparison) -> Dict[str, Any]:
    """For programs: numbers as they are, and every point of the curves."""
    return {
        "baseline": comparison.columns[comparison.baseline].name,
        "notes": list(comparison.notes),
        "differing_options": {
            name: dict(zip((column.name for column in comparison.columns), values))
            for name, values in comparison.differing.items()
        },
        "shared_options": comparison.shared,
        "columns": [
            {
                "name": column.name,
                "metric": column.metric,
                "finished": column.is_finished,
                "figures": {row.key: row.cells[index].mean for row in comparison.rows if row.section != "Run"},
                "spread": {row.key: row.cells[index].spread for row in comparison.rows if len(column.runs) > 1},
                "runs": [_run(run) for run in column.runs],
            }
            for index, column in enumerate(comparison.columns)
        ],
    }


def _run(run: Run) -> Dict[str, Any]:
    return {
        "directory": str(run.directory),
        "state": run.status,
        "steps": run.steps,
        "planned_steps": run.planned_steps,
        "options": run.options,
        "scores": [{"step": step, "value": value, "bytes": run.bytes_at(step)} for step, value in run.scores],
        "losses": [{"step": step, "value": value} for step, value in run.losses],
    }
