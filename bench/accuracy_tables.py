"""What `bench/accuracy.py` makes of its runs: tables, charts, a page with them, and the record that a plan reads."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sft.printable import format_bytes
from sft.wire.codec.elements import FITTED
from sft.wire.codec.rows import CODES, NAMES
from sft_edge.commands.compare import svg
from sft_edge.commands.compare.charts import Chart, Curve, Spot
from sft_edge.commands.reproduce.comparison import Comparison
from sft_edge.commands.reproduce.grid import BASELINE, System
from sft_edge.commands.reproduce.made_with import as_line, differences
from sft_edge.commands.reproduce.records import Finished
from sft_edge.commands.reproduce.runner import Failed
from sft_edge.commands.reproduce.tables import Table
from sft_edge.systems import mean_row_bytes

_LEFT_OUT = {
    *("--model", "--task", "--mode", "--split-layer", "--split-rank", "--codec", "--seed"),
    *("--data-dir", "--device"),
}
"""Of a run's flags: those that the record has otherwise, and those that say nothing elsewhere."""

_SHOWN = ("split-fine-tuning", "python", "torch", "transformers")
"""Of the versions."""


class Shape(NamedTuple):
    """Of the model."""

    blocks: int
    width: int


def bytes_a_token(system: System, width: int) -> tuple[float, float]:
    """That cross of a token in a step, up and down; those of a frozen edge go up in the first epoch alone."""
    if system.mode == "local":
        return 0.0, 0.0
    gradient = dict(system.more).get("--gradient-codec", system.codec)
    across = system.split_rank or width
    up = mean_row_bytes(width) if system.codec == FITTED else float(CODES[NAMES[system.codec]].row_bytes(across))
    return up, 0.0 if system.mode == "frozen" else float(CODES[NAMES[gradient]].row_bytes(across))


def tables_of(comparison: Comparison, shape: Shape) -> Iterator[Table]:
    """One a block that is cut: a row a system, the whole model first. Of runs that were side by side, and so in each
    other's way, no times."""
    tasks = [f"{task}, {comparison.metrics.get(task, '-')}" for task in comparison.tasks]
    timed = all(one.made_with.get("side_by_side", 1) == 1 for one in _timed(comparison))
    columns = ["", *tasks, "points lost", "bytes a token", "edge memory", *(["edge ms a row"] if timed else [])]
    for layer in dict.fromkeys(system.split_layer for system in comparison.systems if system != BASELINE):
        systems = [system for system in comparison.systems if system == BASELINE or system.split_layer == layer]
        done = [system for system in systems if any(one.run.system == system for one in comparison.finished)]
        rows = [_row(comparison, system, shape)[: len(columns)] for system in done]
        yield Table(f"Cut at block {layer} of {shape.blocks}", columns, rows)


def _row(comparison: Comparison, system: System, shape: Shape) -> list[str]:
    up, down = bytes_a_token(system, shape.width)
    crossing = f"{up:.0f} once" if system.mode == "frozen" else f"{up:.0f} + {down:.0f}"
    loss = None if system == BASELINE else comparison.mean_loss(system)
    ours = [one for one in comparison.finished if one.run.system == system]
    memory = max((one.results["edge_peak_memory_bytes"] for one in ours), default=0)
    seconds = [
        (one.results["edge_forward_seconds"] + one.results["edge_backward_seconds"]) / one.results["train_samples"]
        for one in _timed(comparison)
        if one.run.system == system
    ]
    return [
        system.curve,
        *(_scores(list(comparison.scores(system, task).values())) for task in comparison.tasks),
        "-" if loss is None else f"{loss:.1f}",
        "-" if system == BASELINE else crossing,
        format_bytes(memory) if memory else "-",
        f"{1000 * statistics.median(seconds):.1f}" if seconds else "-",
    ]


def _timed(comparison: Comparison) -> list[Finished]:
    """Those whose times are shown: rows of other tasks are of other lengths."""
    return [one for one in comparison.finished if one.run.task == comparison.tasks[0]]


def _scores(scores: Sequence[float]) -> str:
    """The mean, and each seed's."""
    if len(scores) < 2:
        return f"{scores[0]:.1f}" if scores else "-"
    return f"{statistics.fmean(scores):.1f} ({', '.join(f'{score:.1f}' for score in scores)})"


def notes(comparison: Comparison, failed: Sequence[Failed] = ()) -> Iterator[str]:
    """What the tables were made with, and what is missing: `failed` are the runs of any part that did now."""
    flags = {run.task: run.flags for run in comparison.runs if run.system == BASELINE}
    rows = ", ".join(
        f"{task} {of.get('--max-train-samples', 'all')} rows in batches of {of['--per-device-train-batch-size']} at a "
        f"rate of {of['--learning-rate']}"
        for task, of in flags.items()
    )
    first = next(iter(flags.values()))
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(run.seed for run in comparison.runs))
    names = {run.name for run in comparison.runs}
    broken = ", ".join(f"`{one.run.name}`" for one in failed if one.run.name in names)
    done = f"{len(comparison.finished)} of {len(comparison.runs)} runs{f'; failed: {broken}' if broken else ''}"
    yield (
        f"{done}. {first['--model']}, seeds {seeds}, {float(first['--num-train-epochs']):g} epochs. Trained on: "
        f"{rows}; judged by {first.get('--max-eval-samples', 'all')} rows at most."
    )
    for made in dict.fromkeys(as_line(one.made_with, _SHOWN) for one in comparison.finished):
        yield f"Made with {made}."
    for line in differences([one.made_with for one in comparison.finished]):
        yield f"{line[0].upper()}{line[1:]}."


def over_bytes(comparison: Comparison, shape: Shape) -> Iterator[Chart]:
    """One a block: points above the whole model, by the bytes of a token that cross in an epoch."""
    for layer in dict.fromkeys(system.split_layer for system in comparison.systems if system != BASELINE):
        curves: dict[str, list[Spot]] = {}
        for system in comparison.systems:
            loss = comparison.mean_loss(system) if system.split_layer == layer else None
            if loss is not None:
                each = [one for one in (comparison.loss(system, task) for task in comparison.tasks) if one is not None]
                epochs = next(float(r.flags["--num-train-epochs"]) for r in comparison.runs if r.system == system)
                crossing = sum(bytes_a_token(system, shape.width)) / (epochs if system.mode == "frozen" else 1.0)
                name = system.name if system.mode == "sft" else system.name.split()[0]
                spot = Spot(crossing, -loss, -max(each), -min(each), f"{system.title}: {-loss:.2f}")
                curves.setdefault(name, []).append(spot)
        drawn = [Curve(name, svg.mark_of(i), sorted(spots)) for i, (name, spots) in enumerate(curves.items())]
        if drawn:
            title = f"points above local, mean of the tasks, cut at block {layer}"
            yield Chart(title, "bytes of a token in an epoch (log)", "points", True, format_bytes, drawn)


def record(finished: Sequence[Finished], shape: Shape) -> str:
    """What `sft-edge plan` reads: of each run that it could propose the score, and beside it the whole model's."""
    base = {(one.run.task, one.run.seed): one.score for one in finished if one.run.system == BASELINE}
    runs = []
    for one in finished:
        system, run = one.run.system, one.run
        local = base.get((run.task, run.seed))
        if local is None or system == BASELINE or system.more or system.residual != "none":
            continue
        told = {
            "model": run.flags["--model"],
            "blocks": shape.blocks,
            "task": run.task,
            "metric": one.metric,
            "seed": run.seed,
            "mode": system.mode,
            "split_layer": system.split_layer,
            "split_rank": system.split_rank,
            "codec": system.codec,
            "score": round(one.score, 4),
            "local": round(local, 4),
            "flags": {name: value for name, value in run.flags.items() if name not in _LEFT_OUT},
        }
        runs.append(told)
    made_with = finished[-1].made_with if finished else {}
    lines = ",\n".join(json.dumps(run) for run in runs)
    return f'{{"made_with": {json.dumps(made_with)},\n"runs": [\n{lines}\n]}}\n'


def between_markers(page: str, part: str, text: str) -> str:
    """The page with other text between the two comments of a part. Raises ValueError where it has none."""
    begin, end = f"<!-- {part}: written by a program, see above. -->\n", f"<!-- The end of {part}. -->\n"
    before, found, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"the page has no place for {part}")
    return f"{before}{begin}\n{text}\n\n{end}{after}"
