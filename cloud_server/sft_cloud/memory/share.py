"""One session's part of a budget: what it begins with, and what changes with its batches."""

from __future__ import annotations

import weakref

from sft.errors import ProtocolError
from sft.printable import format_bytes
from sft_cloud.errors import NoMemoryError
from sft_cloud.memory.budget import Kind, MemoryBudget


class MemoryShare:
    """Not for several threads at once, but for its release."""

    def __init__(self, budget: MemoryBudget | None = None, fixed_bytes: int = 0) -> None:
        """Takes what the session holds before its first batch. Raises NoMemoryError. Without a budget, all fits."""
        self._budget = MemoryBudget() if budget is None else budget
        self._fixed = self._begins_with = fixed_bytes
        self._answers = self._budget.charge(Kind.ANSWERS, 0)
        self._held = [0]  # shared with `_give_back`, which must not hold on to the share
        self._waited = 0
        most = self._budget.most_bytes(fixed_bytes)
        if fixed_bytes > most:
            self._budget.count_refusal(Kind.SESSIONS)
            raise NoMemoryError(
                f"this session would take {format_bytes(fixed_bytes)}, but all sessions of this server together may "
                f"take {format_bytes(most)}; choose a smaller model, a higher --split-layer, or "
                "LoRA"
            )
        if not self._resize(fixed_bytes):
            raise NoMemoryError(
                f"this session would take {format_bytes(fixed_bytes)}, but "
                f"{format_bytes(self._budget.left_bytes(fixed_bytes))} of the server's memory are left; try again "
                "when another session has ended"
            )

    def release(self) -> None:
        """Gives everything back."""
        self._answers.release()
        _give_back(self._budget, self._held)

    def release_with(self, owner: object) -> None:
        """Gives everything back when `owner` is no more."""
        self._answers.release_with(owner)
        weakref.finalize(owner, _give_back, self._budget, self._held)

    def grow(self, size: int) -> None:
        """The session holds so much more than it began with, if it does not so already. Raises NoMemoryError."""
        fixed = max(self._fixed, self._begins_with + size)
        if not self._resize(self._held[0] + fixed - self._fixed):
            raise NoMemoryError(
                f"the optimizer's new settings take {format_bytes(fixed - self._fixed)} more, which are not there now; "
                "try again later"
            )
        self._fixed = fixed

    def check(self, size: int) -> None:
        """Raises ProtocolError when so much could never fit, however few others there are."""
        most = self._budget.most_bytes(self._fixed + size)
        if self._fixed + size > most:
            raise ProtocolError(
                f"this batch, with what waits for a backward(), would take about {format_bytes(size)} on the cloud, "
                f"whose sessions may take {format_bytes(most)} together: send smaller batches"
            )

    def hold(self, size: int, answers: int = 0, batch: int = 0) -> None:
        """From now on the session takes `size` beside what it began with, and so much for answers; computing takes
        `batch` besides, for which there is one room for all sessions.

        What it had of both before it has again, whatever others take. Raises MemoryError if the rest is not there.
        """
        try:
            self._answers.resize(answers)
            self._budget.hold_room(id(self._held), batch)
        except NoMemoryError as error:
            raise MemoryError(str(error)) from error
        if not self._resize(self._fixed + max(size, self._waited)):
            held = format_bytes(self._budget.held_bytes)
            raise MemoryError(f"{format_bytes(size)} are wanted beside the {held} that are taken; try again later")

    def settle(self, size: int, answers: int = 0) -> None:
        """As `hold`, for what is taken already."""
        self._answers.settle(answers)
        self._waited = max(self._waited, size)
        self._resize(self._fixed + self._waited, forced=True)

    def _resize(self, size: int, forced: bool = False) -> bool:
        # A session that trains small batches is small, however large its weights: others cannot keep these out.
        fits = self._budget.add(Kind.SESSIONS, size - self._held[0], size - self._held[0], forced)
        if fits:
            self._held[0] = size
        else:
            self._budget.count_refusal(Kind.SESSIONS)
        return fits


def _give_back(budget: MemoryBudget, held: list[int]) -> None:
    budget.leave_room(id(held))
    budget.add(Kind.SESSIONS, -held[0], 0)
    held[0] = 0
