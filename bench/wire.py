"""By how much split fine-tuning shrinks what crosses the wire, against plain split learning with the same batches.

    python bench/wire.py [--data-dir DIR]     # with SST-2 in it; without, the synthetic set

Trains three steps of both for MiniLM and for BERT-base's shape at rank 8, batches of 32, and prints the ratio of the
payload (activations and gradients; N/R by the paper) and of everything including framing, for each codec. The last
column is against plain split learning as the paper counts it, in float32 with its padding, framing of ours included.
With `fitted` whole activations cross, of an edge that is not trained, and no gradient comes back; its tables, which are
sent before the first step, are not counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from runs import SHAPES, train

from sft_edge.tasks.synthetic import write_synthetic

MODELS = {
    "MiniLM-L6": ["--model=minilm", "--split-layer=5"],
    "BERT-base shape": [f"--from-config={SHAPES / 'bert-base.json'}", "--tokenizer-name=minilm", "--split-layer=11"],
}
CODECS = ("float32", "int8", "int4")
FLAGS = ["--task=sst2", "--split-rank=8", "--per-device-train-batch-size=32", "--max-steps=3", "--max-eval-samples=32"]


def main() -> None:
    """Prints one row a model and codec."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data-dir", type=Path, help="with SST-2 in it (default: a synthetic set)")
    data_dir = parser.parse_args().data_dir
    print(f"{'':<18}{'codec':<10}{'payload, sl/sft':>18}{'with framing':>18}{'padded sl/sft':>18}")
    with tempfile.TemporaryDirectory() as scratch:
        if data_dir is None:
            data_dir = Path(scratch) / "data"
            write_synthetic(data_dir)
        flags = [*FLAGS, f"--data-dir={data_dir}", "--seed=0"]
        for name, model in MODELS.items():
            sl = train([*model, *flags, "--mode=sl"], Path(scratch) / "sl")
            for codec in (*CODECS, "fitted"):
                way = ["--mode=sl", "--freeze-edge"] if codec == "fitted" else ["--mode=sft"]
                sft = train([*model, *flags, *way, f"--codec={codec}"], Path(scratch) / "sft")
                padded = sft["wire_reduction"] * both_ways(sft, "payload_")
                ratios = [both_ways(sl, kind) / both_ways(sft, kind) for kind in ("payload_", "")]
                print(f"{name:<18}{codec:<10}{ratios[0]:>18.2f}{ratios[1]:>18.2f}{padded / both_ways(sft, ''):>18.1f}")


def both_ways(results: dict[str, Any], kind: str) -> int:
    """Bytes sent and received in training."""
    return int(results[f"wire_{kind}bytes_sent"]) + int(results[f"wire_{kind}bytes_received"])


if __name__ == "__main__":
    sys.exit(main())
