"""`--max-mbit`: a token bucket for each direction of a link."""

from __future__ import annotations

import math
import threading
import time
from typing import Callable, Dict, Optional, Sequence

SENT, RECEIVED = "sent", "received"

_BURST_SECONDS = 1.0
"""What a pause saves up, at most: so a step that computes for a while loses nothing of the link."""

_LEAST_PIECE_BYTES, _MOST_PIECE_BYTES = 64 << 10, 1 << 20
"""Of a file that goes up. Servers count smaller pieces for more."""

_SLICE_SECONDS = 1.0
"""Of a wait: after each, somebody hears that it lasts."""


class Pace:
    """What was let through is owed for, and nothing more goes before it is paid. Safe to use from several threads.

    So one piece goes at the speed of the link, and the next one later: a mean. Nothing that is received can be held
    back before it came; what is owed for it holds back what is sent next, and the next piece of a download.
    """

    def __init__(
        self,
        mbit: Optional[float] = None,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Event, float], object] = threading.Event.wait,
    ) -> None:
        """`mbit`: million bits a second, in each direction; without it nothing waits. `clock` and `wait`: for tests."""
        self._bytes_per_second = math.inf if mbit is None else mbit * 1e6 / 8
        self._clock = clock
        self._wait = wait
        self._lock = threading.Lock()
        self._paid_at: Dict[str, float] = {SENT: -math.inf, RECEIVED: -math.inf}
        self._held_at = -math.inf

    @property
    def piece_bytes(self) -> int:
        """Of a file that goes up: about a second's worth."""
        return int(max(_LEAST_PIECE_BYTES, min(self._bytes_per_second, _MOST_PIECE_BYTES)))

    def took(self, way: str, size: int) -> None:
        """So many bytes go this way now."""
        with self._lock:
            since = max(self._paid_at[way], self._clock() - _BURST_SECONDS)
            self._paid_at[way] = since + size / self._bytes_per_second

    def wait_turn(self, ways: Sequence[str], over: threading.Event, lasts: Callable[[], object]) -> bool:
        """Returns when nothing is owed for these ways any more; False where `over` was set before. `lasts` is called
        again and again meanwhile."""
        while not over.is_set():
            with self._lock:
                now = self._clock()
                left = max(self._paid_at[way] for way in ways) - now
                if left <= 0:
                    return True
                self._held_at = now
            self._wait(over, min(left, _SLICE_SECONDS))
            lasts()
        return False

    def has_held(self, seconds: float) -> bool:
        """Whether something had to wait here within so many seconds."""
        with self._lock:
            return self._clock() - self._held_at < seconds
