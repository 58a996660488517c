"""One session's part of a budget: what it begins with, and what changes with its batches."""

from __future__ import annotations

from sft.printable import format_bytes
from sft_cloud.errors import NoMemoryError
from sft_cloud.identity import ANONYMOUS, Identity
from sft_cloud.memory.books import Kind
from sft_cloud.memory.budget import MemoryBudget


class MemoryShare:
    """Not for several threads at once, but for its release, and what of answers is kept."""

    def __init__(self, budget: MemoryBudget | None = None, fixed_bytes: int = 0, caller: Identity = ANONYMOUS) -> None:
        """Takes what the session of `caller` holds before its first batch. Raises NoMemoryError. Without a budget, all
        fits."""
        self._budget = MemoryBudget() if budget is None else budget
        self._fixed = self._begins_with = fixed_bytes
        self._waited = 0
        self._answers = self._budget.charge(Kind.ANSWERS, 0, caller)
        self._held = _Held(self._budget, caller)
        if not self._held.resize(fixed_bytes):
            why = self._budget.why_not(
                fixed_bytes,
                fixed_bytes,
                caller,
                "choose a smaller model, a higher --split-layer, or LoRA",
                "try again when another session has ended",
            )
            raise NoMemoryError(f"this session would take {format_bytes(fixed_bytes)}{why}")

    def release(self) -> None:
        """Gives everything back."""
        self._answers.release()
        self._held.give_back()

    def release_with(self, owner: object) -> None:
        """Gives everything back when `owner` is no more."""
        self._answers.release_with(owner)
        self._budget.collect_with(owner, self._held.give_back)

    def grow(self, size: int) -> None:
        """The session holds so much more than it began with, if it does not so already. Raises NoMemoryError."""
        fixed = max(self._fixed, self._begins_with + size)
        if not self._held.resize(self._held.size + fixed - self._fixed):
            raise NoMemoryError(
                f"the optimizer's new settings take {format_bytes(fixed - self._fixed)} more, which are not there now; "
                "try again later"
            )
        self._fixed = fixed

    def too_large(self, size: int) -> str:
        """The sentence that says so where so much could never fit, however few others there are; else nothing."""
        whole = self._fixed + size
        if whole <= self._budget.most_bytes(whole, self._held.caller):
            return ""
        why = self._budget.why_not(whole, whole, self._held.caller, "send smaller batches")
        return (
            f"this batch, with what waits for a backward(), would take about {format_bytes(size)} on the cloud, "
            f"and its session then {format_bytes(whole)}{why}"
        )

    def hold(self, size: int, answers: int = 0, batch: int = 0) -> None:
        """From now on the session takes `size` beside what it began with, and so much for answers; computing takes
        `batch` besides, for which there is one room for all sessions.

        What it had of both before it has again, whatever others take. Raises NoMemoryError if the rest is not there.
        """
        self._answers.resize(answers)
        waits = max(size, self._waited)
        if not self._held.has_room(batch):
            raise NoMemoryError(self._held.refusal("this batch", batch))
        if not self._held.resize(self._fixed + waits):
            raise NoMemoryError(self._held.refusal("what waits for a backward()", waits - self._waited))

    def hold_now(self, size: int, answers: int = 0, batch: int = 0) -> None:
        """As `hold`, for what is not begun anew: the error says that it may go another time."""
        try:
            self.hold(size, answers, batch)
        except NoMemoryError as error:
            raise NoMemoryError(f"there is no memory for this now: {error}") from error

    def settle(self, size: int, answers: int = 0) -> None:
        """As `hold`, for what is taken already."""
        self._answers.settle(answers)
        self._waited = max(self._waited, size)
        self._held.resize(self._fixed + self._waited, forced=True)

    def keep_answers(self, size: int) -> None:
        """What is held for answers from now on. In any thread. Raises NoMemoryError where more is not there."""
        self._answers.resize(size)


class _Held:
    """Of the sessions' memory, by one. What of a share outlives its session."""

    def __init__(self, budget: MemoryBudget, caller: Identity) -> None:
        self.caller = caller
        self.size = 0
        self._budget = budget

    def resize(self, size: int, forced: bool = False) -> bool:
        # A session that trains small batches is small, however large its weights: others cannot keep these out.
        more = size - self.size
        self._budget.settle_collected()
        fits = self._budget.add(Kind.SESSIONS, more, more, self.caller, forced)
        if fits:
            self.size = size
        else:
            self._budget.count_refusal(Kind.SESSIONS)
        return fits

    def has_room(self, batch: int) -> bool:
        fits = self._budget.hold_room(id(self), batch, self.caller)
        if not fits:
            self._budget.count_refusal(Kind.SESSIONS)
        return fits

    def refusal(self, what: str, size: int) -> str:
        return f"{what} would take {format_bytes(size)}{self._budget.why_not(size, size, self.caller)}"

    def give_back(self) -> None:
        self._budget.leave_room(id(self), self.caller)
        self._budget.add(Kind.SESSIONS, -self.size, 0, self.caller)
        self.size = 0
