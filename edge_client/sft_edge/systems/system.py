"""What the training loop trains: one of the paper's three systems, behind one interface.

`local` trains the model in one process, `sl` is plain split learning, `sft` is split fine-tuning. The loop, the data,
the schedule and the evaluation are the same for all three.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from sft.batch import Batch
from sft.tensors.stream import Shard
from sft.wire.ledger import NO_TRAFFIC, PHASES, Ledger, StepRecord, Traffic
from sft_edge.link import Left


class System(ABC):
    """A model with its optimizer, wherever its parts are.

    A step is one or more micro-batches of `forward_backward`, then `gradient_norm` if wanted, then `update`.
    """

    optimizer: torch.optim.Optimizer
    """The edge's; learning-rate schedulers act on it, and what they set holds on both sides."""

    ledger: Ledger
    """Bytes and seconds of every step."""

    @abstractmethod
    def forward_backward(self, batch: Batch, step: int, micro_batch: int, loss_scale: float) -> float:
        """Adds the gradients of `loss_scale` times the batch's mean loss, on both halves; returns the loss unscaled."""

    @property
    def keeps_activations(self) -> bool:
        """Whether what `forward_backward` computes of a batch once is kept for all epochs: see `prepare`."""
        return False

    @property
    def sends_rows_once(self) -> bool:
        """Whether the cloud keeps what the first epoch sends of each sequence, so that it does not cross again."""
        return False

    def prepare(self, batch: Batch) -> None:
        """Has what is kept of a batch be there, as if it had been trained on."""
        del batch

    @abstractmethod
    def gradient_norm(self) -> float:
        """The norm of the gradients added so far, over both halves."""

    @abstractmethod
    def update(self, step: int, clip_scale: float) -> None:
        """Multiplies all gradients by `clip_scale`, takes the step on both halves, and forgets the gradients."""

    @property
    def sends_ahead(self) -> bool:
        """Whether steps are sent, by `send`, as fast as they come: nothing is trained here that would have to wait."""
        return False

    def send(self, step: int, ahead: bool) -> SentStep:
        """Begins to send a step. `ahead`: the one before is not settled."""
        raise NotImplementedError

    @property
    def can_leave(self) -> bool:
        """Whether the other side goes on alone with what is sent ahead: see `leave`."""
        return False

    @property
    def makes_again(self) -> bool:
        """Whether steps and evaluations are those that were left to the other side, and are not sent anew."""
        return False

    def leave(self, sends: Callable[[], None], announce: Callable[[Left], None]) -> None:
        """Has the other side do what `sends`, by `send` and `ask`, leaves to it; `announce` is told before. Raises what
        they do, and CloudMemoryError where the other side does not take that: then nothing was done."""
        raise NotImplementedError

    def ask(self, batches: Iterable[Batch], step: int) -> None:
        """Has the other side find out what `logits` asks for, without waiting."""
        raise NotImplementedError

    def undo(self) -> None:
        """Forgets the gradients of a step that the cloud has undone for want of memory: it may be begun anew."""
        self.optimizer.zero_grad(set_to_none=True)

    @abstractmethod
    def logits(self, batches: Iterable[Batch], step: int) -> Iterator[Tensor]:
        """For every batch in order: (B, C), or (B, S, 2) for question answering. No dropout, no gradient."""

    @abstractmethod
    def own_parameters(self) -> Dict[str, nn.Parameter]:
        """All that are in this process, by names in the whole model: what a checkpoint holds of this side."""

    @property
    def first_step(self) -> int:
        """The step that the other side has got to when the system was opened; 0 in a new run, and in one process."""
        return 0

    @property
    def stopping(self) -> bool:
        """Whether the other side is about to end, and waits for a checkpoint."""
        return False

    @property
    def codec_tables(self) -> Mapping[str, Tensor]:
        """Of a codec that was fitted to this run's activations: what goes on from a checkpoint needs the same."""
        return {}

    def save_other_half(self) -> Optional[str]:
        """Has the cloud save its half; gives the hash of its manifest, None in one process. Raises StorageError."""
        return None

    def keep_checkpoints(self, steps: Sequence[int]) -> None:
        """Tells the cloud which steps are left; it deletes the others. Raises nothing for old ones that stay."""
        del steps

    def kept_state(self) -> Dict[str, Tensor]:
        """What a checkpoint needs beside, if anything, to go on with what the cloud keeps. It holds a key."""
        return {}

    def load_kept_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on where `kept_state` was given. Raises CheckpointError where the cloud holds something else."""
        del state

    @abstractmethod
    def shards(self) -> List[Shard]:
        """All parameters as they are now, adapters merged: what is here, and what is on the cloud."""


class SentStep(ABC):
    """A step that was sent before it was known what became of those before it: see `System.sends_ahead`."""

    wire_bytes: int
    """Of its messages."""

    cloud_seconds: float
    """That the cloud worked on it; known once it is settled."""

    @abstractmethod
    def forward(self, batch: Batch, micro_batch: int, loss_scale: float) -> None:
        """Sends a micro-batch, as `forward_backward` does. Returns at once, or when there is room on the way."""

    @abstractmethod
    def update(self, rates: Sequence[float], max_grad_norm: float) -> None:
        """Has the cloud clip the gradients to that norm, 0 for not at all, and take the step with these learning
        rates, unless the loss or the norm is not finite."""

    @abstractmethod
    def settle(self) -> Tuple[List[float], float]:
        """Waits: the loss of each micro-batch, unscaled, and the norm of the step's gradients. Once.

        Raises CloudMemoryError where the step was undone; those that were sent after it were, too.
        """


class StepTimer:
    """Adds up a step's seconds by phase until it is recorded."""

    def __init__(self) -> None:
        self.samples = 0
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def phase(self, name: str) -> _Phase:
        """A block whose seconds count for a phase of `sft.wire.ledger.PHASES`."""
        return _Phase(self, name)

    def add(self, name: str, seconds: float) -> None:
        """Seconds that were measured elsewhere."""
        self._seconds[name] += seconds

    def record(self, step: int, traffic: Traffic = NO_TRAFFIC, plain_bytes: int = 0) -> StepRecord:
        """The step's record; what follows counts for the next."""
        record = StepRecord(step, self.samples, traffic, plain_bytes, **self._seconds)
        self.samples, self._seconds = 0, dict.fromkeys(PHASES, 0.0)
        return record


class _Phase:
    def __init__(self, timer: StepTimer, name: str) -> None:
        self._timer, self._name = timer, name

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._timer.add(self._name, time.perf_counter() - self._began)
