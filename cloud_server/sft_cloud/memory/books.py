"""What is held of one memory: by kind, and by caller."""

from __future__ import annotations

import enum


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


class _Part:
    """Of one caller."""

    def __init__(self) -> None:
        self.sessions = 0
        self.passing = 0
        """Of all other kinds."""
        self.batches: dict[int, int] = {}
        """By session, the largest that it has had."""

    @property
    def batch(self) -> int:
        return max(self.batches.values(), default=0)

    @property
    def total(self) -> int:
        return self.sessions + self.passing + self.batch


class Books:
    """Not for several threads at once."""

    def __init__(self) -> None:
        self._kinds = dict.fromkeys(Kind, 0)
        self._parts: dict[str, _Part] = {}  # of those who hold something
        self.room = 0
        """For one batch: the largest of all."""

    @property
    def held(self) -> int:
        """By everybody."""
        return sum(self._kinds.values()) + self.room

    def of_kind(self, kind: Kind) -> int:
        """The room for a batch counts as the sessions'."""
        return self._kinds[kind] + (self.room if kind is Kind.SESSIONS else 0)

    def total(self, caller: str) -> int:
        """By a caller: of its batches the largest."""
        return self._parts[caller].total if caller in self._parts else 0

    def passing(self, caller: str) -> int:
        """Of that, what is not a session's."""
        return self._parts[caller].passing if caller in self._parts else 0

    def add(self, caller: str, kind: Kind, size: int) -> None:
        """So many bytes more, or fewer."""
        self._kinds[kind] += size
        part = self._part(caller)
        if kind is Kind.SESSIONS:
            part.sessions += size
        else:
            part.passing += size
        self._forget(caller)

    def batch(self, caller: str, session: int) -> int:
        """The largest that a session has had."""
        return self._parts[caller].batches.get(session, 0) if caller in self._parts else 0

    def set_batch(self, caller: str, session: int, size: int) -> None:
        """Of a session, whose number is anything that no other has; 0 when it is over."""
        batches = self._part(caller).batches
        if size:
            batches[session] = size
        else:
            batches.pop(session, None)
        self.room = max((part.batch for part in self._parts.values()), default=0)
        self._forget(caller)

    def _part(self, caller: str) -> _Part:
        return self._parts.setdefault(caller, _Part())

    def _forget(self, caller: str) -> None:
        if not self._parts[caller].total:
            del self._parts[caller]
