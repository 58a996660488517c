"""`sft-edge reproduce`: a table or a figure of the paper from runs of `sft-edge train`, or its estimate of times."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any, List, Sequence

from sft.printable import counted
from sft_edge.commands.reproduce.carry_out import Manner, carry_out, print_plan
from sft_edge.commands.reproduce.comparison import Comparison
from sft_edge.commands.reproduce.grid import Run, link_arguments, runs_of
from sft_edge.commands.reproduce.made_with import as_line
from sft_edge.commands.reproduce.plots import plot_of
from sft_edge.commands.reproduce.records import Finished, finished_in
from sft_edge.commands.reproduce.runner import Failed
from sft_edge.commands.reproduce.tables import markdown, print_table
from sft_edge.commands.reproduce.timing import timing
from sft_edge.files import storage_errors, write_file, write_json
from sft_edge.model_files import open_model
from sft_edge.options import TIMING, LinkOptions, ReproduceOptions


def reproduce(options: ReproduceOptions, link: LinkOptions) -> int:
    """Does what is missing of the figure, and reports all there is; the exit code is that of the first failed run.

    Raises any SFTError, and KeyboardInterrupt after the runs that were on have ended in order.
    """
    assert options.output_dir is not None
    if options.figure == TIMING:
        return timing(options, link)
    config: Any = open_model(options.model or "minilm", None, {}).config
    runs = runs_of(options, link, int(config.num_hidden_layers))
    manner = Manner(options.output_dir, link_arguments(link), options.keep_models, options.jobs or 1)
    if options.dry_run:
        print_plan(runs, manner)
        return 0
    return carry_out(runs, manner, lambda failed: _report(options.figure, manner.output_dir, runs, failed))


def _report(figure: str, output_dir: Path, runs: Sequence[Run], failed: Sequence[Failed]) -> None:
    """Prints the table, and writes it, every run, and the plot. Raises StorageError."""
    finished = finished_in(output_dir, list(runs))
    comparison = Comparison(figure, runs, finished)
    table = comparison.table()
    print_table(table)
    notes = list(comparison.notes())
    for note in notes:
        sys.stdout.write(f"{note}\n")
    sections = [markdown(table), "\n".join(f"- {note}" for note in notes) + "\n", markdown(comparison.run_table())]
    if failed:
        sections.append("\n".join(["## Failed\n", *(f"- {one.run.name}: {one.says}" for one in failed)]) + "\n")
    sections.append(_how(finished))
    write_file(output_dir / f"{figure}.md", ["\n".join(sections).encode("utf-8", "backslashreplace")])
    losses = {system.title: comparison.mean_loss(system) for system in comparison.systems}
    write_json(
        output_dir / f"{figure}.json",
        {
            "figure": figure,
            "planned_runs": [run.name for run in runs],
            "mean_loss_against_local": losses,
            "notes": notes,
            "runs": [one.as_json() for one in finished],
            "failed": [{"run": one.run.name, "exit_code": one.code, "says": one.says} for one in failed],
        },
    )
    names = [f"{figure}.md", f"{figure}.json"]
    plot, place = plot_of(comparison), output_dir / f"{figure}.svg"
    if plot is not None:
        write_file(place, [plot.encode("utf-8")])
        names.append(place.name)
    elif place.is_file():
        with storage_errors(place):
            place.unlink()  # of other runs than the table beside it
    sys.stdout.write(f"{counted(len(failed), 'run')} failed\n" if failed else "")
    sys.stdout.write(f"saved in {output_dir}: {', '.join(names)}\n")


def _how(finished: Sequence[Finished]) -> str:
    """What each run was made with, and its command: with the first of each kind of machine, the versions."""
    lines = ["## How\n"]
    for made_with in _different([one.made_with for one in finished]):
        lines.append(f"- {as_line(made_with)}")
    lines += ["", "```"]
    for one in finished:
        words = [word for flag in one.run.flags.items() for word in flag]
        lines.append(f"sft-edge train {' '.join(map(shlex.quote, words))}")
    return "\n".join([*lines, "```"]) + "\n"


def _different(ones: Sequence[Any]) -> List[Any]:
    found: List[Any] = []
    for one in ones:
        if one not in found:
            found.append(one)
    return found
