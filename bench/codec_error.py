"""How far a code at the cut moves what comes out at the top: the error of MiniLM's last hidden state, for every codec.

    python bench/codec_error.py --data-dir DATA [--task sst2] [--split-layer 2]

Rows of the validation file, from all over it, run through the model in one piece, as it was pretrained; what its lower
blocks give is written and read in a codec there. `fitted` is fitted as a run on the first 20,000 training rows fits it.
Errors are root mean squares over all tokens, of what crosses beside the spread of that, and of the last hidden state
beside its length.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sft.batch import Batch
from sft.models import Cut, Whole, build_whole, last_of_edge
from sft.models.weights import fill, pretrained_tensors
from sft.wire.codec.elements import FITTED, codecs_named, decode_tensor, encode_tensor
from sft.wire.codec.packing import pack, unpack
from sft.wire.codec.rows import NAMES
from sft_edge.model_files.source import open_source
from sft_edge.options.train import ModelOptions
from sft_edge.systems import fit_tables, rows_to_fit
from sft_edge.tasks import Feature, batches_of, make_task

CPU = torch.device("cpu")
BATCH_SIZE, LONGEST = 32, 128


def main() -> int:
    """Prints a row a codec."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--split-layer", type=int, default=2)
    parser.add_argument("--rows", type=int, default=200, help="to judge by, at most (default: 200)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = make_task(options.task, options.data_dir)
    source = open_source(ModelOptions(model="minilm", max_seq_length=LONGEST), task.config_overrides())
    net = build_whole(source.config, task.head, None)
    fill(net, pretrained_tensors(net, source.checkpoint), 0)
    net.eval()

    def features(split: str, limit: int | None = None) -> list[Feature]:
        return task.encode(task.read(split, limit), source.tokenizer, LONGEST)

    validation, training = features("validation"), features("train", 20_000)
    judged = list(batches_of(task, validation[:: math.ceil(len(validation) / options.rows)], BATCH_SIZE))
    x_TW, top_TW = both_ends(net, judged, options.split_layer)
    drawn = rows_to_fit([feature.length for feature in training], 0)
    to_fit = list(batches_of(task, [training[row] for row in drawn], BATCH_SIZE))
    fit_TW, _ = both_ends(net, to_fit, options.split_layer)
    began = time.process_time()
    tables = fit_tables(fit_TW, 0)
    print(f"fitted to {len(fit_TW)} tokens in {time.process_time() - began:.1f} s")
    codes = codecs_named("float32", FITTED).with_tables(tables, CPU).codes
    spread = (x_TW - x_TW.mean(dim=0)).norm()
    print(f"{'codec':<10}{'bytes a row':>12}{'what crosses':>14}{'last hidden state':>19}")
    for name, codec in NAMES.items():

        def crossed(x: Tensor, codec: Any = codec) -> Tensor:
            return decode_tensor(encode_tensor(x, codec, codes=codes), CPU, codes)

        size = len(encode_tensor(x_TW, codec, codes=codes).data) / len(x_TW)
        there_TW, moved_TW = both_ends(net, judged, options.split_layer, crossed)
        error, above = (there_TW - x_TW).norm() / spread, (moved_TW - top_TW).norm() / top_TW.norm()
        print(f"{name:<10}{size:>12.1f}{error:>14.4f}{above:>19.4f}")
    return 0


def both_ends(net: Whole, batches: Sequence[Batch], split_layer: int, crossed: Any = None) -> tuple[Tensor, Tensor]:
    """What leaves the lower blocks, as `crossed` has it on the other side, and the last hidden state: of all tokens."""
    below: list[Tensor] = []
    above: list[Tensor] = []
    last = int(net.model.config.num_hidden_layers)
    for batch in batches:
        with hooked(net, split_layer, batch, below, crossed), hooked(net, last, batch, above), torch.no_grad():
            net(batch.inputs, batch.lengths, {})
    return torch.cat(below), torch.cat(above)


@contextmanager
def hooked(net: Whole, block: int, batch: Batch, seen: list[Tensor], change: Any = None) -> Iterator[None]:
    """In the block of `with`, what block `block` gives is noted, changed before if it is to be."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        x_BSW = output[0] if is_tuple else output
        x_TW = pack(x_BSW, batch.lengths)
        if change is not None:
            x_TW = change(x_TW)
            x_BSW = unpack(x_TW, batch.lengths, x_BSW.shape[1])
        seen.append(x_TW)
        return (x_BSW, *output[1:]) if is_tuple else x_BSW

    handle = last_of_edge(net, Cut("sl", block)).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


if __name__ == "__main__":
    sys.exit(main())
