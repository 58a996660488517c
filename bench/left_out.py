"""Whether a task that is not on record loses what `sft-edge plan` would expect of it: each task on record is left out
in turn, and its runs are held against the 90% interval that the others give for a run of another task.

    python bench/left_out.py [--record FILE]

It trains nothing: the record that comes with the package, or another that `bench/accuracy.py` has made. A way at a
depth counts where two other tasks have runs of it, without which no interval is told.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sft.errors import SFTError
from sft.plan.expected import Expected, Recorded, expected
from sft_edge.commands.plan.accuracy import read_record
from sft_edge.commands.reproduce.tables import Table, print_table

NINE_OF_TEN = 0.9


class Held(NamedTuple):
    """A way at a depth, of a task, against what the other tasks say of it."""

    task: str
    way: str
    depth: float
    points: list[float]
    """Of its runs."""
    expected: Expected | None
    """None where no other task says anything."""

    @property
    def within(self) -> int | None:
        """So many of its runs are; None without an interval."""
        if self.expected is None or self.expected.spread is None:
            return None
        points, spread = self.expected
        return sum(abs(one - points) <= spread for one in self.points)


def left_out(runs: Mapping[tuple[str, int, str], Sequence[Recorded]]) -> Iterator[Held]:
    """Every task in turn; `runs` by mode, rank and code, as the record has them."""
    for task in dict.fromkeys(run.task for some in runs.values() for run in some):
        for (mode, rank, codec), some in runs.items():
            others = [run for run in some if run.task != task]
            for depth in dict.fromkeys(run.depth for run in some if run.task == task):
                points = [run.points for run in some if run.task == task and run.depth == depth]
                way = f"{mode} R={rank} {codec}" if rank else f"{mode} {codec}"
                yield Held(task, way, depth, points, expected(others, depth))


def summary(held: Sequence[Held]) -> str:
    """What it says, and how little that may be."""
    judged = [one for one in held if one.within is not None]
    runs, within = sum(len(one.points) for one in judged), sum(one.within or 0 for one in judged)
    left = f"{len(held) - len(judged)} of {len(held)} ways have no interval, as fewer than two other tasks tried them"
    if not runs:
        return f"nothing can be said: {left}"
    tasks = len({one.task for one in held})
    return (
        f"{within} of {runs} runs, {within / runs:.0%}, are within the interval, which {NINE_OF_TEN:.0%} are to be; "
        f"{left}. {tasks} tasks are on record: runs of a task go together, so these are hardly more than {tasks} tries"
    )


def table_of(held: Sequence[Held]) -> Table:
    """A row a way of a task."""
    rows = []
    for one in held:
        said = "-" if one.expected is None else f"{one.expected.points:+.1f} +/- ?"
        if one.expected is not None and one.expected.spread is not None:
            said = f"{one.expected.points:+.1f} +/- {one.expected.spread:.1f}"
        points = ", ".join(f"{point:+.1f}" for point in one.points)
        inside = "-" if one.within is None else f"{one.within} of {len(one.points)}"
        rows.append([one.task, one.way, f"{one.depth:.2f}", points, said, inside])
    return Table(
        "Points against the whole model", ["left out", "way", "depth", "runs", "by the others", "within"], rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table and a sentence; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="by default that of the package")
    try:
        held = list(left_out(read_record(parser.parse_args(arguments).record).runs))
    except SFTError as error:
        print(f"left_out: {error}", file=sys.stderr)
        return error.exit_code
    print_table(table_of(held))
    print(summary(held))
    return 0


if __name__ == "__main__":
    sys.exit(main())
