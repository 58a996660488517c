"""What a run leaves behind: `all_results.json`, `trainer_state.json`, and the table at the end."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Dict, Iterator, List, Mapping, Optional

from rich import box
from rich.console import Console
from rich.table import Table

from sft.printable import format_bytes, format_seconds
from sft.wire.ledger import NO_TRAFFIC, PHASES, Ledger

_PLAIN_WIDTH = 120


@dataclass
class TrainerState:
    """The log history and where the run is, in the form of transformers' `trainer_state.json`."""

    max_steps: int
    """steps the run is planned to take"""

    num_train_epochs: float
    """passes over the training rows that it is planned to take"""

    train_batch_size: int
    """sequences in a micro-batch"""

    logging_steps: int
    """steps between training entries of the history"""

    global_step: int = 0
    """steps taken"""

    epoch: float = 0.0
    """passes over the training rows taken"""

    best_metric: Optional[float] = None
    """highest value of the task's main metric so far"""

    log_history: List[Dict[str, Any]] = field(default_factory=list)
    """entries of training (`loss`, `learning_rate`, `grad_norm`) and of evaluation (`eval_*`), each with `epoch` and
    `step`"""

    def log(self, values: Mapping[str, Any]) -> Dict[str, Any]:
        """Adds an entry for the step the run is at, and returns it."""
        entry = {**values, "epoch": self.epoch, "step": self.global_step}
        self.log_history.append(entry)
        return entry

    def record_metric(self, value: float) -> None:
        """Notes the main metric of an evaluation; more is better, as for all of our metrics."""
        if self.best_metric is None or value > self.best_metric:
            self.best_metric = value


def all_results(
    *,
    mode: str,
    split_layer: Optional[int],
    split_rank: Optional[int],
    ledger: Ledger,
    train_loss: float,
    train_runtime: float,
    evaluation: Mapping[str, Any],
    edge_peak_memory_bytes: int,
) -> Dict[str, Any]:
    """The content of `all_results.json`.

    `train_loss` is the mean over the steps, `train_runtime` in seconds without evaluation, `evaluation` holds `eval_*`.
    The `wire_*` figures are of training steps; what evaluation moved stands beside them under `eval_wire_*`. Figures
    that a mode does not have are None.
    """
    traffic, beside = ledger.traffic, ledger.evaluation
    return {
        "mode": mode,
        "split_layer": split_layer,
        "split_rank": split_rank,
        "train_steps": len(ledger),
        "train_samples": ledger.samples,
        "train_loss": train_loss,
        "train_runtime": train_runtime,
        "train_samples_per_second": ledger.samples / train_runtime if train_runtime > 0 else None,
        "train_steps_per_second": len(ledger) / train_runtime if train_runtime > 0 else None,
        **evaluation,
        "wire_payload_bytes_sent": traffic.payload_bytes_sent,
        "wire_payload_bytes_received": traffic.payload_bytes_received,
        "wire_bytes_sent": traffic.bytes_sent,
        "wire_bytes_received": traffic.bytes_received,
        "wire_reduction": ledger.wire_reduction(),
        "eval_wire_bytes_sent": beside.bytes_sent,
        "eval_wire_bytes_received": beside.bytes_received,
        **{f"{phase}_seconds": total for phase, total in ledger.seconds().items()},
        "edge_peak_memory_bytes": edge_peak_memory_bytes,
    }


def peak_memory_bytes(device_bytes: int = 0) -> int:
    """The most memory this process has held: its resident set, plus `device_bytes` of an accelerator as torch says."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return device_bytes + (peak if sys.platform == "darwin" else peak * 1024)
    # Not ru_maxrss, which a process started by a larger one inherits from it.
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return device_bytes + int(line.split()[1]) * 1024


def ledger_lines(ledger: Ledger) -> Iterator[bytes]:
    """A CSV file: for every training step its bytes by kind and direction, and its seconds by phase."""
    columns = ("step", "samples", "plain_bytes", *NO_TRAFFIC.__dict__, *PHASES)
    yield (",".join(columns) + "\n").encode()
    for record in ledger:
        values = {**record.__dict__, **record.traffic.__dict__}
        cells = (f"{values[name]:.6g}" if name in PHASES else str(values[name]) for name in columns)
        yield (",".join(cells) + "\n").encode()


def print_report(ledger: Ledger, results: Mapping[str, Any], stream: Optional[IO[str]] = None) -> None:
    """Prints where the seconds and the bytes went, on stdout unless told otherwise; plain text where no terminal is."""
    console = Console(file=stream or sys.stdout)
    if not console.is_terminal:
        console = Console(file=stream or sys.stdout, width=_PLAIN_WIDTH, color_system=None)
    console.print(_phase_table(ledger, console.is_terminal))
    if ledger.traffic.bytes_sent or ledger.evaluation.bytes_sent:
        console.print(_wire_table(ledger, console.is_terminal))
    for line in _closing_lines(ledger, results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(title: str, columns: List[str], terminal: bool) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE if terminal else None)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table


def _phase_table(ledger: Ledger, terminal: bool) -> Table:
    table = _table("Time", ["phase", "total", "share", "mean/step", "p50", "p95"], terminal)
    for row in ledger.phases():
        if not row.total:  # in one process there is neither a link nor a cloud
            continue
        each = (f"{1000 * seconds:.1f} ms" for seconds in (row.mean, row.p50, row.p95))
        table.add_row(row.name.replace("_", " "), format_seconds(row.total), f"{row.share:.1%}", *each)
    return table


def _wire_table(ledger: Ledger, terminal: bool) -> Table:
    table = _table("Wire", ["direction", "payload", "framing", "total", "total/step"], terminal)
    steps = max(len(ledger), 1)
    for name, traffic in (("training", ledger.traffic), ("evaluation", ledger.evaluation)):
        for direction, payload, total in (
            ("sent", traffic.payload_bytes_sent, traffic.bytes_sent),
            ("received", traffic.payload_bytes_received, traffic.bytes_received),
        ):
            per_step = format_bytes(total / steps) if name == "training" else ""
            sizes = (format_bytes(count) for count in (payload, total - payload, total))
            table.add_row(f"{name}, {direction}", *sizes, per_step)
    return table


def _closing_lines(ledger: Ledger, results: Mapping[str, Any]) -> Iterator[str]:
    reduction = ledger.wire_reduction()
    if reduction is not None:
        yield (
            f"payload is 1/{reduction:.1f} of plain split learning's "
            f"({format_bytes(ledger.plain_bytes)} for the same batches, padded, in float32)"
        )
    metrics = {name: value for name, value in results.items() if name.startswith("eval_") and "wire" not in name}
    for name, value in metrics.items():
        yield f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
