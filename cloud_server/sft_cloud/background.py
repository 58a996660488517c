"""Threads that look after things for as long as a server runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


def repeat(work: Callable[[], object], seconds: float, stop: threading.Event) -> None:
    """Works every so many seconds until `stop`, in a thread of the caller's. An error is logged, and ends nothing."""
    while not stop.wait(seconds):
        try:
            work()
        except Exception:
            _log.exception("something went wrong in the background; it is tried again", extra={"fields": {}})
