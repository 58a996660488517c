"""How long an edge waits, and how often it tries again, before it gives a link up."""

from __future__ import annotations

import queue
import random
import time
from typing import Callable, Dict, Iterator, NamedTuple, Optional, Type

from sft.cli.durations import Duration
from sft.client.credentials import RENEWAL_SECONDS
from sft.errors import AccessError, LinkError, SessionLostError, StaleAccessError
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

    wait_seconds: float = LinkOptions.wait
    """How long to wait, before there is a session, for a server that is absent or full."""

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


class GivenUpError(SessionLostError):
    """The link was tried to be mended for long enough; the session may still be there."""


class Retries:
    """The tries since something last went well."""

    def __init__(
        self,
        policy: RetryPolicy,
        wake: Wake[None],
        on_status: Callable[[str], None],
        wait_seconds: Optional[float] = None,
    ) -> None:
        """`on_status` is told what is waited for, in words for a person; an empty text when that is over.

        `wait_seconds`: for who has no session yet. It is how long to try for; what is waited for is said once.
        """
        self._policy = policy
        self._wake = wake
        self._on_status = on_status
        self._is_waiting = wait_seconds is not None
        self.timeout_seconds = policy.reconnect_timeout_seconds if wait_seconds is None else wait_seconds
        self.tries = 0
        """Since something last went well."""
        self.reset()

    def reset(self) -> None:
        """It goes well again."""
        if self.tries:
            self._on_status("")
        self._delays = self._policy.delays()
        self._since: Dict[bool, float] = {}  # files that may be renewed have a time of their own
        self.tries = 0

    def after(self, error: LinkError) -> None:
        """Waits until it is time to try again.

        Raises SessionLostError when it is not worth it, or was woken; AccessError where the files that let us in were
        not renewed in time; who only waits for a session gets the class of `error`.
        """
        policy, now, timeout = self._policy, self._policy.clock(), self.timeout_seconds
        given_up: Type[LinkError] = type(error) if self._is_waiting else GivenUpError
        is_stale = isinstance(error, StaleAccessError)
        if is_stale:
            timeout, given_up = min(timeout, RENEWAL_SECONDS), AccessError
        if not timeout:
            raise given_up(str(error)) from error
        left = self._since.setdefault(is_stale, now) + timeout - now
        if left <= 0:
            raise given_up(f"{error}; {self.tries} tries in {Duration(timeout)} did not help") from error
        self.tries += 1
        delay = min(next(self._delays), left)
        if not self._is_waiting:
            self._on_status(f"{error}; try {self.tries} in {Duration(round(delay, 1))}")
        elif self.tries == 1:
            self._on_status(f"{error}; waiting for it for up to {Duration(timeout)}")
        if policy.wait(self._wake, delay):
            raise SessionLostError("the link is closed") from error


def retry_policy_of(link: LinkOptions) -> RetryPolicy:
    """How long to wait and to try again. A cloud of the edge's own that has died does not come back."""
    return RetryPolicy(
        reply_timeout_seconds=link.reply_timeout,
        attach_timeout_seconds=link.connect_timeout,
        reconnect_timeout_seconds=link.reconnect_timeout if link.server is not None else 0.0,
        wait_seconds=link.wait if link.server is not None else 0.0,
        backoff_seconds=link.reconnect_backoff,
        backoff_max_seconds=link.reconnect_backoff_max,
    )
