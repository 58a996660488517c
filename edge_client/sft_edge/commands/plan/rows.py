"""How long the batches of a run are, by a sample of its rows; and made-up batches that are as long."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import torch

from sft.batch import Batch
from sft.models.seeding import derive_seed
from sft_edge.model_files import Source
from sft_edge.options import RunOptions
from sft_edge.tasks import Feature, Task

SAMPLE_ROWS = 4096
"""More than say how long batches are, and tokenized in a second or two."""

_LENGTHS = (0.05, 0.5, 1.0)
"""Of all batches by padded length, those whose lengths are measured: a short one, the middle, the longest."""


@dataclass(frozen=True)
class Rows:
    """Of one split: a sample, drawn from all over the file."""

    features: Sequence[Feature]
    lengths: List[int]
    """Tokens of each feature of the sample."""

    times: float
    """So many features are in the split for each of the sample."""

    @property
    def count(self) -> int:
        """Features of the split, about."""
        return round(len(self.lengths) * self.times)


def sample(task: Task, split: str, source: Source, options: RunOptions, limit: Optional[int]) -> Rows:
    """Raises what reading and encoding raise."""
    rows = task.read(split, limit)
    some = rows
    if len(rows) > SAMPLE_ROWS:
        generator = torch.Generator().manual_seed(derive_seed(options.training.seed, "plan", split))
        some = [rows[index] for index in torch.randperm(len(rows), generator=generator)[:SAMPLE_ROWS].tolist()]
    features = task.encode(some, source.tokenizer, options.model.max_seq_length)
    return Rows(features, [feature.length for feature in features], len(rows) / len(some))


class Batches:
    """The micro-batches of an epoch, in an order like that of a run."""

    def __init__(self, rows: Rows, task: Task, options: RunOptions, vocabulary: int) -> None:
        """`vocabulary`: ids of tokens are below that."""
        training = options.training
        self._task, self._vocabulary, self._seed = task, vocabulary, training.seed
        self._few = list(rows.features[: training.per_device_train_batch_size])
        self.size = len(self._few)
        generator = torch.Generator().manual_seed(derive_seed(training.seed, "order", 0))
        order = torch.randperm(len(rows.lengths), generator=generator).tolist()
        groups = [order[start : start + self.size] for start in range(0, len(order), self.size)]
        if rows.times > 1 and len(groups) > 1 and len(groups[-1]) < self.size:
            groups.pop()  # of all rows there is one such, too, and not for each sample
        lengths = [[rows.lengths[index] for index in group] for group in groups]
        self.shapes: List[Tuple[float, float]] = [(max(of), len(of) / self.size) for of in lengths]
        """Of each its padded length, and how much of a full one it is."""
        self.tokens = sum(map(sum, lengths)) / len(lengths)
        """Of one, on average, without padding."""
        padded = sum(max(of) * len(of) for of in lengths)
        self._filled = sum(map(sum, lengths)) / padded
        by_length = sorted(max(of) for of in lengths)
        chosen = {by_length[min(int(share * len(by_length)), len(by_length) - 1)] for share in _LENGTHS}
        self.measured: List[int] = sorted(chosen)
        """Padded lengths that are measured."""
        self.in_epoch = math.ceil(rows.count / self.size)
        """Micro-batches."""
        self.in_step = min(training.gradient_accumulation_steps, self.in_epoch)
        """Micro-batches of the longest step: an epoch ends with whatever is left for its last one."""

    def tokens_of(self, length: int) -> int:
        """Tokens of a made-up batch of that padded length."""
        return sum(self._lengths(length))

    def made_up(self, length: int, number: int) -> Batch:
        """A full one of that padded length, as full of tokens as those of the run are, and none of them of its rows:
        tokens are drawn, labels are zeros."""
        like = self._task.collate(self._few)
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "plan", length, number))
        inputs = {name: torch.zeros(self.size, length, dtype=torch.int64) for name in like.inputs}
        inputs["input_ids"] = torch.randint(self._vocabulary, (self.size, length), generator=generator)
        return Batch(inputs, self._lengths(length), {name: torch.zeros_like(y) for name, y in like.labels.items()})

    def _lengths(self, length: int) -> List[int]:
        return [length] + [max(1, round(length * self._filled))] * (self.size - 1)
