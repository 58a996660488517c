"""Eq. 4 of the paper: t_split = t_edge + t_comm + t_cloud, and what a run adds to it.

In the paper's step each waits for the other. Two things are beside that:

- An edge that trains nothing sends steps ahead. Edge, link and cloud then work at once, and the slowest of them sets
  the pace; or the way there and back does, where too few steps may be on it at once.
- A link that is held to a rate (`--max-mbit`) takes no step sooner than it may carry its bytes.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Way(NamedTuple):
    """The link between edge and cloud."""

    delay: float
    """Seconds there and back of a message without content, with all that it takes to write and to read one."""

    up: float
    """Bytes a second from the edge to the cloud."""

    down: float
    """Bytes a second back."""

    held_to: float = math.inf
    """Bytes a second, in each direction, that are carried at most on average."""

    is_apart: bool = True
    """Whether edge and cloud compute on machines of their own, so that both can at once."""


class Step(NamedTuple):
    """One step, all its micro-batches added; means over the batches of a run will do."""

    edge: float
    """Seconds of the edge: forward, backward, update."""

    cloud: float = 0.0
    """Seconds of the cloud."""

    sent: float = 0.0
    """Bytes from the edge to the cloud."""

    received: float = 0.0
    """Bytes back."""

    answers: float = 0.0
    """That the edge waits for, one after the other."""


def step_seconds(step: Step, way: Way, ahead: int = 0) -> float:
    """Seconds of a step; `ahead`: so many steps may be on their way at once, 0 where the edge waits for each."""
    up, down = step.sent / way.up, step.received / way.down
    seconds = step.edge + (step.answers * way.delay + up + down) + step.cloud  # eq. 4
    if ahead:
        computing = max(step.edge, step.cloud) if way.is_apart else step.edge + step.cloud
        seconds = max(computing, up, down, seconds / ahead)
    return max(seconds, step.sent / way.held_to, step.received / way.held_to)


def unbroken_step_seconds(step: Step, way: Way, steps: float, ahead: int = 0) -> float:
    """Seconds of one of so many steps in a row, on average, the first of which finds nothing on its way: where steps
    are sent ahead the slowest of edge, link and cloud has nothing to do until that one reaches it, and the others
    nothing after the last."""
    pace = step_seconds(step, way, ahead)
    return pace + max(0.0, step_seconds(step, way) - pace) / max(steps, 1)


def of_run(steps: int, first: float, in_first_epoch: int, later: float, beside: float = 0.0) -> float:
    """Seconds, or bytes, of so many steps: those of the first epoch take `first` each, all others `later`; `beside` is
    what the run takes before and after them."""
    at_first = min(steps, in_first_epoch)
    return at_first * first + (steps - at_first) * later + beside


def moving_seconds(sent: float, received: float, way: Way) -> float:
    """Seconds that so many bytes take which nothing waits for."""
    return sent / min(way.up, way.held_to) + received / min(way.down, way.held_to)
