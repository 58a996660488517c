"""Steps over a link that breaks, and no time in between."""

from __future__ import annotations

from typing import Any, Callable, List

from sft.v1 import split_training_pb2 as pb
from sft_edge.link.link import Link
from sft_edge.link.retries import RetryPolicy

ACTIVATION = pb.Activation(packed=pb.Tensor(data_type=pb.DATA_TYPE_FLOAT32, shape=[2, 1], data=bytes(8)))
LABELS = pb.Labels(classes=pb.Labels.Classes(ids=[0, 1]))


class Waits:
    """In the place of time: notes what is waited for, and lets something happen meanwhile."""

    def __init__(self) -> None:
        self.now = 0.0
        self.delays: List[float] = []
        self.said: List[str] = []
        self.meanwhile: Callable[[], object] = lambda: None

    def wait(self, wake: Any, seconds: float) -> bool:
        self.delays.append(seconds)
        self.now += seconds
        self.meanwhile()
        return not wake.empty()

    def policy(self, **values: Any) -> RetryPolicy:
        return RetryPolicy(**{"clock": lambda: self.now, "wait": self.wait, "uniform": lambda a, b: b, **values})


def losses(link: Link, steps: range) -> List[float]:
    """Of so many steps, two messages at once."""
    found = []
    for step in steps:
        pending = [link.forward(step, index, ACTIVATION, LABELS, 1) for index in range(2)]
        found += [each.result().message.result.loss for each in pending]
        link.commit(step, [0.1], 1)
    return found
