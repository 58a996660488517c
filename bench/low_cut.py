"""Which direction loses at a low cut: a trained edge whose activation or gradient crosses in codes that no option has.

    python bench/low_cut.py --data-dir DATA [--codes rank:8,float32 float32,rank:8 ...] [--publish]

One process trains the whole model, MiniLM cut after a block; what would cross there is written and read in a code,
one of activations and one of gradients: those of `--codec`, and those of low_cut_codes.py. What is fitted is so at the
steps of --fit-at, to the last rows that crossed; activations before that to training rows as they are pretrained, while
gradients cross in full. Bytes are of a token in a step after the last fit, without tables. `--publish` writes the
table, and above it what was run, into docs/decompositions.md.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accuracy_tables import between_markers
from low_cut_codes import code_named
from residual_quality import BATCH_SIZE, LONGEST, order, train
from torch import Tensor

from sft.batch import Batch
from sft.models import Cut, Whole, build_whole, last_of_edge
from sft.models.seeding import derive_seed
from sft.models.weights import fill, pretrained_tensors
from sft.wire.codec.packing import pack, unpack
from sft_edge.commands.reproduce.made_with import as_line, made_with
from sft_edge.files import write_file
from sft_edge.model_files.source import open_source
from sft_edge.options.train import ModelOptions
from sft_edge.systems import rows_to_fit
from sft_edge.tasks import batches_of, make_task
from sft_edge.training.evaluation import EvaluationSet, evaluate

PAGE = Path(__file__).parents[1] / "docs" / "decompositions.md"
CODES_TRIED = (
    "float32,float32",
    "rank:8,float32",
    "float32,rank:8",
    "rank:8,rank:8",
    "fitted:32,float32",
    "float32,fitted:32",
    "fitted:32,fitted:32",
    "float32,none",
    "rank:8,none",
    "fitted:32,none",
    "fitted:48,fitted:16",
    "fitted:16,fitted:48",
    "weighted:32,fitted:32",
    "branch:8,rank:8",
    "branch:8,fitted:32",
)


class Crossing:
    """What a wire would do at the cut."""

    def __init__(self, up: str, down: str, fit_at: Sequence[int], seed: int) -> None:
        self.names = {"up": up, "down": down}
        self.codes = {way: code_named(name, None, None, seed) for way, name in self.names.items()}
        self.bytes = {"up": 0, "down": 0}
        self.tokens = 0
        self._seen: dict[str, deque[Tensor]] = {"up": deque(maxlen=100), "down": deque(maxlen=100)}
        self._fit_at, self._seed = set(fit_at), seed
        self._step, self._lengths = 0, None

    def fit(self, way: str, like_TW: Tensor) -> None:
        """From now on."""
        gradient_TW = torch.cat(list(self._seen["down"])) if way == "up" and self._seen["down"] else None
        self.codes[way] = code_named(self.names[way], like_TW, gradient_TW, self._seed)

    def noted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, each of which crosses before the next is asked for."""
        for step, batch in enumerate(batches):
            if step in self._fit_at:
                for way, seen in self._seen.items():
                    self.fit(way, torch.cat(list(seen)))
                self.bytes, self.tokens = {"up": 0, "down": 0}, 0
            self._step, self._lengths = step, batch.lengths
            self.tokens += sum(batch.lengths)
            yield batch
        self._lengths = None

    def hook(self, module: Any, inputs: Any, output: Any) -> Any:
        """A forward hook of the last block below the cut."""
        if isinstance(output, tuple):
            return (_Across.apply(output[0], self), *output[1:])
        return _Across.apply(output, self)

    def there(self, way: str, x_BSW: Tensor) -> Tensor:
        """As it arrives. In an evaluation rows of padding cross, too, which nobody reads."""
        x_TW = x_BSW.detach().reshape(-1, x_BSW.shape[-1]) if self._lengths is None else pack(x_BSW, self._lengths)
        # Gradients shrink as the loss does: they are coded as shares of what they are on average.
        scale = x_TW.square().mean().sqrt() if way == "down" else torch.ones(())
        x_TW = x_TW / scale
        y_TW, size = self.codes[way](x_TW, derive_seed(self._seed, way, self._step))
        y_TW = y_TW * scale
        if self._lengths is None:
            return y_TW.reshape(x_BSW.shape)
        self._seen[way].append(x_TW.clone())
        self.bytes[way] += size
        return unpack(y_TW, self._lengths, x_BSW.shape[1])


class _Across(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        return crossing.there("up", x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.crossing.there("down", gradient), None


def score(given: argparse.Namespace, up: str, down: str, seed: int) -> tuple[float, float, float]:
    """Trains once: the task's metric, in per cent, and the bytes up and down."""
    task = make_task(given.task, given.data_dir)
    source = open_source(ModelOptions(model="minilm", max_seq_length=LONGEST), task.config_overrides())
    features = task.encode(task.read("train", given.rows), source.tokenizer, LONGEST)
    rows = task.read("validation", given.eval_rows)
    validation = EvaluationSet(rows, task.encode(rows, source.tokenizer, LONGEST))
    net = build_whole(source.config, task.head, None)
    fill(net, pretrained_tensors(net, source.checkpoint), seed)
    crossing = Crossing(up, down, given.fit_at, seed)
    last_of_edge(net, Cut("sl", given.split_layer)).register_forward_hook(crossing.hook)
    if ":" in up:
        to_fit = [features[row] for row in rows_to_fit([feature.length for feature in features], seed)]
        crossing.fit("up", pretrained_rows(net, crossing, list(batches_of(task, to_fit, BATCH_SIZE))))
    steps = given.epochs * -(-len(features) // BATCH_SIZE)
    batches = crossing.noted(order(task, features, steps, seed))
    system = train(net, batches, steps, given.learning_rate, seed)
    results = evaluate(system, task, validation, batch_size=64, step=steps)
    sizes = (crossing.bytes[way] / crossing.tokens for way in ("up", "down"))
    return (results[f"eval_{task.main_metric}"], *sizes)


def pretrained_rows(net: Whole, crossing: Crossing, batches: Sequence[Batch]) -> Tensor:
    """What would cross of these before anything is trained: (T, W)."""
    seen: list[Tensor] = []
    with torch.no_grad(), mock.patch.object(crossing, "there", lambda way, x_BSW: seen.append(x_BSW) or x_BSW):
        for batch in batches:
            net.eval()(batch.inputs, batch.lengths, {})
            seen[-1] = pack(seen[-1], batch.lengths)
    return torch.cat(seen)


def said(given: argparse.Namespace) -> str:
    """What is run."""
    task = make_task(given.task, given.data_dir)
    rows, eval_rows = len(task.read("train", given.rows)), len(task.read("validation", given.eval_rows))
    seeds, steps = ", ".join(map(str, given.seeds)), " and ".join(map(str, given.fit_at)) or "none"
    return (
        f"{given.task}, {rows} training rows, epochs: {given.epochs}, learning rate {given.learning_rate:g}, "
        f"cut at block {given.split_layer}, seeds {seeds}, fitted at steps {steps}; {task.main_metric} on {eval_rows} "
        f"rows of dev. Made with {as_line(made_with(), ('split-fine-tuning', 'python', 'torch', 'transformers'))}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a row for each pair of codes as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--codes", nargs="+", default=CODES_TRIED, metavar="UP,DOWN")
    parser.add_argument("--fit-at", type=int, nargs="*", default=[10, 50], metavar="STEP")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--split-layer", type=int, default=2)
    parser.add_argument("--rows", type=int, default=6400, help="to train on")
    parser.add_argument("--eval-rows", type=int, help="to judge by (default: all)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--publish", action="store_true", help="write the table into docs/decompositions.md")
    given = parser.parse_args(arguments)
    lines = [said(given), "", "| up | down | bytes a token | score |", "|---|---|---:|---:|"]
    print("\n".join(lines), flush=True)
    for pair in given.codes:
        up, down = pair.split(",")
        done = [score(given, up, down, seed) for seed in given.seeds]
        scores = ", ".join(f"{one[0]:.1f}" for one in done)
        lines.append(f"| `{up}` | `{down}` | {done[0][1]:.0f} + {done[0][2]:.0f} | {scores} |")
        print(lines[-1], flush=True)
    if given.publish:
        write_file(PAGE, [between_markers(PAGE.read_text(encoding="utf-8"), "codes", "\n".join(lines)).encode()])
    return 0


if __name__ == "__main__":
    sys.exit(main())
