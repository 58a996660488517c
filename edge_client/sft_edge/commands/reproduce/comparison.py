"""What the finished runs say of a table or a figure, beside what the paper says."""

from __future__ import annotations

import statistics
from typing import Dict, Iterator, List, Optional, Sequence

from sft.printable import format_bytes, format_seconds
from sft_edge.commands.reproduce import paper
from sft_edge.commands.reproduce.grid import BASELINE, Run, System
from sft_edge.commands.reproduce.made_with import differences
from sft_edge.commands.reproduce.records import Finished
from sft_edge.commands.reproduce.tables import Table

_NOTHING = "-"


class Comparison:
    """Scores by system and task, over the seeds that are done."""

    def __init__(self, figure: str, runs: Sequence[Run], finished: Sequence[Finished]) -> None:
        self.figure = figure
        self.runs = runs
        self.finished = finished
        self.tasks = list(dict.fromkeys(run.task for run in runs))
        self.systems = list(dict.fromkeys(run.system for run in runs))
        self.metrics = {one.run.task: one.metric for one in finished}

    def scores(self, system: System, task: str) -> Dict[int, float]:
        """By seed."""
        found = (one for one in self.finished if (one.run.system, one.run.task) == (system, task))
        return {one.run.seed: one.score for one in found}

    def loss(self, system: System, task: str) -> Optional[float]:
        """Points below the baseline, over the seeds that both have; None where there is none."""
        own, base = self.scores(system, task), self.scores(BASELINE, task)
        shared = [base[seed] - own[seed] for seed in own if seed in base]
        return statistics.fmean(shared) if shared else None

    def mean_loss(self, system: System) -> Optional[float]:
        """Over the tasks; None where one is missing."""
        losses = [self.loss(system, task) for task in self.tasks]
        known = [loss for loss in losses if loss is not None]
        return statistics.fmean(known) if len(known) == len(losses) else None

    def table(self) -> Table:
        """A row a system, and below it what the paper has; a column a task."""
        rows = []
        for system in self.systems:
            means = {task: self.scores(system, task) for task in self.tasks}
            rows.append(
                [
                    system.title,
                    *(_mean(list(scores.values())) for scores in means.values()),
                    _points([statistics.fmean(of.values()) if of else None for of in means.values()]),
                    _NOTHING if system == BASELINE else _signed(self.mean_loss(system)),
                ]
            )
            theirs = self.papers(system)
            if theirs is not None:
                rows.append(theirs)
        if len({len(row) for row in rows}) != 1:
            raise AssertionError("rows of different lengths")
        done = f"{len(self.finished)} of {len(self.runs)} runs"
        return Table(f"{self.figure}, {done}", ["", *self.tasks, "mean", "mean loss against local"], rows)

    def papers(self, system: System) -> Optional[List[str]]:
        """The row of Table I that the system's is to be held against; None where there is none."""
        of_figure = self.figure == "table1" and system.mode == "sft" and system.split_rank in paper.TABLE_1
        if system != BASELINE and not of_figure:
            return None
        rank = system.split_rank or None
        scores = [paper.TABLE_1[rank].get(task) for task in self.tasks]
        losses = [paper.TABLE_1[None][task] - paper.TABLE_1[rank][task] for task in self.tasks]
        name = "  paper: baseline" if rank is None else f"  paper: SFT(l={paper.LAYER},R={rank})"
        loss = _NOTHING if rank is None else _signed(statistics.fmean(losses))
        return [name, *(_mean([score]) for score in scores if score is not None), _points(scores), loss]

    def run_table(self) -> Table:
        """A row a finished run: what it came to, and what it took."""
        columns = ["run", "metric", "score", "loss against local", "train rows", "steps", "wire bytes", "seconds"]
        rows = []
        for one in self.finished:
            base = self.scores(BASELINE, one.run.task).get(one.run.seed)
            is_base = one.run.system == BASELINE or base is None
            rows.append(
                [
                    one.run.name,
                    one.metric,
                    f"{one.score:.2f}",
                    _NOTHING if is_base or base is None else _signed(base - one.score),
                    str(one.results.get("train_samples", "")),
                    str(one.results["train_steps"]),
                    format_bytes(one.wire_bytes) if one.wire_bytes else _NOTHING,
                    format_seconds(one.seconds),
                ]
            )
        return Table("Runs", columns, rows)

    def notes(self) -> Iterator[str]:
        """What has to be said with the numbers."""
        models = ", ".join(dict.fromkeys(run.flags["--model"] for run in self.runs))
        seeds = " ".join(str(seed) for seed in dict.fromkeys(run.seed for run in self.runs))
        yield f"here: {models}, seeds {seeds}; the paper: {paper.MODEL}, all rows, {paper.SEEDS} runs"
        rows = (f"{task} {self._rows(task)} ({paper.ROWS[task]} in the paper)" for task in self.tasks)
        yield f"training rows: {', '.join(rows)}"
        scored = ", ".join(f"{task} {metric}" for task, metric in self.metrics.items())
        yield f"scores in per cent: {scored or 'none yet'}; the paper does not say which it has"
        for words in paper.WORDS[self.figure]:
            yield f'the paper: "{words}"'
        if self.figure != "table1":
            yield f"{self.figure} has no numbers in the paper's text; its baselines here are those of Table I"
        yield from differences([one.made_with for one in self.finished])

    def _rows(self, task: str) -> str:
        flags = next(run.flags for run in self.runs if run.task == task)
        return flags.get("--max-train-samples", "all")


def _mean(scores: Sequence[float]) -> str:
    if not scores:
        return _NOTHING
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.2f}{spread}"


def _points(scores: Sequence[Optional[float]]) -> str:
    """Their mean, where none is missing."""
    known = [score for score in scores if score is not None]
    return f"{statistics.fmean(known):.2f}" if len(known) == len(scores) else _NOTHING


def _signed(loss: Optional[float]) -> str:
    return _NOTHING if loss is None else f"{loss:+.2f}"
