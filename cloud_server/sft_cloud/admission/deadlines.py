"""Calls that wait for the other side too long are ended: a slow or silent peer must not hold a thread for ever.

Every wait is registered here for as long as it lasts; the server looks from time to time whether one is overdue.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

_SLOWEST_BYTES_PER_SECOND = 8192.0

SLOWEST_PACE = 32_768.0
"""Bytes a second that a message in parts has to come with, as a mean: a quarter of what a link of 1 Mb/s carries."""

_log = logging.getLogger(__name__)


class _Wait(NamedTuple):
    deadline: float
    reason: str
    cancel: Callable[[], object]


class Deadlines:
    """Knows who waits, and since when. Safe to use from several threads."""

    def __init__(
        self,
        stall_seconds: float,
        idle_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        on_end: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`on_end` is told the reason for which a call was ended."""
        self._stall_seconds = stall_seconds
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._on_end = on_end
        self._lock = threading.Lock()
        self._waits: dict[int, _Wait] = {}
        self._next = 0
        self.ended: Counter[str] = Counter()
        """How many calls were ended, by reason."""

    @contextmanager
    def stalls(self, reason: str, cancel: Callable[[], object], size: int = 0) -> Iterator[None]:
        """A wait in the middle of something, such as the way of `size` bytes. `cancel` must end it from any thread."""
        over = self.stalling(reason, cancel, size)
        try:
            yield
        finally:
            over()

    @contextmanager
    def keeps_pace(self, reason: str, cancel: Callable[[], object]) -> Iterator[Callable[[int], None]]:
        """For the block in which something comes that memory is held for: it has the time of a stall, and with every
        part that came, which the function given is told of in bytes, as long as the slowest may take for that."""
        began, came, over = self._clock(), 0, self._begin(self._stall_seconds, reason, cancel)

        def part_came(size: int) -> None:
            nonlocal came, over
            came += size
            over()
            until = began + self._stall_seconds + came / SLOWEST_PACE
            over = self._begin(until - self._clock(), reason, cancel)

        try:
            yield part_came
        finally:
            over()

    @contextmanager
    def idles(self, reason: str, cancel: Callable[[], object]) -> Iterator[None]:
        """A wait of somebody who may well have nothing to say for a while."""
        over = self._begin(self._idle_seconds, reason, cancel)
        try:
            yield
        finally:
            over()

    def stalling(self, reason: str, cancel: Callable[[], object], size: int = 0) -> Callable[[], None]:
        """As `stalls`, until what is returned is called."""
        return self._begin(self._stall_seconds + size / _SLOWEST_BYTES_PER_SECOND, reason, cancel)

    def look(self) -> None:
        """Ends what waits too long. Each call is ended once."""
        now = self._clock()
        with self._lock:
            overdue = {number: wait for number, wait in self._waits.items() if wait.deadline <= now}
            for number, wait in overdue.items():
                del self._waits[number]
                self.ended[wait.reason] += 1
        for wait in overdue.values():
            wait.cancel()
            _log.info("call ended", extra={"fields": {"reason": wait.reason}})
            self._on_end(wait.reason)

    def _begin(self, seconds: float, reason: str, cancel: Callable[[], object]) -> Callable[[], None]:
        wait = _Wait(self._clock() + seconds, reason, cancel)
        with self._lock:
            number = self._next = self._next + 1
            self._waits[number] = wait

        def over() -> None:
            with self._lock:
                self._waits.pop(number, None)

        return over
