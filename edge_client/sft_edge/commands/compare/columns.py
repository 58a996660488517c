"""What is held against what: runs, or groups of runs that differ in their seed alone."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from sft.errors import UsageError
from sft_edge.commands.compare.files import short
from sft_edge.commands.compare.reading import Run, read_run

MAX_RUNS = 40


@dataclass(frozen=True)
class Column:
    """A run, or several of one kind."""

    name: str
    runs: Sequence[Run]

    @property
    def is_finished(self) -> bool:
        """So that its totals can be held against another's."""
        return all(run.is_finished for run in self.runs)

    @property
    def metric(self) -> Optional[str]:
        """The main one; that of all its runs."""
        return self.runs[0].metric

    def mean_and_spread(self, value: Callable[[Run], Optional[float]]) -> Tuple[Optional[float], Optional[float]]:
        """Over the runs that have the value, if any has; with two or more the standard deviation of a sample."""
        values = [one for one in map(value, self.runs) if one is not None]
        if not values:
            return None, None
        mean = math.fsum(values) / len(values)
        if len(values) == 1:
            return mean, None
        return mean, math.sqrt(math.fsum((one - mean) ** 2 for one in values) / (len(values) - 1))

    def option(self, name: str) -> Optional[str]:
        """Its value, or those of the runs; None where no run knows."""
        found = [run.options[name] for run in self.runs if name in run.options]
        return ", ".join(dict.fromkeys(found)) if found else None


def columns_of(
    directories: Sequence[Path], baseline: Optional[Path], group_seeds: bool
) -> Tuple[List[Column], int, List[str]]:
    """The columns, which of them the others are held against, and what there is to say of how they came to be.

    Raises UsageError where a run is named twice, or the baseline is none of them, and CheckpointError.
    """
    if len(directories) > MAX_RUNS:
        raise UsageError(f"{len(directories)} runs are named; no more than {MAX_RUNS} can be read side by side")
    places = [os.path.realpath(str(directory)) for directory in directories]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise UsageError(f"{directories[index]} is named twice")
    base = 0
    if baseline is not None:
        if os.path.realpath(str(baseline)) not in places:
            raise UsageError(f"--baseline {baseline} is none of the runs that are named")
        base = places.index(os.path.realpath(str(baseline)))
    runs = [read_run(directory) for directory in directories]
    names = _names(directories)
    if not group_seeds:
        return [Column(name, [run]) for name, run in zip(names, runs)], base, []
    members: Dict[object, List[int]] = {}
    for index, run in enumerate(runs):
        members.setdefault(_kind(run) or index, []).append(index)
    columns, notes = [], []
    for indices in members.values():
        seeds = [runs[index].options.get("seed") for index in indices]
        if len(set(seeds)) < len(seeds):
            notes.append(f"{' and '.join(names[index] for index in indices)}: a seed is there twice")
        columns.append(Column(_common([names[index] for index in indices]), [runs[index] for index in indices]))
    unknown = [name for name, run in zip(names, runs) if _kind(run) is None]
    if unknown:
        notes.append(f"in no group, as they are unfinished or their options are not known: {', '.join(unknown)}")
    return columns, next(i for i, indices in enumerate(members.values()) if base in indices), notes


def _kind(run: Run) -> Optional[object]:
    """The same for runs that differ in their seed alone; None for one that belongs to no group."""
    if not (run.is_finished and run.knows_options):
        return None
    return frozenset((name, value) for name, value in run.options.items() if name != "seed")


def _names(directories: Sequence[Path]) -> List[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [Path(os.path.abspath(str(directory))).parts for directory in directories]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            break
    else:
        names = [str(directory) for directory in directories]
    return [short(name) for name in names]


def _common(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    alike = next((count for count, letters in enumerate(zip(*names)) if len(set(letters)) > 1), min(map(len, names)))
    stem = re.sub(r"[-_. ]*(seed|s)?[-_. ]*\d*$", "", names[0][:alike])
    return f"{stem or names[0]} (n={len(names)})"
