"""What each cut, rank and code costs in accuracy: the tables of docs/decompositions.md, and what a plan expects.

    OMP_NUM_THREADS=1 python bench/accuracy.py --data-dir DATA --jobs 2 --publish                  every cut and way
    OMP_NUM_THREADS=1 python bench/accuracy.py --data-dir DATA --jobs 2 --publish --part low-cut   a trained edge

Each run is `sft-edge train` in a process of its own, on as many rows as `sft-edge reproduce` takes. What is done below
--output-dir is not run again; it has also the JSON and SVG of all of it. `--publish` writes the tables into the page,
and the runs that a plan can propose into the package. `--dry-run` tells the runs, and the hours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accuracy_tables import Shape, between_markers, notes, over_bytes, record, tables_of

from sft.cli.options import flag
from sft.errors import SFTError, UsageError
from sft.printable import counted
from sft.wire.codec.elements import FITTED
from sft_edge.commands.compare.charts import picture
from sft_edge.commands.reproduce.carry_out import Manner, carry_out, print_plan
from sft_edge.commands.reproduce.comparison import Comparison
from sft_edge.commands.reproduce.grid import BASELINE, Run, System, check_layers, runs_with
from sft_edge.commands.reproduce.plots import over_blocks
from sft_edge.commands.reproduce.records import Finished, finished_in
from sft_edge.commands.reproduce.runner import Failed
from sft_edge.commands.reproduce.tables import markdown, print_table
from sft_edge.files import write_file, write_json
from sft_edge.model_files import open_model
from sft_edge.options import LinkOptions, ReproduceOptions

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "decompositions.md"
RECORD = ROOT / "edge_client" / "sft_edge" / "commands" / "plan" / "accuracy.json"
TASKS, SEEDS = ["sst2", "stsb", "qnli"], [0, 1, 2]
RUN_SECONDS = 150.0
"""About, of MiniLM by one thread; it is known better once a run of the task is done."""


def ways(layer: int) -> Iterator[System]:
    """Everything that a plan can propose at a block, but for the codecs between these."""
    for codec in ("float32", "int8"):
        yield from (System(f"SFT {codec}", "sft", layer, rank, codec=codec) for rank in (8, 16, 32))
    yield from (System(f"trained {codec}", "sl", layer, codec=codec) for codec in ("int8", "int4"))
    yield from (System(f"frozen {codec}", "frozen", layer, codec=codec) for codec in ("int8", "int4", FITTED))


def low_cut(layer: int) -> Iterator[System]:
    """What may help a trained edge at a low block; beside it what it is to be held against."""
    yield from (way for way in ways(layer) if way.mode != "sft" or (way.split_rank, way.codec) == (8, "float32"))
    # Which direction loses: one of them plain.
    for up, down in (("int4", "float32"), ("float32", "int4")):
        yield System(f"trained {up} up, {down} down", "sl", layer, codec=up, more=(("--gradient-codec", down),))
    # About the bytes of the paper's rank 8 in float32, 32 up and 32 down, of a token in each step.
    for rank, codec in ((8, "float32"), (16, "float16"), (32, "int8"), (64, "int4")):
        for residual in ("none", "low-rank"):
            for factor_rate in ("",) if rank == 16 else ("", "0.002"):
                yield _decomposed(layer, rank, codec, codec, residual, factor_rate)
    for up, down in (("int4", "int8"), ("int8", "int4")):
        for factor_rate in ("", "0.002"):
            yield _decomposed(layer, 40, up, down, "low-rank", factor_rate)


def _decomposed(layer: int, rank: int, up: str, down: str, residual: str, factor_rate: str) -> System:
    name, more = f"SFT {up}", []
    if down != up:
        name, more = f"{name} up, {down} down", [("--gradient-codec", down)]
    name += "" if residual == "none" else f", {residual} residual"
    if factor_rate:
        name += f", factors at {factor_rate}"
        more.append(("--factor-learning-rate", factor_rate))
    return System(name, "sft", layer, rank, residual, up, tuple(more))


PARTS: Mapping[str, tuple[Callable[[int], Iterator[System]], Sequence[int]]] = {
    "grid": (ways, (2, 3, 5)),
    "low-cut": (low_cut, (2,)),
}
"""The systems of a block, and the blocks by default."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: as of `sft-edge reproduce`."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        if given.publish:
            _check_whole(given, parser)
        config: Any = open_model(given.model, None, {}).config
        shape = Shape(int(config.num_hidden_layers), int(config.hidden_size))
        parts = {name: runs_of(name, given, shape) for name in PARTS}
        runs = [run for run in parts[given.part] if any(word in run.name for word in given.only or [""])]
        manner = Manner(given.output_dir, jobs=given.jobs)
        if given.dry_run:
            print_plan(runs, manner, RUN_SECONDS)
            return 0
        return carry_out(runs, manner, lambda failed: report(parts, failed, given.output_dir, shape, given.publish))
    except SFTError as error:
        print(f"accuracy: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _check_whole(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raises UsageError where what would be published is not the grid, and would take the place of it."""
    for name in ("tasks", "seeds", "split_layers", "max_train_samples", "max_eval_samples", "num_train_epochs"):
        if getattr(given, name) != parser.get_default(name):
            raise UsageError(
                f"--publish does not go with {flag(name)}: what is published would be less than the grid; do the runs "
                "without it, and publish once all are done"
            )


def runs_of(part: str, given: argparse.Namespace, shape: Shape) -> list[Run]:
    """Those of a part; --split-layers are of the one that is asked for. Raises UsageError and CutError."""
    systems_at, layers = PARTS[part]
    layers = given.split_layers if given.split_layers and part == given.part else layers
    if part == given.part:
        check_layers(layers, shape.blocks)
    sizes = {name: getattr(given, name) for name in ("max_train_samples", "max_eval_samples", "num_train_epochs")}
    options = ReproduceOptions(
        "fig3",
        model=given.model,
        data_dir=given.data_dir.resolve(),  # a flag of each run, and so the same wherever this is called from
        tasks=given.tasks,
        split_layers=given.split_layers or [],
        seeds=given.seeds,
        jobs=given.jobs,
        **sizes,
    )
    systems = [BASELINE, *(system for layer in layers for system in systems_at(layer))]
    return runs_with(systems, given.tasks, options, LinkOptions())


def report(
    parts: Mapping[str, Sequence[Run]], failed: Sequence[Failed], output_dir: Path, shape: Shape, publish: bool
) -> None:
    """Prints, and writes, what there is of all parts, whichever was done now. Raises StorageError."""
    finished: dict[str, Finished] = {}
    for part, runs in parts.items():
        comparison = Comparison(part, runs, finished_in(output_dir, list(runs)))
        finished.update((one.run.name, one) for one in comparison.finished)
        if not any(one.run.system != BASELINE for one in comparison.finished):
            continue
        tables = list(tables_of(comparison, shape))
        for table in tables:
            print_table(table)
        said = list(notes(comparison, failed))
        print("\n".join(said))
        plots = {f"{part}-by-bytes": over_bytes(comparison, shape)}
        if part == "grid":
            plots["grid"] = over_blocks(comparison)
        for name, charts in plots.items():
            write_file(output_dir / f"{name}.svg", [picture(list(charts)).encode()])
        if publish:
            text = "\n".join([*(f"#{markdown(table)}" for table in tables), "\n".join(said)])
            write_file(PAGE, [between_markers(PAGE.read_text(encoding="utf-8"), part, text).encode()])
    if failed:
        print(f"{counted(len(failed), 'run')} failed: {', '.join(one.run.name for one in failed)}")
    told = [{"run": one.run.name, "exit_code": one.code, "says": one.says} for one in failed]
    write_json(output_dir / "accuracy.json", {"runs": [one.as_json() for one in finished.values()], "failed": told})
    if publish and finished:
        RECORD.parent.mkdir(exist_ok=True)
        write_file(RECORD, [record(list(finished.values()), shape).encode()])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="directory with the tasks' files")
    parser.add_argument("--part", choices=list(PARTS), default="grid")
    parser.add_argument("--output-dir", type=Path, default=Path("output/accuracy"), help="where the runs are")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument(
        "--split-layers", type=int, nargs="+", help="blocks, counted from 1 (default: 2 3 5, low-cut 2)"
    )
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="do those runs alone whose names have one of these")
    parser.add_argument("--max-train-samples", type=int, help="instead of the usual ones")
    parser.add_argument("--max-eval-samples", type=int)
    parser.add_argument("--num-train-epochs", type=float)
    parser.add_argument("--jobs", type=int, default=1, help="so many runs side by side")
    parser.add_argument("--dry-run", action="store_true", help="print the runs, and how long they take")
    parser.add_argument("--publish", action="store_true", help=f"write {PAGE.name} and the record of the package")
    return parser


if __name__ == "__main__":
    sys.exit(main())
