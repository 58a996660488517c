"""The one place that all memory goes through which the server takes for others.

    with budget.charge(Kind.DOWNLOADS, size):                   # a block: refused before anything is allocated
        ...
    charge = budget.charge(Kind.MESSAGES, 1 << 20)              # what comes in parts, and ends elsewhere
    charge.resize(2 << 20)                                      # before the next part is taken
    charge.release()                                            # by whoever is first to know that it is over

`charge` and `resize` raise NoMemoryError, with the line that the caller is to read. Sessions, which live long and
change with every batch, have a MemoryShare.

On a CPU nothing fails when memory runs out: the kernel ends the process, and everybody's session with it.
"""

from __future__ import annotations

import enum
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType

from sft.printable import format_bytes
from sft_cloud.errors import NoMemoryError
from sft_cloud.memory.process import give_back


class Kind(str, enum.Enum):
    """What memory is held for; its value is what metrics call it."""

    SESSIONS = "sessions"
    """Weights, gradients, optimizers' states, and graphs, with what computing takes."""
    ANSWERS = "answers"
    """That are made, or remembered until the edge has them."""
    MESSAGES = "messages"
    """On their way here, and until they are done."""
    DOWNLOADS = "downloads"
    BUILDS = "builds"
    """Models while they are built, and states while they are loaded."""


_WHAT = {
    Kind.SESSIONS: "this session",
    Kind.ANSWERS: "the answer",
    Kind.MESSAGES: "this message",
    Kind.DOWNLOADS: "this download",
    Kind.BUILDS: "building this model",
}

_ON_HOST = frozenset({Kind.ANSWERS, Kind.MESSAGES, Kind.DOWNLOADS, Kind.BUILDS})
"""What lies in the machine's memory where the device has its own."""

SMALL_BYTES = 1 << 20
_KEPT_FOR_SMALL = 8
"""One part in so many is for what takes at most SMALL_BYTES: large holdings cannot keep small messages out."""

_LOOKED_AT_BYTES = 1 << 20
"""Charges from this size on look at what the process really takes."""

_KEPT_BYTES = 64 << 20
"""That the process may have beyond the books before the allocator is told to give back what it keeps."""

_WAIT_SECONDS = 1.0
"""Between two looks at what the process really takes, of who waits."""

_TRIM_SECONDS = 1.0
"""At least between two attempts at having the allocator give back what it keeps."""


class MemoryBudget:
    """What a server may take for its callers, of one memory. Safe to use from several threads."""

    def __init__(
        self,
        total_bytes: int = sys.maxsize,
        process_bytes: int = 0,
        measure: Callable[[], int] = lambda: 0,
        host: MemoryBudget | None = None,
    ) -> None:
        """`total_bytes` for callers, beside the `process_bytes` that the process took before the first of them.

        `measure`: what the process takes now, with those; 0 if unknown. `host`: the budget of the machine's memory,
        where this is one of a device with its own.
        """
        self.total_bytes = total_bytes
        self.process_bytes = process_bytes
        self.host = host
        self._measure = measure
        self._lock = threading.RLock()  # here and below: a session that is collected meanwhile gives back, too
        self._given_back = threading.Condition(self._lock)
        self._held = dict.fromkeys(Kind, 0)
        self._refused = dict.fromkeys(Kind, 0)
        self._trimmed_at = -_TRIM_SECONDS
        self._largest: dict[int, int] = {}
        self._room = self.charge(Kind.SESSIONS, 0)

    @property
    def limit_bytes(self) -> int:
        """What callers and the process may take together."""
        return self.process_bytes + self.total_bytes

    @property
    def held_bytes(self) -> int:
        """For callers, of all kinds."""
        return sum(self._held.values())

    def most_bytes(self, size: int) -> int:
        """That a holding of such a `size` could ever have, were there no others."""
        return self.total_bytes - (self.total_bytes // _KEPT_FOR_SMALL if size > SMALL_BYTES else 0)

    def held(self) -> dict[Kind, int]:
        """Bytes by kind, those of the host included."""
        return {kind: self._of(kind)._held[kind] for kind in Kind}

    def refused(self) -> dict[Kind, int]:
        """How often something was refused because there was no memory for it, by kind."""
        return {kind: self._of(kind)._refused[kind] for kind in Kind}

    def charge(self, kind: Kind, size: int, what: str = "", wait_seconds: float = 0.0) -> Charge:
        """Holds `size` bytes until the charge is released. Call it before allocating. Raises NoMemoryError.

        `what`: what is too large, for the sentence of the error; each kind has its own. `wait_seconds`: for how long
        the calling thread may wait until others have given back enough.
        """
        budget = self._of(kind)
        charge, deadline = Charge(budget, kind, what or _WHAT[kind]), time.monotonic() + wait_seconds
        while time.monotonic() < deadline and size <= budget.most_bytes(size):
            if charge.tries(size):
                return charge
            budget._wait(_WAIT_SECONDS)
        charge.resize(size)
        return charge

    def hold_room(self, owner: int, size: int) -> None:
        """Holds room for a batch of the session `owner` until `leave_room`. Raises NoMemoryError.

        One batch is computed at a time, so the room is for all sessions, as large as the largest batch that one of them
        has had. Nobody's holdings can take it, and a session that goes on as it began finds it.
        """
        with self._lock:
            if size > self._largest.get(owner, 0):
                self._room.resize(max(size, *self._largest.values(), 0))
                self._largest[owner] = size

    def leave_room(self, owner: int) -> None:
        """The session is over."""
        with self._lock:
            if self._largest.pop(owner, 0):
                self._room.resize(max(self._largest.values(), default=0))

    def left_bytes(self, size: int = 0) -> int:
        """What is left for a holding of `size` in all, in the books and in truth."""
        return max(0, min(self.most_bytes(size) - self.held_bytes, self.limit_bytes - self._measure()))

    def add(self, kind: Kind, size: int, whole: int, forced: bool = False) -> bool:
        """Takes `size` bytes more, or fewer, for a holding that then has `whole`; whether they were there, which they
        are if it is `forced`. For charges and shares."""
        if not forced and size >= _LOOKED_AT_BYTES and not self._process_has(size):
            return False
        with self._lock:
            if not forced and size > 0 and self.held_bytes + size > self.most_bytes(whole):
                return False
            self._held[kind] += size
            if size < 0:
                self._given_back.notify_all()
        return True

    def count_refusal(self, kind: Kind) -> None:
        """Somebody was told that there is no memory. For charges and shares."""
        with self._lock:
            self._refused[kind] += 1

    def tidy(self) -> None:
        """Gives back what the allocator keeps of what has ended. To be called every now and then."""
        budget = self.host or self
        if budget._measure() > budget.process_bytes + budget.held_bytes + _KEPT_BYTES:
            give_back()

    def _wait(self, seconds: float) -> None:
        """Until something is given back, at most so long."""
        with self._given_back:
            self._given_back.wait(seconds)

    def _of(self, kind: Kind) -> MemoryBudget:
        return self.host if self.host is not None and kind in _ON_HOST else self

    def _process_has(self, size: int) -> bool:
        """Whether so much fits beside what the process really takes, be it in the books or not."""
        if self._measure() + size <= self.limit_bytes:
            return True
        with self._lock:
            now = time.monotonic()
            due = now - self._trimmed_at >= _TRIM_SECONDS
            if due:
                self._trimmed_at = now
        if due:
            give_back()
        return self._measure() + size <= self.limit_bytes


class Charge:
    """One holding; a context manager. Safe to use from several threads."""

    def __init__(self, budget: MemoryBudget, kind: Kind, what: str) -> None:
        """Of nothing yet."""
        self._budget = budget
        self._kind = kind
        self._what = what
        self._lock = threading.RLock()
        self._size = 0
        self._is_over = False

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return self._size

    def resize(self, size: int) -> None:
        """Holds so much from now on; nothing once it was released. Raises NoMemoryError; it is then as it was."""
        if not self.tries(size):
            self._budget.count_refusal(self._kind)
            raise NoMemoryError(self._refusal(size))

    def tries(self, size: int) -> bool:
        """As `resize`; False where that raises."""
        with self._lock:
            if self._is_over:
                return True
            fits = self._budget.add(self._kind, size - self._size, size)
            if fits:
                self._size = size
            return fits

    def settle(self, size: int) -> None:
        """As `resize`, for what is taken already."""
        with self._lock:
            if not self._is_over:
                self._budget.add(self._kind, size - self._size, size, forced=True)
                self._size = size

    def release(self) -> None:
        """Gives everything back; a second time does nothing."""
        with self._lock:
            self._is_over = True
            size, self._size = self._size, 0
        self._budget.add(self._kind, -size, 0)

    def release_with(self, owner: object) -> None:
        """Gives everything back when `owner` is no more, if nobody has until then."""
        weakref.finalize(owner, self.release)

    def __enter__(self) -> Charge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _refusal(self, size: int) -> str:
        budget = self._budget
        most = budget.most_bytes(size)
        if size > most:
            return (
                f"{self._what} would take {format_bytes(size)} of the server's memory, of which one may take "
                f"{format_bytes(most)}: make it smaller"
            )
        return (
            f"{self._what} would take {format_bytes(size)}, but {format_bytes(budget.left_bytes(size))} of the "
            "server's memory are left; try again later"
        )
