"""The whole model in one process, without a cloud: the paper's baseline."""

from __future__ import annotations

import math
from typing import Dict, Iterable, Iterator, List

import torch
from torch import Tensor, nn

from sft.batch import Batch
from sft.models import Whole
from sft.models.lora import merged_tensors
from sft.models.seeding import seeded
from sft.optim.gradients import scale_gradients, squared_gradient_norm
from sft.tensors.stream import Shard, safetensors_chunks
from sft.wire.ledger import Ledger
from sft_edge.systems.system import StepTimer, System


class LocalSystem(System):
    """The whole model in this process."""

    def __init__(self, net: Whole, optimizer: torch.optim.Optimizer, seed: int) -> None:
        self.net = net
        self.optimizer = optimizer
        self.ledger = Ledger()
        self._seed = seed
        self._step = StepTimer()

    def forward_backward(self, batch: Batch, step: int, micro_batch: int, loss_scale: float) -> float:
        self.net.train()
        with seeded(self.net.device, self._seed, "whole", step, micro_batch):
            with self._step.phase("edge_forward"):
                loss = self.net(*batch).loss
            with self._step.phase("edge_backward"):
                (loss * loss_scale).backward()
        self._step.samples += len(batch.lengths)
        return float(loss.item())

    def gradient_norm(self) -> float:
        return math.sqrt(squared_gradient_norm(self.net.parameters()))

    def update(self, step: int, clip_scale: float) -> None:
        with self._step.phase("edge_backward"):
            scale_gradients(self.net.parameters(), clip_scale)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.ledger.add(self._step.record(step))

    def logits(self, batches: Iterable[Batch], step: int) -> Iterator[Tensor]:
        self.net.eval()
        for batch in batches:
            with torch.no_grad():
                yield self.net(batch.inputs, batch.lengths, {}).logits.cpu()

    def own_parameters(self) -> Dict[str, nn.Parameter]:
        return self.net.whole_parameters()

    def shards(self) -> List[Shard]:
        tensors = merged_tensors(self.net)
        return [Shard([tensor.name for tensor in tensors], safetensors_chunks(tensors))]
