"""Any grid of runs: planned, done as far as it is missing, and reported."""

from __future__ import annotations

import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

from sft.errors import SFTError
from sft.printable import format_seconds
from sft_edge.checkpoints import only_run_in
from sft_edge.commands.reproduce.grid import Run
from sft_edge.commands.reproduce.made_with import made_with
from sft_edge.commands.reproduce.records import Finished, finished_in
from sft_edge.commands.reproduce.runner import Failed, Runner, Stopped
from sft_edge.signals import EXIT_TERMINATED, Termination, terminations_noted


@dataclass(frozen=True)
class Manner:
    """Where runs are done, and how."""

    output_dir: Path
    way: Sequence[str] = ()
    """Arguments of runs that need a cloud; without any each starts its own."""

    keep_models: bool = False
    jobs: int = 1
    """So many runs side by side."""


def carry_out(runs: Sequence[Run], manner: Manner, report: Callable[[Sequence[Failed]], None]) -> int:
    """Does what is missing, and has all reported, with what failed now; the exit code is that of the first failed run.

    Raises any SFTError, and KeyboardInterrupt after the runs that were on have ended in order.
    """
    with terminations_noted() as asked, only_run_in(manner.output_dir):
        runner = _runner(manner, made_with(manner.jobs), asked)
        stopped = False
        try:
            runner.do(runs)
        except Stopped:
            stopped = True
        finally:
            report(runner.failed)
    if stopped:
        return EXIT_TERMINATED
    codes = [failure.code if failure.code > 0 else SFTError.exit_code for failure in runner.failed]
    return codes[0] if codes else 0


def print_plan(runs: Sequence[Run], manner: Manner, usual_seconds: Optional[float] = None) -> None:
    """The runs as one would type them, and how long the rest will take; `usual_seconds` of one while none is done."""
    runner = _runner(manner, {}, Termination())
    finished = finished_in(manner.output_dir, list(runs))
    done = {one.run.name for one in finished}
    for run in runs:
        mark = "done" if run.name in done else "    "
        sys.stdout.write(f"{mark}  sft-edge {' '.join(map(shlex.quote, runner.command(run)))}\n")
    left = [run for run in runs if run.name not in done]
    seconds = estimate(left, finished, usual_seconds)
    how_long = "how long they take is known once one is done"
    if seconds is not None:
        side_by_side = f", {manner.jobs} side by side" if manner.jobs > 1 else ""
        how_long = f"about {format_seconds(seconds / manner.jobs)}{side_by_side}"
    sys.stdout.write(f"{len(runs)} runs, {len(done)} of them done; {len(left)} are left: {how_long}\n")


def estimate(
    left: Sequence[Run], finished: Sequence[Finished], usual_seconds: Optional[float] = None
) -> Optional[float]:
    """Seconds that the runs take together, by those done of the same task, or else by all, or else the usual ones; None
    where nothing says it."""
    if not left:
        return 0.0
    if not finished:
        return None if usual_seconds is None else usual_seconds * len(left)
    mean = statistics.fmean(one.seconds for one in finished)
    of_task: Dict[str, List[float]] = {}
    for one in finished:
        of_task.setdefault(one.run.task, []).append(one.seconds)
    return sum(statistics.fmean(of_task.get(run.task, [mean])) for run in left)


def _runner(manner: Manner, made: Dict[str, Any], asked: Termination) -> Runner:
    return Runner(manner.output_dir, manner.way, made, manner.keep_models, asked, manner.jobs)
