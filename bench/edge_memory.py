"""How much memory the cut saves on the edge, and how much LoRA does: BERT-base's shape, batches of 8.

    python bench/edge_memory.py          # cut at block 3, against the whole model in one process
    python bench/edge_memory.py --lora   # cut at block 11: LoRA on the edge's half, against training all of it

Both runs of a comparison train three steps of the same batches with AdamW, each as a process of its own, and report the
most memory that the process held. A parameter in training takes 16 bytes: weight, gradient and Adam's two moments. The
cut moves those of net_2 to the cloud; LoRA leaves a frozen parameter only its weight, which is 4 of them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from runs import SHAPES, train
from transformers import AutoConfig

from sft.models import Cut, Net, build_net_1, build_net_2, build_whole
from sft.models.lora import add_lora, resolve_lora
from sft_edge.options.lora import LoraOptions
from sft_edge.tasks.synthetic import write_synthetic

HEAD = "sequence-classification"
SHAPE, SPLIT_RANK = SHAPES / "bert-base.json", 8
CUT_AT, LORA_CUT_AT = Cut("sft", 3, SPLIT_RANK), Cut("sft", 11, SPLIT_RANK)
LORA = LoraOptions(lora_r=8, lora_half="edge")
BYTES_PER_PARAMETER, BYTES_PER_WEIGHT = 16, 4
FLAGS = [
    f"--from-config={SHAPE}",
    "--tokenizer-name=minilm",
    "--task=sst2",
    f"--split-rank={SPLIT_RANK}",
    "--per-device-train-batch-size=8",
    "--max-steps=3",
    "--max-eval-samples=16",
    "--seed=0",
]


def main(argv: Sequence[str] = ()) -> None:
    """Prints both peaks of a comparison, their difference, and its share of what cannot be needed any more."""
    config = AutoConfig.from_pretrained(str(SHAPE), num_labels=2, trust_remote_code=False, local_files_only=True)
    if list(argv) == ["--lora"]:
        layer = f"--split-layer={LORA_CUT_AT.split_layer}"
        full, edge = peaks([layer], [layer, f"--lora-r={LORA.lora_r}", f"--lora-half={LORA.lora_half}"])
        whole, net_1 = build_whole(config, HEAD, LORA_CUT_AT), build_net_1(config, HEAD, LORA_CUT_AT)
        add_lora(net_1, resolve_lora(LORA.config(), whole).of_half(net_1, "edge"), seed=0)
        frozen = sum(parameter.numel() for parameter in net_1.parameters() if not parameter.requires_grad)
        moved = (BYTES_PER_PARAMETER - BYTES_PER_WEIGHT) * frozen
        rows = [f"edge, cut at block {LORA_CUT_AT.split_layer}, all trained", f"edge, LoRA of rank {LORA.lora_r}"]
        rows.append("frozen: gradients, Adam's moments")
        print(f"{'parameters of net_1':<36}{size(net_1):10,}")
        print(f"{'trained with LoRA':<36}{size(net_1) - frozen:10,}")
    elif not argv:
        layer = f"--split-layer={CUT_AT.split_layer}"
        full, edge = peaks([layer, "--mode=local"], [layer])
        moved = BYTES_PER_PARAMETER * size(build_net_2(config, HEAD, CUT_AT))
        rows = ["whole model, one process", f"edge, cut at block {CUT_AT.split_layer}"]
        rows.append("net_2: weights, gradients, Adam")
    else:
        sys.exit(f"usage: {Path(__file__).name} [--lora]")
    for row, number in zip(rows, (full, edge, moved), strict=True):
        print(f"{row:<36}{number / 1e6:10,.0f} MB")
    print(f"{'saved':<36}{(full - edge) / 1e6:10,.0f} MB")
    print(f"{'of what can be saved':<36}{(full - edge) / moved:10.0%}")


def peaks(*runs: Sequence[str]) -> list[int]:
    """The most memory that each run's edge held, in bytes; a run is the flags that make it differ."""
    with tempfile.TemporaryDirectory() as scratch:
        write_synthetic(Path(scratch) / "data")
        data = f"--data-dir={Path(scratch) / 'data'}"
        results = [train([*FLAGS, data, *flags], Path(scratch) / "run") for flags in runs]
    return [int(result["edge_peak_memory_bytes"]) for result in results]


def size(net: Net) -> int:
    """Its parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


if __name__ == "__main__":
    main(sys.argv[1:])
