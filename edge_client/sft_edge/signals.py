"""Ctrl-C and SIGTERM, where they may come: the one deferred, the other noted."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import Any, Callable, Iterator, List

EXIT_TERMINATED = 143  # 128 + SIGTERM, as shells report it


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


class Termination(threading.Event):
    """Set when the run is to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.then: Callable[[], None] = lambda: None
        """Called after that, in the handler of the signal: it may take no lock."""


@contextmanager
def terminations_noted() -> Iterator[Termination]:
    """The event is set by the first SIGTERM during the block; the second one ends the process as ever."""
    asked = Termination()
    handler: Any = signal.getsignal(signal.SIGTERM)
    # Signals reach the main thread only, and whoever has a handler of its own keeps it.
    if threading.current_thread() is not threading.main_thread() or handler is not signal.SIG_DFL:
        yield asked
        return

    def note(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        asked.then()

    signal.signal(signal.SIGTERM, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def terminations_raised() -> Iterator[None]:
    """The first SIGTERM during the block raises SystemExit in it, as Ctrl-C raises KeyboardInterrupt: so what was
    opened is closed. The second one ends the process as ever. For what has nothing to save."""
    handler: Any = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or handler is not signal.SIG_DFL:
        yield  # as above
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise SystemExit(EXIT_TERMINATED)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def note_termination_in_worker(worker: int) -> None:
    """For a process that loads data: a SIGTERM that its whole group gets is for the run, which ends the process.

    The second one ends it as ever. What torch has set for it ends it with the first, and the run with an error.
    """
    del worker

    def note(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, note)
