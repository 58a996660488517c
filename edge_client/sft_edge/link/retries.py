"""How long an edge waits, and how often it tries again, before it gives a link up."""

from __future__ import annotations

import queue
import random
import time
from typing import Callable, Iterator, NamedTuple

from sft.cli.durations import Duration
from sft.errors import LinkError, SessionLostError
from sft_edge.options import LinkOptions

Wake = queue.SimpleQueue
"""Something in it ends a wait. Not an event: finalizers, which may run anywhere, can fill a SimpleQueue."""


def _wait(wake: Wake[None], seconds: float) -> bool:
    try:
        wake.get(timeout=seconds)
    except queue.Empty:
        return False
    return True


class RetryPolicy(NamedTuple):
    """Times are in seconds."""

    reply_timeout_seconds: float = LinkOptions.reply_timeout
    """How long an answer may take before the stream counts as broken."""

    attach_timeout_seconds: float = LinkOptions.connect_timeout
    """How long a server that took a connection may take to say something."""

    reconnect_timeout_seconds: float = LinkOptions.reconnect_timeout
    """How long to try for since the link broke; 0 gives up at once."""

    backoff_seconds: float = LinkOptions.reconnect_backoff
    """About how long to wait before the first try; each further one waits twice as long."""

    backoff_max_seconds: float = LinkOptions.reconnect_backoff_max
    """At most so long."""

    clock: Callable[[], float] = time.monotonic
    """For tests."""

    wait: Callable[[Wake[None], float], bool] = _wait
    """For tests: whether something woke the wait before its time was over."""

    uniform: Callable[[float, float], float] = random.uniform
    """For tests."""

    def delays(self) -> Iterator[float]:
        """Seconds to wait before each try: exponential backoff with jitter.

        Each is drawn between half of what is due and all of it, so that edges that lost the same server do not all come
        back at once.
        """
        due = min(self.backoff_seconds, self.backoff_max_seconds)
        while True:
            yield self.uniform(due / 2, due)
            due = min(2 * due, self.backoff_max_seconds)


class Retries:
    """The tries since something last went well."""

    def __init__(self, policy: RetryPolicy, wake: Wake[None], on_status: Callable[[str], None]) -> None:
        """`on_status` is told what is waited for, in words for a person; an empty text when that is over."""
        self._policy = policy
        self._wake = wake
        self._on_status = on_status
        self.timeout_seconds = policy.reconnect_timeout_seconds
        self._tries = 0
        self.reset()

    def reset(self) -> None:
        """It goes well again."""
        if self._tries:
            self._on_status("")
        self._delays = self._policy.delays()
        self._since = -1.0
        self._tries = 0

    def after(self, error: LinkError) -> None:
        """Waits until it is time to try again. Raises SessionLostError when it is not worth it, or was woken."""
        policy, now = self._policy, self._policy.clock()
        if not self.timeout_seconds:
            raise SessionLostError(str(error)) from error
        if self._tries == 0:
            self._since = now
        left = self._since + self.timeout_seconds - now
        if left <= 0:
            spent = Duration(self.timeout_seconds)
            raise SessionLostError(f"{error}; {self._tries} tries in {spent} did not help") from error
        self._tries += 1
        delay = min(next(self._delays), left)
        self._on_status(f"{error}; try {self._tries} in {Duration(round(delay, 1))}")
        if policy.wait(self._wake, delay):
            raise SessionLostError("the link is closed") from error


def retry_policy_of(link: LinkOptions) -> RetryPolicy:
    """How long to wait and to try again. A cloud of the edge's own that has died does not come back."""
    return RetryPolicy(
        reply_timeout_seconds=link.reply_timeout,
        attach_timeout_seconds=link.connect_timeout,
        reconnect_timeout_seconds=link.reconnect_timeout if link.server is not None else 0.0,
        backoff_seconds=link.reconnect_backoff,
        backoff_max_seconds=link.reconnect_backoff_max,
    )
