"""Files on their way: a call on which nothing moves is given up."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Callable, Optional, Type


class StallGuard:
    """Cancels a call that made no progress for `seconds`; its thread lives as long as the `with` block."""

    def __init__(self, seconds: float) -> None:
        self.stalled = False
        self._seconds = seconds
        self._cancel: Callable[[], object] = lambda: None
        self._moved = False
        self.over = threading.Event()
        """The block has ended."""
        self._changed = threading.Condition()
        self._thread: Optional[threading.Thread] = None

    def watch(self, cancel: Callable[[], object]) -> None:
        """Begins to watch the call that `cancel` cancels."""
        self._cancel = cancel
        self._thread = threading.Thread(target=self._watch, name="sft-stall-guard", daemon=True)
        self._thread.start()

    def progress(self) -> None:
        """Something moved."""
        with self._changed:
            self._moved = True
            self._changed.notify_all()

    def _watch(self) -> None:
        with self._changed:
            while not self.over.is_set():
                self._moved = False
                if not self._changed.wait_for(lambda: self._moved, self._seconds):
                    self.stalled = True
                    break
        if self.stalled:
            self._cancel()

    def __enter__(self) -> StallGuard:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        with self._changed:
            self.over.set()
            self._moved = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
