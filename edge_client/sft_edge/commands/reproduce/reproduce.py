"""`sft-edge reproduce`: a table or a figure of the paper from runs of `sft-edge train`, or its estimate of times."""

from __future__ import annotations

import shlex
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from sft.cli.environment import environment
from sft.errors import SFTError
from sft.printable import format_seconds
from sft_edge.checkpoints import only_run_in
from sft_edge.commands.reproduce.comparison import Comparison
from sft_edge.commands.reproduce.grid import Run, link_arguments, runs_of
from sft_edge.commands.reproduce.plots import plot_of
from sft_edge.commands.reproduce.records import Finished, finished_in
from sft_edge.commands.reproduce.runner import Failed, Runner, Stopped
from sft_edge.commands.reproduce.tables import markdown, print_table
from sft_edge.commands.reproduce.timing import timing
from sft_edge.files import storage_errors, write_file, write_json
from sft_edge.model_files import open_model
from sft_edge.options import TIMING, LinkOptions, ReproduceOptions
from sft_edge.signals import Termination, terminations_noted

EXIT_TERMINATED = 143  # 128 + SIGTERM, as shells report it


def reproduce(options: ReproduceOptions, link: LinkOptions) -> int:
    """Does what is missing of the figure, and reports all there is; the exit code is that of the first failed run.

    Raises any SFTError, and KeyboardInterrupt after the run that was on has ended in order.
    """
    assert options.output_dir is not None
    if options.figure == TIMING:
        return timing(options, link)
    config: Any = open_model(options.model or "minilm", None, {}).config
    runs = runs_of(options, link, int(config.num_hidden_layers))
    if options.dry_run:
        runner = Runner(options.output_dir, link_arguments(link), {}, options.keep_models, Termination())
        _print_plan(runs, options.output_dir, runner)
        return 0
    with terminations_noted() as asked, only_run_in(options.output_dir):
        runner = Runner(options.output_dir, link_arguments(link), _made_with(), options.keep_models, asked)
        stopped = False
        try:
            runner.do(runs)
        except Stopped:
            stopped = True
        finally:
            _report(options.figure, options.output_dir, runs, runner.failed)
    if stopped:
        return EXIT_TERMINATED
    codes = [failure.code if failure.code > 0 else SFTError.exit_code for failure in runner.failed]
    return codes[0] if codes else 0


def _print_plan(runs: Sequence[Run], output_dir: Path, runner: Runner) -> None:
    finished = finished_in(output_dir, list(runs))
    done = {one.run.name for one in finished}
    for run in runs:
        mark = "done" if run.name in done else "    "
        sys.stdout.write(f"{mark}  sft-edge {' '.join(map(shlex.quote, runner.command(run)))}\n")
    left = [run for run in runs if run.name not in done]
    seconds = estimate(left, finished)
    how_long = "how long they take is known once one is done" if seconds is None else f"about {format_seconds(seconds)}"
    sys.stdout.write(f"{len(runs)} runs, {len(done)} of them done; {len(left)} are left: {how_long}\n")


def estimate(left: Sequence[Run], finished: Sequence[Finished]) -> Optional[float]:
    """Seconds that the runs will take, by those done of the same task, or else by all; None while there is none."""
    if not left:
        return 0.0
    if not finished:
        return None
    mean = statistics.fmean(one.seconds for one in finished)
    of_task: Dict[str, List[float]] = {}
    for one in finished:
        of_task.setdefault(one.run.task, []).append(one.seconds)
    return sum(statistics.fmean(of_task.get(run.task, [mean])) for run in left)


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
    sys.stdout.write(f"{len(failed)} runs failed\n" if failed else "")
    sys.stdout.write(f"saved in {output_dir}: {', '.join(names)}\n")


def _how(finished: Sequence[Finished]) -> str:
    """What each run was made with, and its command: with the first of each kind of machine, the versions."""
    lines = ["## How\n"]
    for made_with in _different([one.made_with for one in finished]):
        versions = ", ".join(f"{name} {version}" for name, version in made_with.get("versions", {}).items())
        lines.append(f"- {versions}; {'; '.join(made_with.get('devices', []))}")
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


def _made_with() -> Dict[str, Any]:
    """Versions and devices of this machine, for each run to be told with."""
    found = environment()
    libraries = {name: one["version"] for name, one in found["libraries"].items() if one["version"]}
    torch: Dict[str, Any] = found["torch"] or {}
    threads = torch.get("threads", {}).get("within")
    devices = [device["name"] for device in torch.get("devices", [])]
    return {
        "versions": {"split-fine-tuning": found["package"], "python": found["python"], **libraries},
        "devices": [*devices, f"{found['cpus']['usable']} processors, {threads} threads of torch"],
    }
