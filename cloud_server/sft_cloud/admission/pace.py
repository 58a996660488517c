"""How often a caller may ask for what is cheap: each call takes a moment of Python, in which nobody trains."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sft_cloud.admission.quotas import TokenBucket
from sft_cloud.errors import QuotaError

BURST_SECONDS = 3.0
"""Over so long the rate is a mean: after a pause so many seconds' worth of calls may come at once."""

LONGEST_WAIT_SECONDS = 2.0
MAX_WAITING = 64
"""Calls of a caller that wait for their turn, and as many that wait to be refused."""

REFUSAL_SECONDS = 1.0
"""After which a call is refused: who is told at once asks again at once."""

MESSAGE_COST = 0.25
"""Of a call: a message of a stream that is no work for the device."""

BYTES_OF_CALL = 1 << 19
"""That such messages and their answers have for another call's worth of time."""

LONGEST_REST_SECONDS = 5.0
"""That a stream waits after one of them."""

_FEW = 100
"""Callers that are not looked through for those who ask no more."""


@dataclass
class _Asking:
    """Of one caller."""

    bucket: TokenBucket
    waiting: int = 0
    refusing: int = 0


class Pace:
    """Counts by who asks. Safe to use from several threads."""

    def __init__(
        self,
        calls_per_second: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """`clock`: seconds from any start."""
        self._rate = calls_per_second
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._asking: dict[Hashable, _Asking] = {}
        self._many = _FEW
        self._here = threading.local()

    def call(self, who: Hashable) -> Turn | None:
        """When a call that has come may begin; None where too many wait already."""
        with self._lock:
            asking, now = self._of(who), self._clock()
            seconds = asking.bucket.seconds_until(1, now)
            if not seconds:
                asking.bucket.take(1, now)
                return _AT_ONCE
            if seconds <= LONGEST_WAIT_SECONDS and asking.waiting < MAX_WAITING:
                asking.waiting += 1
                asking.bucket.take(1, now)
                return Turn(seconds)
            if asking.refusing < MAX_WAITING:
                asking.refusing += 1
                text = f"more than {self._rate:g} calls a second of yours; try again in {math.ceil(seconds)} s"
                return Turn(REFUSAL_SECONDS, text)
            return None

    @contextmanager
    def begins(self, who: Hashable, turn: Turn) -> Iterator[None]:
        """For the block in which a call that has waited is worked on, on this thread."""
        with self._lock:
            if turn.refusal:
                self._of(who).refusing -= 1
            else:
                self._of(who).waiting -= 1
        self._here.refusal = turn.refusal
        try:
            yield
        finally:
            self._here.refusal = ""  # nobody may have asked for it, and the next call here is another's

    def check(self) -> None:
        """Raises QuotaError where the call that began on this thread is one too many."""
        refusal, self._here.refusal = getattr(self._here, "refusal", ""), ""
        if refusal:
            raise QuotaError(refusal)

    def rest(self, who: Hashable, size: int) -> None:
        """After a message of a stream that was no work for the device, with its answer of so many bytes: waits until it
        is paid. Not less when the call is over, or who hangs up at once would go on.
        """
        with self._lock:
            bucket, now = self._of(who).bucket, self._clock()
            most = self._rate * LONGEST_REST_SECONDS
            cost = min(MESSAGE_COST + size / BYTES_OF_CALL, most)
            seconds = min(bucket.take(cost, now), LONGEST_REST_SECONDS)
        if seconds:
            self._sleep(seconds)

    def _of(self, who: Hashable) -> _Asking:
        asking = self._asking.get(who)
        if asking is None:
            now, capacity = self._clock(), max(1.0, self._rate * BURST_SECONDS)
            if len(self._asking) >= self._many:
                self._asking = {
                    name: one
                    for name, one in self._asking.items()
                    if one.waiting or one.refusing or one.bucket.seconds_until(capacity, now)
                }
                self._many = 2 * len(self._asking) + _FEW
            asking = self._asking[who] = _Asking(TokenBucket(self._rate, capacity, now))
        return asking


@dataclass(frozen=True)
class Turn:
    """Of a call."""

    seconds: float
    """Until it begins."""
    refusal: str = ""
    """With which it then ends."""


_AT_ONCE = Turn(0.0)
