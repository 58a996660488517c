"""What one caller may take of the server: calls and sessions at a time, bytes a day, steps a second, models, ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sft_cloud.errors import QuotaError
from sft_cloud.identity import Identity

SPARE_CALLS = 4
"""Calls at a time that a caller may have beside one for each of its sessions."""

BURST_SECONDS = 3.0
"""Over so long `steps_per_second` is a mean: after a pause so many seconds' worth of steps may come at once."""

LONG_CHECK_SECONDS = 0.002
"""Of computing: longer looks at the form of a message cost its caller a pause."""

CHECK_REST = 9.0
"""How long that is, as a multiple of what the look took: a caller has a tenth of the time, in which others' sessions
wait for Python."""

_DAY_SECONDS = 86_400
_FORGOTTEN_SECONDS = 2 * _DAY_SECONDS


class TokenBucket:
    """Fills at a rate, up to a capacity; what is taken may overdraw it, and the next has to wait."""

    def __init__(self, per_second: float, capacity: float, now: float) -> None:
        self._per_second = per_second
        self._capacity = capacity
        self._held = capacity
        self._at = now

    def seconds_until(self, amount: float, now: float) -> float:
        """How long until so much is there; 0 if it is."""
        self._fill(now)
        return max(0.0, (amount - self._held) / self._per_second)

    def take(self, amount: float, now: float) -> float:
        """Takes so much, and says how long to wait until it would have been there."""
        wait = self.seconds_until(amount, now)
        self._held -= amount
        return wait

    def change(self, per_second: float, capacity: float, now: float) -> None:
        """Fills at another rate from now on. What it holds, or lacks, stays."""
        self._fill(now)
        self._per_second = per_second
        self._capacity = capacity

    def _fill(self, now: float) -> None:
        self._held = min(self._capacity, self._held + (now - self._at) * self._per_second)
        self._at = now


@dataclass
class _Usage:
    """Of one caller."""

    calls: int = 0
    day: int = 0
    bytes_today: int = 0
    opens: TokenBucket | None = None
    steps: TokenBucket | None = None
    seen_at: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    checks: threading.Lock = field(default_factory=threading.Lock)


class Quotas:
    """Counts by the caller's name. Safe to use from several threads; all is forgotten with the process."""

    def __init__(
        self,
        max_sessions: int,
        opens_per_minute: int,
        max_calls: int,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """`max_sessions` and `max_calls` at a time of the server; `clock`: seconds from any start;
        `wall_clock`: seconds since 1970, UTC.
        """
        self._sleep = sleep
        self._max_sessions = max_sessions
        self._opens_per_minute = opens_per_minute
        self._free_calls = max_calls
        self._clock = clock
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._usages: dict[str, _Usage] = {}

    def call(self, caller: Identity) -> Callable[[], None]:
        """Takes one of the caller's calls, until what is returned is called. Raises QuotaError when all are in use.

        The more a caller has running, the more must be free: however many take all they can, another finds a place.
        """
        usage, allowed = self._usage(caller), caller.limits.sessions_of(self._max_sessions) + SPARE_CALLS
        with self._lock, usage.lock:
            if usage.calls >= allowed:
                raise QuotaError(f"{allowed} calls of yours are running, as many as may at a time; end one")
            if usage.calls >= self._free_calls:
                raise QuotaError(
                    f"{usage.calls} calls of yours are running, and {self._free_calls} more can run on this server, "
                    "which are kept for others; end one, or try again later"
                )
            usage.calls += 1
            self._free_calls -= 1

        def over() -> None:
            with self._lock, usage.lock:
                usage.calls -= 1
                self._free_calls += 1

        return over

    def count_open(self, caller: Identity) -> None:
        """A request to open a session. Raises QuotaError when there were too many in the last minute."""
        usage, now = self._usage(caller), self._clock()
        with usage.lock:
            if usage.opens is None:
                usage.opens = TokenBucket(self._opens_per_minute / 60, self._opens_per_minute, now)
            wait = usage.opens.seconds_until(1, now)
            if wait:
                raise QuotaError(
                    f"more than {self._opens_per_minute} requests to open a session in a minute; try again in "
                    f"{wait:.0f} seconds"
                )
            usage.opens.take(1, now)

    @contextmanager
    def check_of_form(self, caller: Identity) -> Iterator[None]:
        """For the block in which a message is looked through, which is Python's work: one at a time of each caller, and
        the caller rests after what took long. Not less when the call is over, or who hangs up at once would go on.
        """
        with self._usage(caller).checks:
            began = time.thread_time()
            try:
                yield
            finally:
                took = time.thread_time() - began
                if took >= LONG_CHECK_SECONDS:
                    self._sleep(CHECK_REST * took)

    def count_bytes(self, caller: Identity, size: int, refuses: bool = True) -> None:
        """Bytes that came from a caller or go to it. Raises QuotaError when the day's are used up, if it `refuses`."""
        usage, limit, today = self._usage(caller), caller.limits.max_bytes_per_day, self.today()
        with usage.lock:
            if usage.day != today:
                usage.day, usage.bytes_today = today, 0
            usage.bytes_today += size
            if refuses and limit is not None and usage.bytes_today > limit:
                raise QuotaError(f"the {limit} bytes that are yours for a day (UTC) are used up; go on tomorrow")

    def seconds_to_wait(self, caller: Identity) -> float:
        """Counts a step, and says how long the caller has to wait before it is taken."""
        rate = caller.limits.steps_per_second
        if rate is None:
            return 0.0
        usage, now = self._usage(caller), self._clock()
        with usage.lock:
            capacity = max(1.0, rate * BURST_SECONDS)
            if usage.steps is None:
                usage.steps = TokenBucket(rate, capacity, now)
            # A token's limits may change while we run, and several tokens of one name may differ: a bucket filled
            # anew would let who alternates between two of them take any number of steps.
            usage.steps.change(rate, capacity, now)
            return usage.steps.take(1, now)

    def today(self) -> int:
        """The day, counted from 1970, in UTC."""
        return int(self._wall_clock() // _DAY_SECONDS)

    def _usage(self, caller: Identity) -> _Usage:
        now = self._clock()
        with self._lock:
            usage = self._usages.get(caller.name)
            if usage is None:
                for name in [
                    n for n, u in self._usages.items() if now - u.seen_at > _FORGOTTEN_SECONDS and not u.calls
                ]:
                    del self._usages[name]
                usage = self._usages[caller.name] = _Usage()
            usage.seen_at = now
            return usage
