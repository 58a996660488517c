"""The open sessions: how many there may be, who has one, and when one is given up."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sft.errors import ServerFullError, SessionLostError
from sft_cloud.errors import PreconditionError
from sft_cloud.session import Session

ATTACH_SECONDS = 60.0
"""How long a session waits for its stream before its place may go to another."""


@dataclass
class Entry:
    """A session and what the server knows about it."""

    session: Session
    opened_at: float
    session_id: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    """Whoever knows it can use the session, so no log holds all of it."""
    attached: bool = False
    bytes_received: int = 0
    bytes_sent: int = 0

    @property
    def label(self) -> str:
        """What logs call the session."""
        return self.session_id[:8]


class Registry:
    """Sessions by id, at most `max_sessions` with those that are being opened. Safe to use from several threads."""

    def __init__(
        self,
        max_sessions: int,
        on_close: Callable[[Entry, str], None] = lambda entry, reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_close` is told of every session that ends, and why."""
        self._max_sessions = max_sessions
        self._on_close = on_close
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._opening = 0

    def __len__(self) -> int:
        """How many sessions are open."""
        with self._lock:
            return len(self._entries)

    @contextmanager
    def place(self) -> Iterator[Callable[[Session], Entry]]:
        """Holds a place while a session is made, and gives the function that puts it there.

        Sessions to which no stream attached in time make room first. Raises ServerFullError when there is none.
        """
        self._close_stale()
        with self._lock:
            if len(self._entries) + self._opening >= self._max_sessions:
                raise ServerFullError(f"the server has no room: all of its {self._max_sessions} sessions are in use")
            self._opening += 1
        try:
            yield self._add
        finally:
            with self._lock:
                self._opening -= 1

    def attach(self, session_id: str) -> None:
        """Gives a session to a stream. Raises SessionLostError, PreconditionError when another stream has it."""
        with self._lock:
            entry = self._find(session_id)
            if entry.attached:
                raise PreconditionError("another stream is attached to this session")
            entry.attached = True

    def get(self, session_id: str) -> Entry:
        """An open session. Raises SessionLostError."""
        with self._lock:
            return self._find(session_id)

    def close(self, session_id: str, reason: str) -> None:
        """Forgets a session; closing one twice does nothing."""
        with self._lock:
            entry = self._entries.pop(session_id, None)
        if entry is not None:
            self._on_close(entry, reason)

    def age(self, entry: Entry) -> float:
        """Seconds since a session was opened."""
        return self._clock() - entry.opened_at

    def _add(self, session: Session) -> Entry:
        entry = Entry(session, opened_at=self._clock())
        with self._lock:
            self._entries[entry.session_id] = entry
        return entry

    def _find(self, session_id: str) -> Entry:
        entry = self._entries.get(session_id)
        if entry is None:
            raise SessionLostError("there is no such session on this server; it has ended, or was never opened")
        return entry

    def _close_stale(self) -> None:
        with self._lock:
            stale = [e for e in self._entries.values() if not e.attached and self.age(e) > ATTACH_SECONDS]
        for entry in stale:
            self.close(entry.session_id, "no stream attached in time")
