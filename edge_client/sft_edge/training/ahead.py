"""The steps of a run that are on their way, where the edge trains nothing and need not wait for the cloud."""

from __future__ import annotations

from collections import deque
from typing import Deque, List, NamedTuple, Sequence

from sft.batch import Batch
from sft.errors import CloudMemoryError, SessionLostError
from sft_edge.signals import interrupts_deferred
from sft_edge.systems import SentStep, System

MEMORY_TRIES = 3
"""How often a step is begun that the cloud has no memory for: who took the memory may have gone."""

_MOST = 16
"""More than a link of 100 ms needs to keep a cloud busy whose steps take 10."""

_MOST_SECONDS = 1.0
"""That the cloud works on them: who is to stop waits for all, and two keep the cloud busy."""

_MOST_BYTES = 16 << 20
"""Of their messages, all of which are kept until they are answered."""


def most_ahead(cloud_seconds: float, step_bytes: float = 0.0) -> int:
    """How many steps may be on their way at once, each of which takes the cloud so long and has messages of so many
    bytes."""
    most = 2 + min(_MOST - 2, int(_MOST_SECONDS / max(cloud_seconds, 1e-3)))
    return most if not step_bytes else max(1, min(most, int(_MOST_BYTES / step_bytes) + 1))


class Settled(NamedTuple):
    """What became of a step."""

    losses: List[float]
    """Of its micro-batches, unscaled; it was taken if they and the norm are finite."""

    norm: float
    """Of its gradients."""

    rate: float
    """The learning rate of the first group."""


class _Step:
    """What it takes to send a step, and to send it again."""

    def __init__(self, number: int, group: List[Batch], rates: Sequence[float]) -> None:
        self.number, self.group, self.rates = number, group, rates
        self.tries_left = MEMORY_TRIES
        self.sent: SentStep


class StepsAhead:
    """The oldest first. Those before them are settled."""

    def __init__(self, system: System, max_grad_norm: float) -> None:
        self._system = system
        self._max_grad_norm = max_grad_norm
        self._steps: Deque[_Step] = deque()
        self._most = 2

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def is_full(self) -> bool:
        """Whether one is to be settled before another is sent."""
        return len(self._steps) >= self._most or sum(step.sent.wire_bytes for step in self._steps) > _MOST_BYTES

    def send(self, number: int, group: List[Batch], rates: Sequence[float]) -> None:
        """A step of these micro-batches with these learning rates."""
        self._send(_Step(number, group, rates))

    def settle(self) -> Settled:
        """Waits for the oldest. It is sent again, and those after it are, where the cloud has undone it; raises
        CloudMemoryError where it does so again and again. None is on its way after an error, or after numbers that are
        not finite: the cloud takes none then.
        """
        oldest = self._steps[0]
        while True:
            try:
                losses, norm = oldest.sent.settle()
                break
            except CloudMemoryError as error:
                if self._system.makes_again:  # and it may have done without memory what came later
                    raise SessionLostError(f"the cloud undid a step that was left to it ({error})") from error
                oldest.tries_left -= 1
                if not oldest.tries_left:
                    self.forget()
                    raise
                self._send_again()
        self._steps.popleft()
        self._most = most_ahead(oldest.sent.cloud_seconds)
        return Settled(losses, norm, oldest.rates[0])

    def forget(self) -> None:
        """The cloud takes none of them."""
        self._steps.clear()
        self._system.undo()

    def _send(self, step: _Step) -> None:
        step.sent = forward(self._system, step.number, step.group, ahead=bool(self._steps))
        with interrupts_deferred():
            step.sent.update(step.rates, self._max_grad_norm)
            self._steps.append(step)

    def _send_again(self) -> None:
        undone = list(self._steps)
        self.forget()
        for step in undone:
            self._send(step)


def send(system: System, number: int, group: Sequence[Batch], rates: Sequence[float], max_grad_norm: float) -> None:
    """Sends a step, ahead, whose answers nobody here waits for."""
    forward(system, number, group, ahead=True).update(rates, max_grad_norm)


def forward(system: System, number: int, group: Sequence[Batch], ahead: bool) -> SentStep:
    """Sends the micro-batches of a step."""
    sent = system.send(number, ahead)
    for micro_batch, batch in enumerate(group):
        sent.forward(batch, micro_batch, 1 / len(group))
    return sent
