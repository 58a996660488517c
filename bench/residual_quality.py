"""What the cut costs in quality: the residual dropped, as in the paper, against kept at low rank; by block and rank.

    python bench/residual_quality.py --data-dir DATA                  an encoder: MiniLM-L6 on SST-2
    python bench/residual_quality.py --data-dir DATA --kind decoder   a decoder: a small GPT-2 on the same sentences

One process trains the decomposed model: the halves compute the same (tests/common/models/test_families.py). The encoder
is fine-tuned for one epoch and judged by its accuracy on the validation rows. The decoder, for which no pretrained
weights come with the package, is first trained from scratch as a language model, then cut, and judged by its loss in
nats a token right after the cut and after fine-tuning; the uncut model goes on beside it for as many steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, get_scheduler

from sft.batch import Batch
from sft.models import Cut, Whole, build_whole
from sft.models.seeding import derive_seed
from sft.models.weights import factor_tensors, fill, live_factors, live_tensors, pretrained_tensors
from sft.optim.spec import OptimizerSpec, decay_groups, make_optimizer
from sft.tensors.hub import find_model
from sft.tensors.stream import StoredTensor, in_memory
from sft_edge.model_files.source import open_source
from sft_edge.model_files.tokenizer_file import read_tokenizer
from sft_edge.options.train import ModelOptions
from sft_edge.systems.local import LocalSystem
from sft_edge.tasks import Feature, Task, make_task
from sft_edge.tasks.base import batches_of
from sft_edge.training.evaluation import EvaluationSet, evaluate

BATCH_SIZE, CALIBRATION_BATCHES, LONGEST = 32, 8, 64


class Settings(NamedTuple):
    """What the command line says."""

    kind: str
    data_dir: Path
    split_layers: Sequence[int]
    split_ranks: Sequence[int]
    rows: int
    pretraining_steps: int
    steps: int
    seed: int
    device: torch.device


def cuts(settings: Settings) -> Iterator[Cut]:
    """Every cut that is measured."""
    for split_layer in settings.split_layers:
        for split_rank in settings.split_ranks:
            for residual in ("none", "low-rank"):
                yield Cut("sft", split_layer, split_rank, residual)


def order(task: Task, features: Sequence[Feature], steps: int, seed: int) -> Iterator[Batch]:
    """So many batches, the data in a new order each time it begins anew."""
    generator, taken, epoch = torch.Generator(), 0, 0
    while True:
        generator.manual_seed(derive_seed(seed, "order", epoch))
        shuffled = [features[index] for index in torch.randperm(len(features), generator=generator)]
        for batch in batches_of(task, shuffled, BATCH_SIZE):
            if taken == steps:
                return
            yield batch
            taken += 1
        epoch += 1


def train(net: Whole, batches: Iterator[Batch], steps: int, learning_rate: float, seed: int) -> LocalSystem:
    """AdamW with a linear schedule and gradients clipped to 1, dropout on."""
    spec = OptimizerSpec("AdamW", decay_groups(net, {"lr": learning_rate, "weight_decay": 0.0}))
    system = LocalSystem(net, make_optimizer(spec, net.whole_parameters()), seed)
    schedule = get_scheduler("linear", system.optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    for step, batch in enumerate(batches):
        system.forward_backward(batch, step, 0, 1.0)
        system.update(step, min(1.0, 1.0 / (system.gradient_norm() + 1e-6)))
        schedule.step()
    return system


def encoder(settings: Settings, task: Task) -> None:
    """MiniLM-L6: accuracy on the validation rows after one epoch."""
    source = open_source(ModelOptions(model="minilm", max_seq_length=LONGEST), task.config_overrides())
    features = task.encode(task.read("train", settings.rows), source.tokenizer, LONGEST)
    rows = task.read("validation")
    validation = EvaluationSet(rows, task.encode(rows, source.tokenizer, LONGEST))
    calibration = list(order(task, features, CALIBRATION_BATCHES, settings.seed))
    steps = -(-len(features) // BATCH_SIZE)

    def measure(cut: Cut | None) -> dict[str, float]:
        whole = build_whole(source.config, task.head, cut)
        factors: list[StoredTensor] = []
        if cut is not None:
            halves = factor_tensors(source.config, task.head, cut, source.checkpoint, settings.seed, calibration)
            factors = [*halves[0], *halves[1]]
        tensors = [*pretrained_tensors(whole, source.checkpoint), *factors]
        fill(whole, tensors, settings.seed, settings.device)
        batches = order(task, features, steps, settings.seed)
        system = train(whole, batches, steps, learning_rate=1e-4, seed=settings.seed)
        return evaluate(system, task, validation, batch_size=64, step=steps)

    print("cut at  rank  residual   accuracy %   loss")
    for cut in (None, *cuts(settings)):
        result = measure(cut)
        print(f"{name_of(cut)}   {result['eval_accuracy']:10.1f}   {result['eval_loss']:.3f}", flush=True)


def next_token(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same sentences for a language model."""
    for batch in batches:
        inputs = {"input_ids": batch.inputs["input_ids"]}
        yield Batch(inputs, batch.lengths, {"labels": inputs["input_ids"]})


def decoder(settings: Settings, task: Task) -> None:
    """A GPT-2 of six blocks of width 256: the language model's loss on the validation rows."""
    tokenizer = read_tokenizer(find_model("minilm"))
    shape = {"n_layer": 6, "n_embd": 256, "n_inner": 1024, "n_head": 4, "n_positions": LONGEST}
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    config = AutoConfig.for_model("gpt2", vocab_size=len(tokenizer), **ends, **shape)
    features = task.encode(task.read("train", settings.rows), tokenizer, LONGEST)
    validation = task.encode(task.read("validation"), tokenizer, LONGEST)

    def train_on(net: Whole, steps: int, learning_rate: float, epoch_seed: int) -> None:
        train(net, next_token(order(task, features, steps, epoch_seed)), steps, learning_rate, settings.seed)

    def loss_of(net: Whole) -> float:
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in next_token(batches_of(task, validation, 64)):
                predicted = sum(batch.lengths) - len(batch.lengths)
                loss = net.eval()(*batch).loss
                assert loss is not None  # there are labels
                total, tokens = total + float(loss) * predicted, tokens + predicted
        return total / tokens

    pretrained = build_whole(config, "causal-lm", Cut("sl", 1))  # untied, as every cut is
    fill(pretrained, [], settings.seed, settings.device)
    train_on(pretrained, settings.pretraining_steps, 1e-3, settings.seed)
    weights = list(in_memory({name: p.detach().clone() for name, p in pretrained.whole_parameters().items()}))
    calibration = list(next_token(order(task, features, CALIBRATION_BATCHES, settings.seed)))

    def measure(cut: Cut | None) -> tuple[float, float]:
        fill(pretrained, weights, settings.seed, settings.device)
        net: Whole = pretrained
        if cut is not None:
            net = build_whole(config, "causal-lm", cut)
            halves = live_factors(pretrained.model, "causal-lm", cut, calibration)
            tensors = [*live_tensors(pretrained.model, net), *halves[0], *halves[1]]
            fill(net, tensors, settings.seed, settings.device)
        before = loss_of(net)
        train_on(net, settings.steps, 3e-4, settings.seed + 1)
        return before, loss_of(net)

    print("cut at  rank  residual   loss after the cut   after fine-tuning")
    for cut in (None, *cuts(settings)):
        before, after = measure(cut)
        print(f"{name_of(cut)}   {before:18.3f}   {after:17.3f}", flush=True)


def name_of(cut: Cut | None) -> str:
    """The first columns of a line."""
    if cut is None:
        return f"{'uncut':22}"
    return f"{cut.split_layer:6}  {cut.split_rank:4}  {cut.residual:8}"


def read_settings(arguments: Sequence[str] | None = None) -> Settings:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder that holds SST-2/train.tsv")
    parser.add_argument("--kind", choices=["encoder", "decoder"], default="encoder")
    parser.add_argument("--split-layers", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--split-ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rows", type=int, default=6400, help="training rows")
    parser.add_argument("--pretraining-steps", type=int, default=2000, help="of the decoder, before the cut")
    parser.add_argument("--steps", type=int, default=300, help="of the decoder, after the cut")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    return Settings(**vars(parser.parse_args(arguments)))


def main() -> None:
    """Prints one line for every cut."""
    settings = read_settings()
    task = make_task("sst2", settings.data_dir)
    (encoder if settings.kind == "encoder" else decoder)(settings, task)


if __name__ == "__main__":
    sys.exit(main())
