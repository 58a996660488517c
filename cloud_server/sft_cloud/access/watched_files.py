"""Files that a running server reads again when they change; what they said last counts until they can be read."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from sft.errors import UsageError

RETRY_SECONDS = 1.0
"""Between two tries to read files that could not be read, and have not changed since."""

T = TypeVar("T")

_log = logging.getLogger(__name__)


class WatchedFiles(Generic[T]):
    """What some files say. For one thread at a time."""

    def __init__(
        self,
        look: Callable[[], Hashable],
        read: Callable[[], T],
        stays: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`look` is cheap and changes with the files; `read` raises UsageError, here at once; `stays` is what the log
        says when it does so later."""
        self._look, self._read, self._stays, self._clock = look, read, stays, clock
        self._taken = look()
        self.value = read()
        self._failed: Hashable = None
        self._said = ""
        self._not_before = 0.0

    def changed(self) -> bool:
        """Reads again if need be; whether `value` is new."""
        now = self._look()
        if now == self._taken:
            self._said = ""
            return False
        if self._said and now == self._failed and self._clock() < self._not_before:
            return False
        try:
            self.value = self._read()
        except UsageError as error:
            # The files count as unread: what was wrong may have been this machine's, and gone in a moment.
            if (now, str(error)) != (self._failed, self._said):
                _log.error(self._stays, extra={"fields": {"reason": str(error)}})
            self._failed, self._said, self._not_before = now, str(error), self._clock() + RETRY_SECONDS
            return False
        self._taken, self._said = now, ""
        return True
