"""How often and how long a run whose session is gone opens another one."""

from __future__ import annotations

import threading
import time
from typing import Callable, Iterator, Optional

from sft.client.credentials import RENEWAL_SECONDS
from sft.errors import (
    LinkError,
    ServerFullError,
    ServerUnavailableError,
    SessionLostError,
    StaleAccessError,
    StreamBrokenError,
)

_MAX_LOSSES = 5
"""Of sessions, without the run getting further than it had been: some step may be what kills the server."""


class Recovery:
    """Of one run."""

    def __init__(
        self,
        timeout_seconds: float,
        delays: Callable[[], Iterator[float]],
        terminated: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`timeout_seconds` to try for since a session was lost; `delays`: seconds to wait before each try;
        `terminated` ends a wait.
        """
        self._timeout_seconds = timeout_seconds
        self._new_delays = delays
        self._terminated = terminated
        self._clock = clock
        self._furthest = -1
        self._losses = 0  # since the furthest step
        self._lost_at = clock()
        self._delays: Optional[Iterator[float]] = None

    def reached(self, steps: int) -> None:
        """So many steps are taken. Those that are taken again do not count."""
        if steps > self._furthest:
            self._furthest, self._losses = steps, 0

    def is_worth_trying(self, error: LinkError, had_session: bool) -> bool:
        """Whether to open a session after this error, of a session or of an attempt to open one."""
        if had_session:
            if not isinstance(error, SessionLostError):
                return False
            # Not since the last step: an evaluation after it may have taken longer than all tries may.
            self._delays, self._lost_at = self._new_delays(), self._clock()
            self._losses += 1
        elif self._delays is None or not isinstance(
            error, (ServerUnavailableError, ServerFullError, SessionLostError, StreamBrokenError, StaleAccessError)
        ):
            return False  # also the first attempt of all: a wrong address should not be tried for long
        timeout = self._timeout_seconds
        if isinstance(error, StaleAccessError):
            timeout = min(timeout, RENEWAL_SECONDS)
        return self._losses <= _MAX_LOSSES and self._clock() < self._lost_at + timeout

    def wait(self) -> None:
        """Until the next try is due, or the run is to stop."""
        assert self._delays is not None
        self._terminated.wait(next(self._delays))
