"""By how much split fine-tuning shrinks what crosses the wire, against plain split learning with the same batches.

    python bench/wire.py

Trains three steps of both for MiniLM and for BERT-base's shape at rank 8, batches of 32 of the synthetic data, and
prints the ratio of the payload (activations and gradients; N/R by the paper) and of everything including framing.
"""

from __future__ import annotations

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
FLAGS = ["--task=sst2", "--split-rank=8", "--per-device-train-batch-size=32", "--max-steps=3", "--max-eval-samples=32"]


def main() -> None:
    """Prints one row a model."""
    print(f"{'':<18}{'payload, sl/sft':>18}{'with framing':>18}")
    with tempfile.TemporaryDirectory() as scratch:
        write_synthetic(Path(scratch) / "data")
        data = f"--data-dir={Path(scratch) / 'data'}"
        for name, model in MODELS.items():
            sl, sft = (
                train([*model, *FLAGS, data, f"--mode={mode}", "--seed=0"], Path(scratch) / mode)
                for mode in ("sl", "sft")
            )
            print(f"{name:<18}{both_ways(sl, 'payload_') / both_ways(sft, 'payload_'):>18.2f}", end="")
            print(f"{both_ways(sl, '') / both_ways(sft, ''):>18.2f}", flush=True)


def both_ways(results: dict[str, Any], kind: str) -> int:
    """Bytes sent and received in training."""
    return int(results[f"wire_{kind}bytes_sent"]) + int(results[f"wire_{kind}bytes_received"])


if __name__ == "__main__":
    sys.exit(main())
