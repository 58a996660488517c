"""A limit on lines that strangers can cause: nobody shall fill the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable


class LogLimit:
    """So many lines a second. Safe to use from several threads."""

    def __init__(self, per_second: int, clock: Callable[[], float]) -> None:
        """`clock` counts seconds, from anywhere."""
        self._per_second = per_second
        self._clock = clock
        self._lock = threading.Lock()
        self._second: int | None = None
        self._lines = 0
        self._left_out = 0

    def take(self) -> int | None:
        """How many lines were left out since the last one, where there may be one more now; None where not."""
        with self._lock:
            second = int(self._clock())
            if second != self._second:
                self._second, self._lines = second, 0
            self._lines += 1
            if self._lines > self._per_second:
                self._left_out += 1
                return None
            left_out, self._left_out = self._left_out, 0
            return left_out
