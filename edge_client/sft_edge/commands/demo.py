"""`sft-edge demo`: the paper's three systems and a frozen edge, on real weights and a synthetic set."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any, Dict, Mapping, Tuple

from rich import box
from rich.console import Console
from rich.table import Table

from sft.cli.child import python_command
from sft.errors import UsageError
from sft.printable import format_bytes, format_seconds
from sft_edge.options import DemoOptions
from sft_edge.signals import terminations_noted
from sft_edge.tasks import write_synthetic

_RUNS: Dict[str, Tuple[str, Mapping[str, object]]] = {
    "local": ("one process", {"--mode": "local"}),
    "sl": ("plain split learning", {"--mode": "sl"}),
    "sft": ("split fine-tuning", {"--mode": "sft"}),
    "frozen": ("a frozen edge, cut low, sent once", {"--mode": "frozen", "--split-layer": 2}),
}


def demo(options: DemoOptions) -> int:
    """Writes the data, trains, and prints one table. Returns the exit code: 0, or that of the run that failed.

    Raises UsageError where the directory holds what no demo wrote.
    """
    console = Console()
    _check_ours(options.output_dir)
    data_dir = options.output_dir / "data"
    write_synthetic(data_dir, options.seed)
    console.print(f"wrote a synthetic text set to {data_dir}", highlight=False)
    results = {}
    for name, (title, flags) in _RUNS.items():
        console.rule(f"{name}: {title}")
        try:
            results[name] = _run(options, name, flags, data_dir)
        except subprocess.CalledProcessError as error:
            return error.returncode  # the run has said why
    console.print(comparison(results))
    example = 'sft-edge predict --model {} --text "the plot is not bad at all"'.format(options.output_dir / "sft")
    console.print(f"ask the trained model: {example}", highlight=False, soft_wrap=True)
    return 0


def _check_ours(output_dir: Path) -> None:
    for place, names in {".": {"data", *_RUNS}, "data": {"SST-2"}, "data/SST-2": {"train.tsv", "dev.tsv"}}.items():
        for path in (output_dir / place).glob("*"):
            if path.name not in names:
                raise UsageError(f"--output-dir {output_dir} holds {path}, which no demo wrote; name another")


def comparison(results: Dict[str, Dict[str, Any]]) -> Table:
    """One row a run: accuracy, bytes per step with framing, seconds of training, what the edge computed, its memory.

    `reduction` is by how much plain split learning's bytes, with padding and in float32, exceed the payload; `edge
    ms/row` is the edge's own work for each row that it trains on, once an epoch.
    """
    table = Table(box=box.SIMPLE, title="the systems on the synthetic set", title_justify="left")
    for column in ("system", "accuracy", "B/step", "reduction", "time", "edge ms/row", "edge memory"):
        table.add_column(column, justify="left" if column == "system" else "right", no_wrap=True)
    for mode, result in results.items():
        wire = (result["wire_bytes_sent"] + result["wire_bytes_received"]) / result["train_steps"]
        reduction = result["wire_reduction"]
        own = result["edge_forward_seconds"] + result["edge_backward_seconds"]
        table.add_row(
            mode,
            f"{result['eval_accuracy']:.1f}",
            format_bytes(wire) if wire else "-",
            f"{reduction:.1f}x" if reduction else "-",
            format_seconds(result["train_runtime"]),
            f"{1000 * own / result['train_samples']:.1f}",
            format_bytes(result["edge_peak_memory_bytes"]),
        )
    return table


def _run(options: DemoOptions, name: str, own: Mapping[str, object], data_dir: Path) -> Dict[str, Any]:
    """One run, as anyone would start it: in a process of its own, whose memory is its own, too."""
    output_dir = options.output_dir / name
    flags = {
        "--model": options.model,
        "--task": "sst2",
        "--data-dir": data_dir,
        "--split-layer": options.split_layer,
        "--split-rank": options.split_rank,
        "--num-train-epochs": options.num_train_epochs,
        "--max-train-samples": options.max_train_samples,
        "--learning-rate": options.learning_rate,
        "--max-seq-length": 64,
        "--logging-steps": 20,
        "--seed": options.seed,
        "--output-dir": output_dir,
        **own,
    }
    argv = [str(part) for flag in flags.items() for part in flag]
    command = [*python_command("sft_edge.cli"), "train", *argv, "--overwrite-output-dir"]
    with terminations_noted() as asked, subprocess.Popen(command) as run:
        asked.then = run.terminate  # or the run would go on, and nobody would know of it
        if asked.is_set():
            run.terminate()
        code = run.wait()
    if code or asked.is_set():  # a run that has saved a checkpoint ends well
        raise subprocess.CalledProcessError(code or 128 + signal.SIGTERM, command)
    results: Dict[str, Any] = json.loads((output_dir / "all_results.json").read_text(encoding="utf-8"))
    return results
