"""The one place that all memory goes through which the server takes for others.

    with budget.charge(Kind.DOWNLOADS, size, caller):           # a block: refused before anything is allocated
        ...
    charge = budget.charge(Kind.MESSAGES, 1 << 20, caller)      # what comes in parts, and ends elsewhere
    charge.resize(2 << 20)                                      # before the next part is taken
    charge.release()                                            # by whoever is first to know that it is over

`charge` and `resize` raise NoMemoryError, with the line that the caller is to read. Sessions, which live long and
change with every batch, have a MemoryShare.

On a CPU nothing fails when memory runs out: the kernel ends the process, and everybody's session with it.

No caller can take the memory from others. Where there may be others, one is granted

    OWN_PART in all         as long as it is there
    more                    while as much is left as it then holds: of a server without others, half
    PASSING_PART            of what is no session's, however much it holds: a session that has grown large can go on

so whatever one does, another finds OWN_PART less PASSING_PART. A limit of the caller's token takes the place of this.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from types import TracebackType

from sft.printable import format_bytes
from sft_cloud.errors import NoMemoryError
from sft_cloud.identity import ANONYMOUS, Identity
from sft_cloud.memory.books import Books, Kind
from sft_cloud.memory.process import give_back

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

OWN_PART = 3 / 8
"""With the half that another may take, and the part for what is small, this is all."""
PASSING_PART = 1 / 16
TINY_BYTES = 64 << 10
"""What a message has at most that always comes through: it may say that something is to end. Calls are counted."""

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
        self._is_shared: Callable[[], bool] = lambda: False
        self._lock = threading.Lock()
        self._given_back = threading.Condition(self._lock)
        self._books = Books()
        self._refused = dict.fromkeys(Kind, 0)
        self._trimmed_at = -_TRIM_SECONDS
        self._collected: SimpleQueue[Callable[[], None]] = SimpleQueue()

    @property
    def limit_bytes(self) -> int:
        """What callers and the process may take together."""
        return self.process_bytes + self.total_bytes

    @property
    def held_bytes(self) -> int:
        """For callers, of all kinds."""
        self.settle_collected()
        with self._lock:
            return self._books.held

    def shared_if(self, is_shared: Callable[[], bool]) -> None:
        """From now on one caller leaves their part to others while `is_shared` says that there may be some."""
        self._is_shared = is_shared
        if self.host is not None:
            self.host.shared_if(is_shared)

    def most_bytes(self, size: int, caller: Identity = ANONYMOUS) -> int:
        """That a holding of such a `size` could ever have, did nobody else hold anything."""
        most, limit = self._most_of_total(size), caller.limits.max_memory
        if limit is not None:
            return min(most, limit)
        return min(most, self.total_bytes // 2) if size > OWN_PART * self.total_bytes and self._is_shared() else most

    def held(self) -> dict[Kind, int]:
        """Bytes by kind, those of the host included."""
        self.settle_collected()
        return {kind: self._of(kind)._books.of_kind(kind) for kind in Kind}

    def refused(self) -> dict[Kind, int]:
        """How often something was refused because there was no memory for it, by kind."""
        return {kind: self._of(kind)._refused[kind] for kind in Kind}

    def charge(self, kind: Kind, size: int, caller: Identity = ANONYMOUS, wait_seconds: float = 0.0) -> Charge:
        """Holds `size` bytes for a caller until the charge is released. Call it before allocating. Raises
        NoMemoryError.

        `wait_seconds`: for how long the calling thread may wait until enough is given back.
        """
        budget = self._of(kind)
        charge, deadline = Charge(budget, kind, caller), time.monotonic() + wait_seconds
        while time.monotonic() < deadline and size <= budget.most_bytes(size, caller):
            if charge.tries(size):
                return charge
            budget._wait(_WAIT_SECONDS)
        charge.resize(size)
        return charge

    def hold_room(self, session: int, size: int, caller: Identity = ANONYMOUS) -> bool:
        """Holds room for a batch of the session until `leave_room`; whether it was there.

        One batch is computed at a time, so the room is for all sessions, as large as the largest batch that one of them
        has had. Nobody's holdings can take it, and a session that goes on as it began finds it.
        """
        books, name = self._books, caller.name
        with self._lock:
            before, more = books.batch(name, session), size - books.room
        return size <= before or self._tries(
            caller,
            max(0, more),
            max(0, more),
            lambda: books.set_batch(name, session, size),
            lambda: books.set_batch(name, session, before),
        )

    def leave_room(self, session: int, caller: Identity = ANONYMOUS) -> None:
        """The session is over."""
        with self._lock:
            self._books.set_batch(caller.name, session, 0)
            self._given_back.notify_all()

    def left_bytes(self, size: int = 0) -> int:
        """What is left for a holding of `size` in all, in the books and in truth."""
        return max(0, min(self.most_bytes(size) - self.held_bytes, self.limit_bytes - self._measure()))

    def add(self, kind: Kind, size: int, whole: int, caller: Identity = ANONYMOUS, forced: bool = False) -> bool:
        """Takes `size` bytes more, or fewer, for a holding that then has `whole`; whether they were there, which they
        are if it is `forced`. For charges and shares."""
        books, name = self._books, caller.name
        if size > 0 and not forced:
            return self._tries(
                caller,
                size,
                whole,
                lambda: books.add(name, kind, size),
                lambda: books.add(name, kind, -size),
                passes=kind is not Kind.SESSIONS,
            )
        with self._lock:
            books.add(name, kind, size)
            self._given_back.notify_all()
        return True

    def count_refusal(self, kind: Kind) -> None:
        """Somebody was told that there is no memory. For charges and shares."""
        with self._lock:
            self._refused[kind] += 1

    def why_not(
        self, size: int, more: int, caller: Identity = ANONYMOUS, smaller: str = "make it smaller", later: str = ""
    ) -> str:
        """Why a holding of `size`, of which `more` are new, was refused: the rest of the sentence that says so.

        `smaller`, `later`: what to do where it could never fit, and where it does not now.
        """
        limit, most, left = caller.limits.max_memory, self.most_bytes(size, caller), self.left_bytes(size)
        with self._lock:
            holds = self._books.total(caller.name)
        if size > most:
            if most == limit:
                return f", and your token is for {format_bytes(limit)} of the server's memory (--max-memory): {smaller}"
            more_by = ", or have a token with --max-memory" if self._is_shared() else ""
            return f" of the server's memory, of which one may take {format_bytes(most)}: {smaller}{more_by}"
        if limit is not None and holds + more > limit:
            return (
                f" beside the {format_bytes(holds)} that you hold, and your token is for {format_bytes(limit)} of the "
                "server's memory (--max-memory): end something of yours"
            )
        if more <= left and limit is None and self._is_shared():
            return (
                f" beside the {format_bytes(holds)} that you hold, and the {format_bytes(left)} of the server's memory "
                "that are left are kept for others: end something of yours, or try again later"
            )
        return f", but {format_bytes(left)} of the server's memory are left; {later or 'try again later'}"

    def collect_with(self, owner: object, give_back: Callable[[], None]) -> None:
        """Has `give_back` called when `owner` is no more. For charges and shares.

        Not by the collector itself, which may come in the middle of anything; by whoever looks into the books next.
        """
        weakref.finalize(owner, self._collected.put, give_back)

    def settle_collected(self) -> None:
        """Calls what is due by `collect_with`."""
        while True:
            try:
                give_back = self._collected.get_nowait()
            except Empty:
                return
            give_back()

    def tidy(self) -> None:
        """Gives back what the allocator keeps of what has ended. To be called every now and then."""
        budget = self.host or self
        if budget._measure() > budget.process_bytes + budget.held_bytes + _KEPT_BYTES:
            give_back()

    def _tries(
        self,
        caller: Identity,
        more: int,
        whole: int,
        enter: Callable[[], None],
        undo: Callable[[], None],
        passes: bool = False,
    ) -> bool:
        """Has `enter` write what takes `more` bytes into the books; whether they were there. `passes`: it is no
        session's."""
        if more >= _LOOKED_AT_BYTES and not self._process_has(more):
            return False

        def enters(leaves_others_theirs: bool) -> bool:
            with self._lock:
                enter()
                fits = not more or self._books.held <= self._most_of_total(whole)
                fits = fits and (not leaves_others_theirs or self._leaves_others_theirs(caller, whole, passes))
                if not fits:
                    undo()
                return fits

        # Whether there are others is asked where that matters, and without the lock.
        return enters(True) or (caller.limits.max_memory is None and not self._is_shared() and enters(False))

    def _most_of_total(self, whole: int) -> int:
        return self.total_bytes - (self.total_bytes // _KEPT_FOR_SMALL if whole > SMALL_BYTES else 0)

    def _leaves_others_theirs(self, caller: Identity, whole: int, passes: bool) -> bool:
        """As the books are now."""
        books, name, limit = self._books, caller.name, caller.limits.max_memory
        if passes and whole <= TINY_BYTES:
            return True
        if limit is not None:
            return books.total(name) <= limit
        if passes and books.passing(name) <= PASSING_PART * self.total_bytes:
            return True
        return books.total(name) <= max(OWN_PART * self.total_bytes, self.total_bytes - books.held)

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

    def __init__(self, budget: MemoryBudget, kind: Kind, caller: Identity) -> None:
        """Of nothing yet."""
        self._budget = budget
        self._kind = kind
        self._caller = caller
        self._lock = threading.Lock()
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
            reason = self._budget.why_not(size, size - self._size, self._caller)
            raise NoMemoryError(f"{_WHAT[self._kind]} would take {format_bytes(size)}{reason}")

    def tries(self, size: int) -> bool:
        """As `resize`; False where that raises."""
        self._budget.settle_collected()
        return self._set(size, forced=False)

    def settle(self, size: int) -> None:
        """As `resize`, for what is taken already."""
        self._set(size, forced=True)

    def release(self) -> None:
        """Gives everything back; a second time does nothing."""
        self._set(0, forced=True, is_over=True)

    def release_with(self, owner: object) -> None:
        """Gives everything back when `owner` is no more, if nobody has until then."""
        self._budget.collect_with(owner, self.release)

    def __enter__(self) -> Charge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _set(self, size: int, forced: bool, is_over: bool = False) -> bool:
        with self._lock:
            if self._is_over:
                return True
            fits = self._budget.add(self._kind, size - self._size, size, self._caller, forced)
            if fits:
                self._size, self._is_over = size, is_over
            return fits
