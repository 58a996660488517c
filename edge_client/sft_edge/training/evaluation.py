"""Judging a model on the validation rows: the same for one process, for a split model, and for a saved one."""

from __future__ import annotations

import time
from typing import Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sft.batch import Batch
from sft.models.losses import head_loss
from sft_edge.systems import System
from sft_edge.tasks import Feature, Row, Task, batches_of


class EvaluationSet(NamedTuple):
    """Rows and what the tokenizer made of them."""

    rows: List[Row]
    features: List[Feature]


def evaluate(system: System, task: Task, data: EvaluationSet, batch_size: int, step: int) -> Dict[str, float]:
    """As `evaluate_with`, by a model in training, `step` steps into it."""

    def ask(features: Sequence[Feature]) -> List[Tensor]:
        return [row for batch in system.logits(batches_of(task, features, batch_size), step) for row in batch]

    return evaluate_with(ask, task, data, batch_size)


def ask(system: System, task: Task, data: EvaluationSet, batch_size: int, step: int) -> None:
    """Sends what `evaluate` would, without waiting."""
    system.ask(batches_of(task, data.features, batch_size), step)


def evaluate_with(
    ask: Callable[[Sequence[Feature]], List[Tensor]], task: Task, data: EvaluationSet, batch_size: int
) -> Dict[str, float]:
    """The task's metrics in percent, the mean loss and the speed, under `eval_*` names as in transformers.

    `ask` gives one entry a feature: (C,), or (S, 2) of its batch for question answering.
    """
    began = time.perf_counter()
    logits = ask(data.features)
    seconds = time.perf_counter() - began
    results = {f"eval_{name}": value for name, value in task.metrics(logits, data.features, data.rows).items()}
    loss = mean_loss(task, logits, batches_of(task, data.features, batch_size))
    if loss is not None:
        results["eval_loss"] = loss
    results["eval_samples"] = len(data.rows)
    results["eval_runtime"] = seconds
    results["eval_samples_per_second"] = len(data.rows) / seconds if seconds > 0 else 0.0
    return results


def mean_loss(task: Task, logits: Sequence[Tensor], batches: Iterable[Batch]) -> Optional[float]:
    """The loss that training minimizes, mean over features; None where labels are not known.

    Computed here, from logits: labels of validation rows never leave the edge.
    """
    total, count = 0.0, 0
    for batch in batches:
        if not batch.labels:
            return None
        of_batch = logits[count : count + len(batch.lengths)]
        total += float(_loss(task, of_batch, batch)) * len(batch.lengths)
        count += len(batch.lengths)
    return total / count if count else None


def _loss(task: Task, logits: Sequence[Tensor], batch: Batch) -> Tensor:
    if task.head == "sequence-classification":
        return head_loss(task.head, task.problem_type, torch.stack(list(logits)), batch.labels, batch.lengths)
    # Rows of tokens were padded to the longest of the batch that they were asked in, which is another than this one.
    rows = [row[:length] for row, length in zip(logits, batch.lengths)]
    return head_loss(task.head, task.problem_type, pad_sequence(rows, batch_first=True), batch.labels, batch.lengths)
