"""Steps on their way: settled in order, sent again where the cloud undid them, and never too many."""

from __future__ import annotations

from typing import Any, Dict, List, Sequence, Tuple

import pytest

from sft.errors import CloudMemoryError, SessionLostError
from sft_edge.training import ahead
from sft_edge.training.ahead import MEMORY_TRIES, StepsAhead


class Cloud:
    """A system whose cloud undoes steps as it is told, and all that were sent after them."""

    def __init__(self, undone: Dict[int, int], size: int = 1) -> None:
        self.undone = dict(undone)
        """How often each step will be."""
        self.size = size
        self.heard: List[Tuple[int, bool]] = []
        """Steps that were begun, and whether ahead."""
        self.taken: List[Tuple[int, List[Any], Sequence[float], float]] = []
        self.forgotten = 0
        self.makes_again = False
        self.seconds = 0.0
        """That it works on a step."""
        self._skips = False

    def send(self, step: int, ahead: bool) -> Sent:
        self.heard.append((step, ahead))
        if not ahead:
            self._skips = False
        if self.undone.get(step, 0) and not self._skips:
            self.undone[step] -= 1
            self._skips = True
        return Sent(self, step, self._skips)

    def undo(self) -> None:
        self.forgotten += 1


class Sent:
    def __init__(self, cloud: Cloud, step: int, skipped: bool) -> None:
        self.wire_bytes, self.cloud_seconds = cloud.size, cloud.seconds
        self._cloud, self._step, self._skipped = cloud, step, skipped
        self._batches: List[Any] = []

    def forward(self, batch: Any, micro_batch: int, loss_scale: float) -> None:
        assert micro_batch == len(self._batches)
        self._batches.append((batch, loss_scale))

    def update(self, rates: Sequence[float], max_grad_norm: float) -> None:
        if not self._skipped:
            self._cloud.taken.append((self._step, self._batches, rates, max_grad_norm))

    def settle(self) -> Tuple[List[float], float]:
        if self._skipped:
            raise CloudMemoryError("for a test")
        return [float(self._step)], 10.0 + self._step


def send_all(cloud: Cloud, steps: range) -> StepsAhead:
    queue = StepsAhead(cloud, 2.5)  # type: ignore[arg-type]
    for step in steps:
        queue.send(step, [f"{step}a", f"{step}b"], [step / 10])  # type: ignore[list-item]
    return queue


@pytest.mark.parametrize("undone", [{}, {3: 1}, {5: 2}, {3: 1, 4: 2, 6: 1}])
def test_every_step_is_taken_once_in_order(undone: Dict[int, int]) -> None:
    cloud = Cloud(undone)
    queue = send_all(cloud, range(3, 7))
    for step in range(3, 7):
        assert queue.settle() == ([float(step)], 10.0 + step, step / 10)
    assert len(queue) == 0
    assert cloud.taken == [(k, [(f"{k}a", 0.5), (f"{k}b", 0.5)], [k / 10], 2.5) for k in range(3, 7)]
    assert cloud.forgotten == sum(undone.values())
    assert sum(cloud.undone.values()) == 0
    assert cloud.heard[:4] == [(3, False), (4, True), (5, True), (6, True)]
    assert [step for step, is_ahead in cloud.heard[4:] if not is_ahead] == [
        step for step, times in sorted(undone.items()) for _ in range(times)
    ]


def test_a_step_that_is_undone_every_time() -> None:
    cloud = Cloud({4: MEMORY_TRIES})
    queue = send_all(cloud, range(3, 7))
    queue.settle()
    with pytest.raises(CloudMemoryError):
        queue.settle()
    assert len(queue) == 0
    assert [step for step, _ in cloud.heard].count(4) == MEMORY_TRIES
    assert [step for step, *_ in cloud.taken] == [3]


def test_what_was_left_is_not_sent_again() -> None:
    """The cloud may have done what came later, in other steps."""
    cloud = Cloud({4: 1})
    cloud.makes_again = True
    queue = send_all(cloud, range(3, 7))
    queue.settle()
    with pytest.raises(SessionLostError, match="undid a step that was left to it"):
        queue.settle()
    assert [step for step, _ in cloud.heard] == [3, 4, 5, 6]


@pytest.mark.parametrize(("seconds", "most"), [(5.0, 2), (0.4, 4), (0.001, 16), (0.0, 16)])
def test_it_is_full_by_the_time_that_a_cloud_needs(seconds: float, most: int) -> None:
    """Two until that is known."""
    cloud = Cloud({})
    cloud.seconds = seconds
    queue = send_all(cloud, range(2))
    assert queue.is_full
    queue.settle()
    for step in range(2, most + 1):
        assert not queue.is_full
        queue.send(step, [], [0.0])
    assert queue.is_full


def test_it_is_full_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_MOST_BYTES", 100)
    cloud = Cloud({}, size=60)
    queue = send_all(cloud, range(1))
    queue.settle()
    assert [not queue.send(step, [], [0.0]) and queue.is_full for step in range(1, 3)] == [False, True]
