"""Steps of an edge that trains nothing itself: it need not wait for the cloud, which takes them alone.

What the edge decides in other runs when it has seen a step's answers, the cloud decides here from the same numbers: how
gradients are clipped, and that no step is taken with what is not finite. So the bits are those of an edge that waits.
"""

from __future__ import annotations

import math
from typing import Callable, Dict, List, Sequence, Tuple

from sft.batch import Batch
from sft.v1 import split_training_pb2 as pb
from sft.wire.ledger import Ledger, Traffic
from sft_edge.link import Link, PendingReply
from sft_edge.systems.crossing import Crossing
from sft_edge.systems.system import SentStep, StepTimer


class Unsettled:
    """What steps on their way have sent. Where the cloud undoes them, that has crossed all the same; and rows that the
    cloud keeps do not cross again.
    """

    def __init__(self) -> None:
        self._sent: Dict[int, Traffic] = {}
        self._undone = Traffic()

    def sent(self, step: int, traffic: Traffic) -> None:
        """By a micro-batch of a step."""
        self._sent[step] = self._sent.get(step, Traffic()) + traffic

    def undo(self) -> None:
        """None of the steps is settled any more."""
        self._undone = sum(self._sent.values(), self._undone)
        self._sent.clear()

    def settle(self, step: int) -> Traffic:
        """What is to be counted with a step that the cloud takes, beside its own."""
        undone, self._undone = self._undone, Traffic()
        self._sent.pop(step, None)
        return undone


class StepOnItsWay(SentStep):
    """Of a SplitSystem."""

    def __init__(
        self,
        link: Link,
        step: int,
        ahead: bool,
        cross: Callable[[Batch, int, int, float, StepTimer, Callable[[PendingReply], pb.CloudMessage]], Crossing],
        plain_bytes: Callable[[Batch], int],
        ledger: Ledger,
        unsettled: Unsettled,
    ) -> None:
        """`cross` sends a micro-batch of a step, and has its seconds added to a timer; `plain_bytes` is what plain
        split learning would have sent of it; the step is added to `ledger` when it is settled, and is among
        the `unsettled` until then.
        """
        self.wire_bytes = 0
        self.cloud_seconds = 0.0
        self.number = step
        self._link, self._ledger, self._unsettled = link, ledger, unsettled
        self._cross, self._plain_bytes_of = cross, plain_bytes
        self._timer = StepTimer()
        self._crossings: List[Crossing] = []
        self._traffic, self._plain_bytes = Traffic(), 0
        link.ahead = ahead

    def forward(self, batch: Batch, micro_batch: int, loss_scale: float) -> None:
        """See SentStep."""
        self._crossings.append(self._cross(batch, self.number, micro_batch, loss_scale, self._timer, self._answer))
        self._link.ahead = True
        self._unsettled.sent(self.number, self._crossings[-1].traffic)
        self.wire_bytes += self._crossings[-1].traffic.bytes_sent
        self._timer.samples += len(batch.lengths)
        self._plain_bytes += self._plain_bytes_of(batch)

    def update(self, rates: Sequence[float], max_grad_norm: float) -> None:
        """See SentStep. The commit is held until the next message."""
        self._link.commit(self.number, rates, 1.0, max_grad_norm=max_grad_norm)

    def settle(self) -> Tuple[List[float], float]:
        """See SentStep."""
        losses = [crossing.loss() for crossing in self._crossings]
        squared_norm = self._crossings[-1].squared_norm
        if all(map(math.isfinite, [*losses, squared_norm])):  # otherwise the cloud does not take it
            traffic = self._traffic + self._unsettled.settle(self.number)
            self._ledger.add(self._timer.record(self.number, traffic, self._plain_bytes))
        return losses, math.sqrt(squared_norm)

    def _answer(self, pending: PendingReply) -> pb.CloudMessage:
        reply = pending.result()
        self.cloud_seconds += reply.cloud_seconds
        self._timer.add("cloud", reply.cloud_seconds)
        self._timer.add("uplink_wait", max(reply.waited_seconds - reply.cloud_seconds, 0.0))
        self._traffic += reply.traffic
        return reply.message
