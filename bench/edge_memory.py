"""How much memory the cut saves on the edge: BERT-base's shape, cut at block 3, against the whole model in one process.

    python bench/edge_memory.py

Both train three steps of the same batches with AdamW, each as a process of its own, and report the most memory that
the process held. What net_2's weights, gradients and Adam's two moments take is 16 bytes for each of its parameters.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from runs import SHAPES, train
from transformers import AutoConfig

from sft.models import Cut, build_net_2
from sft_edge.synthetic import write_synthetic

SHAPE, SPLIT_LAYER, SPLIT_RANK = SHAPES / "bert-base.json", 3, 8
BYTES_PER_PARAMETER = 16
FLAGS = [
    f"--from-config={SHAPE}",
    "--tokenizer-name=minilm",
    "--task=sst2",
    f"--split-layer={SPLIT_LAYER}",
    f"--split-rank={SPLIT_RANK}",
    "--per-device-train-batch-size=8",
    "--max-steps=3",
    "--max-eval-samples=16",
    "--seed=0",
]


def main() -> None:
    """Prints both peaks, their difference, and its share of what net_2 takes in training."""
    config = AutoConfig.from_pretrained(str(SHAPE), num_labels=2)
    net_2 = build_net_2(config, "sequence-classification", Cut("sft", SPLIT_LAYER, SPLIT_RANK))
    moved = BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in net_2.parameters())
    with tempfile.TemporaryDirectory() as scratch:
        write_synthetic(Path(scratch) / "data")
        data = f"--data-dir={Path(scratch) / 'data'}"
        local, edge = (
            train([*FLAGS, data, f"--mode={mode}"], Path(scratch) / mode)["edge_peak_memory_bytes"]
            for mode in ("local", "sft")
        )
    print(f"whole model, one process       {local / 1e6:10,.0f} MB")
    print(f"edge, cut at block {SPLIT_LAYER}           {edge / 1e6:10,.0f} MB")
    print(f"saved                          {(local - edge) / 1e6:10,.0f} MB")
    print(f"net_2: weights, gradients, Adam{moved / 1e6:10,.0f} MB")
    print(f"saved of it                    {(local - edge) / moved:10.0%}")


if __name__ == "__main__":
    sys.exit(main())
