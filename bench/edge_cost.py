"""What three epochs cost the edge: one process that trains the whole model, and a frozen edge, cut low, sent once.

    python bench/edge_cost.py [--rows 640] [--shape minilm|bert-base]

Processor seconds of the edge's process, user and system, and the most memory it held. Each run is one of its own, with
one thread, and the cloud of the split one is another process, which does not count. What every run takes before its
second step (importing, reading, opening a session) is measured by runs of one step, and left out of the second
column. As the edge's steps take less than a start varies by, each of its runs is made three times, and the least counts.
Evaluation is of 16 rows. MiniLM has its weights, BERT-base's shape random ones, and a quarter of the rows.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from runs import BIN, SHAPES, read_results

from sft_edge.systems import CloudProcess
from sft_edge.tasks.synthetic import write_synthetic

MODELS = {
    "minilm": ["--model=minilm"],
    "bert-base": [f"--from-config={SHAPES / 'bert-base.json'}", "--tokenizer-name=minilm"],
}
EPOCHS, SPLIT_LAYER, REPEATS = 3, 2, 3
RUNS = {
    "one process": ["--mode=local"],
    f"frozen edge, cut at block {SPLIT_LAYER}": ["--mode=frozen", f"--split-layer={SPLIT_LAYER}"],
}


class Cost(NamedTuple):
    """Of one process."""

    seconds: float
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
    whole, steps = [], []
    with tempfile.TemporaryDirectory() as scratch:
        write_synthetic(Path(scratch) / "data")
        common = [*MODELS[arguments.shape], "--task=sst2", f"--data-dir={Path(scratch) / 'data'}", "--seed=0"]
        common += [f"--max-train-samples={rows}", "--max-eval-samples=16", f"--num-train-epochs={EPOCHS}"]
        for name, flags in RUNS.items():
            first, all_of_it = (
                least([*common, *flags, *more], Path(scratch) / "out") for more in (["--max-steps=1"], [])
            )
            whole.append(all_of_it)
            steps.append(all_of_it.seconds - first.seconds)
            print(f"{name:<34}{all_of_it.seconds:>8.1f} s{steps[-1]:>8.1f} s{all_of_it.memory_bytes / 1e6:>9,.0f} MB")
    times = [whole[0].seconds / whole[1].seconds, steps[0] / steps[1], whole[0].memory_bytes / whole[1].memory_bytes]
    print(f"{'the first is so many times':<34}{times[0]:>10.1f}{times[1]:>10.1f}{times[2]:>12.2f}")


def least(flags: Sequence[str], output_dir: Path) -> Cost:
    """The least seconds of some runs, one for the whole model, and the most memory. Raises CalledProcessError."""
    costs = [cost(flags, output_dir) for _ in range(1 if "--mode=local" in flags else REPEATS)]
    return Cost(min(one.seconds for one in costs), max(one.memory_bytes for one in costs))


def cost(flags: Sequence[str], output_dir: Path) -> Cost:
    """Of one run's process; a cloud that it needs is beside it. Raises CalledProcessError."""
    if "--mode=local" in flags:
        return _cost(flags, output_dir)
    with CloudProcess(["--device", "cpu", "--threads", "1"]) as cloud:
        return _cost([*flags, f"--server={cloud.address}"], output_dir)


def _cost(flags: Sequence[str], output_dir: Path) -> Cost:
    command = [str(BIN / "sft-edge"), "train", *flags, f"--output-dir={output_dir}", "--overwrite-output-dir"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Cost(used.ru_utime + used.ru_stime, int(read_results(output_dir)["edge_peak_memory_bytes"]))


if __name__ == "__main__":
    sys.exit(main())
