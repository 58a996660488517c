"""What a run moves, counted where it crosses, and held to what the run may move."""

from __future__ import annotations

import math
import threading
import time
from typing import Callable, Iterator, Optional

from sft.errors import SessionLostError, UsageError
from sft.printable import format_bytes
from sft.wire.ledger import framed_size
from sft_edge.link.pace import RECEIVED, SENT, Pace

_LINK_FACTOR = 1.08
_LINK_BYTES_A_MESSAGE = 150
_LINK_BYTES_A_CONNECTION = 8_000
_LINK_BYTES_A_SECOND = 12.0

AT_ONCE_BYTES = 1 << 10
"""Messages of no more than that do not wait: what opens a stream, for which there is a time-out, and what closes it."""


def on_link(wire_bytes: float, messages: float) -> float:
    """Bytes on a link of IP for messages that have so many, framed: headers of TCP and IP, what confirms them, TLS."""
    return wire_bytes * _LINK_FACTOR + messages * _LINK_BYTES_A_MESSAGE


def _of_file(size: int) -> float:
    """Bytes on a link for so many that cross in large pieces."""
    return on_link(framed_size(size), size / (1 << 20)) if size else 0.0


class Meter:
    """Of one run, however many sessions it has. Safe to use from several threads."""

    def __init__(
        self,
        cap: Optional[int] = None,
        pace: Optional[Pace] = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`cap`: bytes on the link that the run may move; without it any. `clock`: seconds from any start."""
        self.cap = cap
        self.before = 0
        """Bytes on the link that the run has moved in other processes."""
        self.margin = 0.0
        """That are kept for the end of the run beside its result."""
        self.answers = 0.0
        """That what the cloud answers to a step takes at most."""
        self.result = 0.0
        """That bringing home takes what is still missing of the result."""
        self._result_bytes = 0
        self._pace = pace or Pace()
        self._clock = clock
        self._began = clock()
        self._lock = threading.Lock()
        self.sent = self.received = 0
        self._messages = self._connections = 0

    @property
    def link_bytes(self) -> int:
        """What all this took on the link, in this process, so far; a little too much rather than too little."""
        with self._lock:
            beside = self._connections * _LINK_BYTES_A_CONNECTION + (self._clock() - self._began) * _LINK_BYTES_A_SECOND
            beside = beside if self._messages else 0.0
            return math.ceil(on_link(self.sent + self.received, self._messages) + beside)

    @property
    def room(self) -> float:
        """Bytes on the link that may be moved before the run is brought to its end."""
        return self._left - self.margin

    @property
    def _left(self) -> float:
        return math.inf if self.cap is None else self.cap - self.before - self.link_bytes - self.result

    def expect(self, result_bytes: int) -> None:
        """Before anything is sent: the result will have so many bytes. Raises UsageError where it cannot come home."""
        self._result_bytes, self.result = result_bytes, _of_file(result_bytes)
        self.check(0, f"bringing the result home takes {format_bytes(self.result)}")

    def bring(self, offset: int) -> None:
        """Before the result is asked for, without its first `offset` bytes, which are here. Raises SessionLostError
        where the others may not come."""
        self.result = _of_file(max(self._result_bytes - offset, 0))
        if self._left < 0:
            raise SessionLostError("--data-cap leaves no room to bring the result home")

    def receive_result(self, size: int) -> None:
        """A message of so many bytes of the result came: what is kept for it gets less by as much."""
        self.receive(size)
        self.result = max(self.result - on_link(framed_size(size), 1), 0.0)

    def check_again(self, more: int, steps: int = 0) -> None:
        """Raises SessionLostError where so many bytes and the answers to so many steps leave no room for the result: a
        step that is sent for the first time fits."""
        if _of_file(more) + steps * self.answers > self._left:
            raise SessionLostError("--data-cap leaves no room to send again what was on its way")

    def check(self, more: int, what: str) -> None:
        """Raises UsageError where so many bytes more, `what` says for what, leave no room for the end of the run."""
        missing = _of_file(more) - self.room
        if self.cap is None or missing <= 0:
            return
        moved = self.before + self.link_bytes
        already = f", {format_bytes(moved)} were moved already" if moved else ""
        raise UsageError(
            f"--data-cap {format_bytes(self.cap)} is too little: {what}{already}; give "
            f"{format_bytes(1.01 * (self.cap + missing))} and what training is to move, or have less of the model on "
            "the cloud (a higher --split-layer)"
        )

    def send(self, size: int, over: threading.Event, lasts: Callable[[], object] = lambda: None) -> bool:
        """A message of so many bytes goes when it is its turn; False where `over` was set before. `lasts` is called
        again and again while it waits."""
        if size > AT_ONCE_BYTES and not self._pace.wait_turn((SENT, RECEIVED), over, lasts):
            return False
        framed = framed_size(size)
        self._pace.took(SENT, int(on_link(framed, 1)))
        with self._lock:
            self.sent += framed
            self._messages += 1
        return True

    def receive(self, size: int) -> None:
        """A message of so many bytes came."""
        framed = framed_size(size)
        self._pace.took(RECEIVED, int(on_link(framed, 1)))
        with self._lock:
            self.received += framed
            self._messages += 1

    def wait_to_receive(self, over: threading.Event, lasts: Callable[[], object]) -> None:
        """Until more may come of a download."""
        self._pace.wait_turn((RECEIVED,), over, lasts)

    def connect(self) -> None:
        """A connection is made."""
        with self._lock:
            self._connections += 1

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Of a file that goes up."""
        size = self._pace.piece_bytes
        return (data[start : start + size] for start in range(0, len(data), size))

    def has_held(self, seconds: float) -> bool:
        """Whether something had to wait for its turn within so many seconds."""
        return self._pace.has_held(seconds)
