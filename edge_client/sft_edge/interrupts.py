"""Ctrl-C, where it must not come in between."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import Iterator, List


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Ctrl-C during the block raises KeyboardInterrupt at its end. Nothing in the block may wait for long."""
    handler = signal.getsignal(signal.SIGINT)
    # Signals reach the main thread only, and a process that ignores Ctrl-C, as under nohup, goes on doing so.
    if threading.current_thread() is not threading.main_thread() or handler is not signal.default_int_handler:
        yield
        return
    came: List[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt
