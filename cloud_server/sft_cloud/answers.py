"""The answers of one step, for messages that are repeated."""

from __future__ import annotations

from sft.v1 import split_training_pb2 as pb
from sft_cloud.errors import PreconditionError

MAX_ANSWERS = 64
"""Answers of a step that are remembered; the oldest are forgotten first."""

MAX_BYTES = 64 << 20
"""Their size in bytes all together; the newest is remembered however large it is."""

_IN_ORDER = ("forward", "load_state", "")
"""Kinds of bodies whose micro_batch grows within a step. Of the others nothing is left to repeat: a Backward's graph is
gone."""


class Answers:
    """Of one step, by kind of body and micro-batch."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, int], tuple[pb.CloudMessage, int]] = {}  # with their sizes, the oldest first
        self._bytes = 0
        self._newest: dict[str, int] = {}  # micro_batch of every kind that is in order

    def find(self, body: str, micro_batch: int) -> pb.CloudMessage | None:
        """None for a message that was not answered yet. Raises PreconditionError when the answer is forgotten."""
        if (body, micro_batch) in self._answers:
            return self._answers[body, micro_batch][0]
        if micro_batch <= self._newest.get(body, -1):
            raise PreconditionError(
                f"{body or 'message'} {micro_batch} of this step was answered, and the answer is not remembered"
            )
        return None

    def keep(self, body: str, answer: pb.CloudMessage) -> None:
        """The answer to a message that `find` does not know; others may be forgotten for it."""
        if body in _IN_ORDER:
            self._newest[body] = answer.micro_batch
        size = answer.ByteSize()
        self._answers[body, answer.micro_batch] = answer, size
        self._bytes += size
        while len(self._answers) > MAX_ANSWERS or (self._bytes > MAX_BYTES and len(self._answers) > 1):
            self._drop(next(iter(self._answers)))

    def forget(self, body: str, micro_batch: int) -> None:
        """Nobody will repeat it."""
        if (body, micro_batch) in self._answers:
            self._drop((body, micro_batch))

    def clear(self) -> None:
        """The step is over."""
        self._answers.clear()
        self._newest.clear()
        self._bytes = 0

    def _drop(self, key: tuple[str, int]) -> None:
        _, size = self._answers.pop(key)
        self._bytes -= size
