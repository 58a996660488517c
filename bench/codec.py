"""What writing and reading takes, as a share of a step, and how near what comes back is: for every codec.

    python bench/codec.py [--repeats 30]

Rows of a batch of 32 sequences of 20 tokens, of the width of MiniLM (384), of BERT-base (768) and of the paper's ranks
8 and 64: an activation is written and read, to the nearest, and a gradient, by chance; with `fitted` an activation
alone. That is fitted to other random rows, which have nothing in common: its error is what it is at worst. The step
beside it is that of the model in one piece, forward and backward, of MiniLM's shape, or for 768 of BERT-base's with
random weights. All take turns, a step in ten; medians. One thread. Runs on every Python and torch that the edge does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import BertConfig

from sft.models import build_whole
from sft.models.weights import fill
from sft.wire.codec.elements import FITTED, codecs_named, decode_tensor, encode_tensor
from sft.wire.codec.rows import CODES, NAMES, Codes
from sft_edge.systems import FIT_TOKENS, fit_tables

CPU = torch.device("cpu")
SEQUENCES, TOKENS = 32, 20
SHAPES = {
    384: {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    768: {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
"""By model width."""
WIDTHS = {8: 384, 64: 384, 384: 384, 768: 768}
"""On the wire, and of the model whose step is meant."""


def main() -> int:
    """Prints a row a codec and width."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="of every measurement (default: 30)")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")
    print(f"{'width':>5} {'codec':<10}{'bits an element':>16}{'error':>9}{'ms':>8}{'of a step':>11}")
    steps = {width: step_of(width) for width in SHAPES}
    for width, model in WIDTHS.items():
        a_TR = torch.randn(SEQUENCES * TOKENS, width)
        codes = codecs_named("float32", FITTED).with_tables(fit_tables(torch.randn(FIT_TOKENS, width), 0), CPU).codes
        works = {name: crossing_of(a_TR, codec, codes) for name, codec in NAMES.items()}
        taken: dict[str, list[float]] = {name: [] for name in (*works, "step")}
        for turn in range(repeats):
            for name, work in works.items():
                taken[name].append(seconds_of(work))
            if turn % 10 == 0:
                taken["step"].append(seconds_of(steps[model]))
        a_step = statistics.median(taken.pop("step"))
        for name, codec in NAMES.items():
            written = encode_tensor(a_TR, codec, codes=codes)
            error = float((decode_tensor(written, CPU, codes) - a_TR).norm() / a_TR.norm())
            bits = 8 * len(written.data) / a_TR.numel()
            seconds = statistics.median(taken[name])
            print(f"{width:>5} {name:<10}{bits:>16.2f}{error:>9.4f}{1e3 * seconds:>8.2f}{seconds / a_step:>11.2%}")
        print(f"{width:>5} a step{'':>35}{1e3 * a_step:>8.0f}")
    return 0


def step_of(width: int) -> Callable[[], None]:
    """Forward and backward of the model in one piece, which has been done once."""
    config = BertConfig(vocab_size=1000, num_labels=2, problem_type="single_label_classification", **SHAPES[width])
    net = build_whole(config, "sequence-classification")
    fill(net, [], 0)
    ids_BS = torch.randint(1000, (SEQUENCES, TOKENS))
    labels: dict[str, torch.Tensor] = {"labels": torch.zeros(SEQUENCES, dtype=torch.int64)}

    def step() -> None:
        loss = net({"input_ids": ids_BS}, [TOKENS] * SEQUENCES, labels).loss
        assert loss is not None
        loss.backward()

    step()
    return step


def crossing_of(a_TR: torch.Tensor, codec: int, codes: Codes) -> Callable[[], None]:
    """There and back, which has been done once."""

    def crossing() -> None:
        decode_tensor(encode_tensor(a_TR, codec, codes=codes), CPU, codes)
        if codec in CODES:
            decode_tensor(encode_tensor(a_TR, codec, rounding=1), CPU)

    crossing()
    return crossing


def seconds_of(work: Callable[[], None]) -> float:
    """By the clock."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
