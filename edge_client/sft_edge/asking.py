"""Logits of a saved model, in this process."""

from __future__ import annotations

from typing import List, Sequence

import torch
from torch import Tensor

from sft_edge.evaluation import batches_of
from sft_edge.saving import SavedModel
from sft_edge.tasks import Feature, Task


def ask(model: SavedModel, task: Task, features: Sequence[Feature], batch_size: int) -> List[Tensor]:
    """One entry a feature: (C,), or (S, 2) of its batch for question answering."""
    logits: List[Tensor] = []
    for batch in batches_of(task, features, batch_size):
        with torch.no_grad():
            logits.extend(model.net(batch.inputs, batch.lengths, {}).logits.cpu())
    return logits
