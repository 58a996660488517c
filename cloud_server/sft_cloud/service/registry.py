"""The open sessions: how many there may be, whose each is, which stream has it, and when it is given up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from sft.errors import ServerFullError, ServerUnavailableError, SessionLostError
from sft.v1 import split_training_pb2 as pb
from sft_cloud.errors import PreconditionError, QuotaError
from sft_cloud.identity import Identity
from sft_cloud.observability import model_name
from sft_cloud.service.exactly_once import ExactlyOnce
from sft_cloud.service.mailbox import Mailbox

SPARED_SECONDS = 60.0
"""How long a session may be without a stream before its place goes to another, where there is no other place."""

DONE = "the edge is done"
"""Why a session ends that its edge has ended."""


_log = logging.getLogger(__name__)

_IS_BEING_OPENED = "this session is being opened; ask again"


class StreamHandle:
    """A stream that has, or had, a session. Compared by identity."""

    def __init__(self, cancel: Callable[[], object] = lambda: None, is_absent: bool = False) -> None:
        """`is_absent`: no stream in truth, but who does what an edge has left."""
        self.is_absent = is_absent
        self.over = threading.Event()
        """Set once it has ended, or is to."""
        self._cancel = cancel

    def cancel(self) -> None:
        """Another has the session, or it has ended."""
        self.over.set()
        self._cancel()


@dataclass
class Entry:
    """What the server knows about a session; the session itself is the engine's."""

    session_id: str = field(repr=False)
    """Whoever knows it, and is its owner, can use the session, so no log holds all of it."""
    request: pb.OpenSessionRequest = field(repr=False)
    """As it was opened with."""
    owner: Identity
    opened_at: float
    used_at: float
    """When its stream last began or ended, or a message came."""
    next_step: int
    """The first step that is not committed, as the engine last told it."""
    messages: ExactlyOnce = field(default_factory=ExactlyOnce)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a message is applied, so that a stream that takes over finds nothing half-done."""
    stream: StreamHandle | None = None
    was_attached: bool = False
    keeps: bool = False
    """Whether it keeps activations."""
    kept: int = 0
    """How many sequences it held when it was opened."""
    left: Mailbox | None = None
    """What its edge has left to do before it left; all of it may be done."""
    saves: int = 0
    """Checkpoints that both sides have, of the step that was the last one then."""
    bytes_received: int = 0
    bytes_sent: int = 0

    @property
    def has_edge(self) -> bool:
        """Whether its edge is there, which is more than that somebody works for it."""
        stream = self.stream
        return stream is not None and not stream.is_absent

    @property
    def is_done(self) -> bool:
        """Whether its edge has left, and all is done that it left to do."""
        left = self.left
        return left is not None and left.is_done(self.messages.last_number)

    @cached_property
    def model(self) -> str:
        """What people read as the name of its model."""
        return model_name(self.request)

    @property
    def label(self) -> str:
        """What logs call the session."""
        return self.session_id[:8]


class Registry:
    """Sessions by id, at most `max_sessions` with those that are being opened. Safe to use from several threads."""

    def __init__(
        self,
        max_sessions: int,
        session_timeout_seconds: float,
        on_close: Callable[[Entry, str], None] = lambda entry, reason: None,
        clock: Callable[[], float] = time.monotonic,
        detached_timeout_seconds: float = 86_400.0,
    ) -> None:
        """`session_timeout_seconds`: how long a session outlives a stream that broke, `detached_timeout_seconds` the
        last thing it does for an edge that has left; `on_close` is told of every
        session that ends, and why.
        """
        self.max_sessions = max_sessions
        self.session_timeout_seconds = session_timeout_seconds
        self.detached_timeout_seconds = detached_timeout_seconds
        self._on_close = on_close
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._opening: list[tuple[str, str]] = []  # owner and request_id of those that are being opened

    def __len__(self) -> int:
        """How many sessions are open."""
        with self._lock:
            return len(self._entries)

    def entries(self) -> list[Entry]:
        """Those that are open, the oldest first."""
        with self._lock:
            return list(self._entries.values())

    def opened(self, request: pb.OpenSessionRequest, owner: Identity) -> Entry | None:
        """The session that this very request has opened already, when its answer was lost.

        Raises ServerUnavailableError while it is being opened, PreconditionError where its id stands for another one.
        """
        if not request.request_id:
            return None
        with self._lock:
            if (owner.name, request.request_id) in self._opening:
                raise ServerUnavailableError(_IS_BEING_OPENED)
            for entry in self._entries.values():
                if entry.owner.name == owner.name and entry.request.request_id == request.request_id:
                    if not _is_same(entry.request, request):
                        raise PreconditionError("the request_id is that of another request, which opened a session")
                    return entry
        return None

    def ends_others(self, request: pb.OpenSessionRequest, owner: Identity) -> bool:
        """Whether `place` would end other sessions for this request, which has to be sound then. Raises as it does."""
        self.reap()
        with self._lock:
            return bool(self._to_end(request, owner))

    @contextmanager
    def place(self, request: pb.OpenSessionRequest, owner: Identity) -> Iterator[Callable[[str, int], Entry]]:
        """Holds a place while a session is made, and gives the function that puts it there: its id and next step.

        An older session of the same run makes room, as its edge begins anew; where that is not enough, as many as have
        to of those that have been without a stream for a while: the owner's before others', the longest idle first. One
        whose edge has left makes room for its owner alone, when all is done, after the owner's that wait for theirs.
        Raises ServerFullError when there is no room, QuotaError when the owner has used up its own; all stay then.
        """
        self.reap()
        mark = (owner.name, request.request_id)
        with self._lock:
            if request.request_id and mark in self._opening:
                raise ServerUnavailableError(_IS_BEING_OPENED)
            ended = self._to_end(request, owner)
            for entry, _ in ended:
                del self._entries[entry.session_id]
            self._opening.append(mark)
        try:
            for entry, reason in ended:
                self._closed(entry, reason)
            yield lambda session_id, next_step: self._add(session_id, request, owner, next_step)
        finally:
            with self._lock:
                self._opening.remove(mark)

    def attach(self, session_id: str, owner: Identity, stream: StreamHandle) -> Entry:
        """Gives a session to a stream; one that had it before is cancelled. Raises SessionLostError."""
        with self._lock:
            entry = self._find(session_id, owner)
            before, entry.stream = entry.stream, stream
            entry.was_attached, entry.used_at = True, self._clock()
        if before is not None:
            before.cancel()
        return entry

    def detach(self, entry: Entry, stream: StreamHandle) -> None:
        """The stream has ended; the session waits for another. Nothing happens where another has it already."""
        with self._lock:
            if entry.stream is stream:
                entry.stream, entry.used_at = None, self._clock()

    def attach_absent(self, session_id: str, owner: Identity, stream: StreamHandle) -> bool:
        """As `attach`, for who does what an edge has left: only where it has, and no stream has the session."""
        with self._lock:
            entry = self._entries.get(session_id)
            if entry is None or entry.owner.name != owner.name or entry.left is None or entry.stream is not None:
                return False
            entry.stream = stream
            return True

    def get(self, session_id: str, owner: Identity) -> Entry:
        """An open session of this owner. Raises SessionLostError."""
        with self._lock:
            return self._find(session_id, owner)

    def close(self, session_id: str, reason: str) -> None:
        """Forgets a session and cancels its stream; closing one twice does nothing."""
        with self._lock:
            entry = self._entries.pop(session_id, None)
        if entry is not None:
            self._closed(entry, reason)

    def end(self, session_id: str, stream: StreamHandle, reason: str) -> None:
        """As `close`, by a stream of it, which is not cancelled; nothing happens where another has the session."""
        with self._lock:
            entry = self._entries.get(session_id)
            if entry is None or entry.stream not in (stream, None):
                return
            entry.stream = None
            del self._entries[session_id]
        self._closed(entry, reason)

    def touch(self, entry: Entry) -> None:
        """A message came."""
        entry.used_at = self._clock()

    def age(self, entry: Entry) -> float:
        """Seconds since a session was opened."""
        return self._clock() - entry.opened_at

    def idle(self, entry: Entry) -> float:
        """Seconds since its stream began or ended, or a message came."""
        return self._clock() - entry.used_at

    def reap(self) -> None:
        """Closes the sessions that have been without a stream for too long."""
        self._close_where(
            f"no stream for {self.session_timeout_seconds:g} s",
            lambda entry: (
                entry.stream is None and entry.left is None and self.idle(entry) > self.session_timeout_seconds
            ),
        )
        self._close_where(
            f"its edge has not come back for {self.detached_timeout_seconds:g} s",
            lambda entry: (
                entry.left is not None and entry.stream is None and self.idle(entry) > self.detached_timeout_seconds
            ),
        )

    def _close_where(self, reason: str, is_meant: Callable[[Entry], bool]) -> None:
        for entry in self.entries():
            if is_meant(entry):
                self.close(entry.session_id, reason)

    def _to_end(self, request: pb.OpenSessionRequest, owner: Identity) -> list[tuple[Entry, str]]:
        """What has to end, and why, before there is a place; with the lock."""
        entries = list(self._entries.values())
        again = [entry for entry in entries if request.run_id and _is_run(entry, request, owner)]
        stay = [entry for entry in entries if entry not in again]
        idle = sorted(
            (e for e in stay if self._may_end(e, owner)),
            key=lambda entry: (entry.owner.name != owner.name, entry.left is not None, entry.used_at),
        )
        own = [entry for entry in idle if entry.owner.name == owner.name]
        allowed = owner.limits.sessions_of(self.max_sessions)
        in_use_by_owner = sum(entry.owner.name == owner.name for entry in stay)
        in_use_by_owner += sum(name == owner.name for name, _ in self._opening)
        too_many_own = max(0, in_use_by_owner + 1 - allowed)
        too_many = max(too_many_own, len(stay) + len(self._opening) + 1 - self.max_sessions)
        if too_many_own > len(own) and allowed < self.max_sessions:
            raise QuotaError(f"all of your {allowed} sessions are in use; end one")
        if too_many > len(idle):
            raise ServerFullError(f"the server has no room: all of its {self.max_sessions} sessions are in use")
        reason = "it had no stream, and its place was needed"
        return [(entry, "its run goes on in another session") for entry in again] + [
            (entry, reason) for entry in idle[:too_many]
        ]

    def _may_end(self, entry: Entry, owner: Identity) -> bool:
        """Whether it may for another of this owner."""
        waits = entry.left is None or (entry.owner.name == owner.name and entry.is_done)
        return entry.stream is None and waits and self.idle(entry) > SPARED_SECONDS

    def _closed(self, entry: Entry, reason: str) -> None:
        """Whoever is told of it keeps neither the place nor those that end with it."""
        if entry.left is not None:
            entry.left.close()
        try:
            self._on_close(entry, reason)
        except Exception:
            _log.exception("something went wrong when a session ended", extra={"fields": {"session": entry.label}})
        if entry.stream is not None:
            entry.stream.cancel()

    def _add(self, session_id: str, request: pb.OpenSessionRequest, owner: Identity, next_step: int) -> Entry:
        now = self._clock()
        entry = Entry(session_id, request, owner, opened_at=now, used_at=now, next_step=next_step)
        with self._lock:
            self._entries[entry.session_id] = entry
        return entry

    def _find(self, session_id: str, owner: Identity) -> Entry:
        entry = self._entries.get(session_id)
        # Whoever guesses the id of somebody else's session learns nothing from the answer.
        if entry is None or entry.owner.name != owner.name:
            raise SessionLostError("there is no such session on this server; it has ended, or was never opened")
        return entry


def _is_same(one: pb.OpenSessionRequest, other: pb.OpenSessionRequest) -> bool:
    # As bytes: a number that is none is not equal to itself.
    return one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True)


def _is_run(entry: Entry, request: pb.OpenSessionRequest, owner: Identity) -> bool:
    return entry.owner.name == owner.name and entry.request.run_id == request.run_id
