"""What three epochs cost the edge: one process that trains the whole model, and a frozen edge, cut low, sent once.

    python bench/edge_cost.py [--rows 640] [--shape minilm|bert-base]

Processor seconds of the edge's process, user and system, and the most memory it held. Each run is one of its own, with
one thread, and the cloud of the split one is another process, which does not count. The second column is of the
training loop alone: without importing, reading and opening a session. Evaluation is of 16 rows. MiniLM has its
weights, BERT-base's shape random ones, and a quarter of the rows.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from runs import SHAPES, read_results

import sft_edge.cli
from sft_edge.systems import CloudProcess
from sft_edge.tasks.synthetic import write_synthetic
from sft_edge.training.loop import TrainingLoop

MODELS = {
    "minilm": ["--model=minilm"],
    "bert-base": [f"--from-config={SHAPES / 'bert-base.json'}", "--tokenizer-name=minilm"],
}
EPOCHS, SPLIT_LAYER = 3, 2
_MEASURED = "--measured-run"
RUNS = {
    "one process": ["--mode=local"],
    f"frozen edge, cut at block {SPLIT_LAYER}": ["--mode=frozen", f"--split-layer={SPLIT_LAYER}"],
}


class Cost(NamedTuple):
    """Of one process."""

    seconds: float
    loop_seconds: float
    memory_bytes: int


def main() -> None:
    """Prints a row a run, and what the second is of the first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=640, metavar="N", help="to train on (default: 640)")
    parser.add_argument("--shape", choices=list(MODELS), default="minilm", help="of the model (default: minilm)")
    arguments = parser.parse_args()
    rows = arguments.rows if arguments.shape == "minilm" else max(64, arguments.rows // 4)
    print(f"{arguments.shape}, {rows} rows, {EPOCHS} epochs, batches of 32")
    print(f"{'':<34}{'all':>10}{'steps':>10}{'memory':>12}")
    costs = []
    with tempfile.TemporaryDirectory() as scratch:
        write_synthetic(Path(scratch) / "data")
        common = [*MODELS[arguments.shape], "--task=sst2", f"--data-dir={Path(scratch) / 'data'}", "--seed=0"]
        common += [f"--max-train-samples={rows}", "--max-eval-samples=16", f"--num-train-epochs={EPOCHS}"]
        for name, flags in RUNS.items():
            one = cost([*common, *flags], Path(scratch) / "out")
            costs.append(one)
            print(f"{name:<34}{one.seconds:>8.1f} s{one.loop_seconds:>8.1f} s{one.memory_bytes / 1e6:>9,.0f} MB")
    times = [first / second for first, second in zip(*costs, strict=True)]
    print(f"{'the first is so many times':<34}{times[0]:>10.1f}{times[1]:>10.1f}{times[2]:>12.2f}")


def cost(flags: Sequence[str], output_dir: Path) -> Cost:
    """Of one run's process; a cloud that it needs is beside it. Raises CalledProcessError."""
    if "--mode=local" in flags:
        return _cost(flags, output_dir)
    with CloudProcess(["--device", "cpu", "--threads", "1"]) as cloud:
        return _cost([*flags, f"--server={cloud.address}"], output_dir)


def _cost(flags: Sequence[str], output_dir: Path) -> Cost:
    own = [f"--output-dir={output_dir}", "--overwrite-output-dir"]
    command = [sys.executable, __file__, _MEASURED, "train", *flags, *own]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    *_, loop_seconds = process.stdout.read().split()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    memory_bytes = int(read_results(output_dir)["edge_peak_memory_bytes"])
    return Cost(used.ru_utime + used.ru_stime, float(loop_seconds), memory_bytes)


def measured(arguments: Sequence[str]) -> int:
    """`sft-edge` in this process; then it prints the processor seconds of the training loop."""
    run, seconds = TrainingLoop.run, []

    def timed(loop: TrainingLoop) -> None:
        begin = time.process_time()
        run(loop)
        seconds.append(time.process_time() - begin)

    TrainingLoop.run = timed  # type: ignore[method-assign]
    code = sft_edge.cli.main(arguments)
    print(*seconds)
    return code


if __name__ == "__main__":
    sys.exit(measured(sys.argv[2:]) if sys.argv[1:2] == [_MEASURED] else main())
