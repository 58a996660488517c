"""What makes a message that comes twice count once; docs/protocol.md says why this is enough."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from google.protobuf.message import Message

from sft.errors import ProtocolError
from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import MAX_MESSAGE_BYTES, MAX_UNANSWERED
from sft_cloud.errors import FullOfAnswersError, GapError, PreconditionError

MAX_BYTES = 4 * MAX_MESSAGE_BYTES
"""Of all answers that one session has remembered."""


_OF_THE_SENDING = ("number", "answered", "trace_parent")
"""What may differ where a message comes again."""


class _Remembered(NamedTuple):
    checksum: int
    answer: pb.CloudMessage
    size: int


class ExactlyOnce:
    """The messages of one session: which were applied, and the answers that may still be asked for.

    Not for several threads at once.
    """

    def __init__(self) -> None:
        self.last_number = 0
        """Of the newest message that was applied."""
        self._answers: dict[int, _Remembered] = {}  # the oldest first
        self._bytes = 0

    @property
    def held_bytes(self) -> int:
        """Of the answers that are remembered."""
        return self._bytes

    def apply(
        self, message: pb.EdgeMessage, work: Callable[[], pb.CloudMessage], is_left: bool = False
    ) -> tuple[pb.CloudMessage, bool]:
        """The answer to a message, and whether it came from memory: `work` makes it the first time. `is_left`: its edge
        is away, and hears of no answer before it is back.

        Raises GapError when a message before this one has not come, ProtocolError for a number that stands for another
        message, PreconditionError when too many answers are not yet known to have arrived, or FullOfAnswersError where
        none of them can, and what `work` raises: then the message was not applied.
        """
        if message.number < 1:
            raise ProtocolError("messages of a session are numbered from 1")
        if not message.answered < message.number:
            raise ProtocolError(f"message {message.number} says that its own answer has arrived")
        self._forget(message.answered)
        if message.number <= self.last_number:
            return self._again(message), True
        if message.number > self.last_number + 1:
            raise GapError(
                f"message {message.number} came, but {self.last_number + 1} is next: send again what is missing"
            )
        if is_left and self._bytes > MAX_BYTES:
            raise FullOfAnswersError(f"{self._bytes} bytes of answers wait for the edge; at most {MAX_BYTES} may")
        if not is_left and (len(self._answers) >= MAX_UNANSWERED or self._bytes > MAX_BYTES):
            raise PreconditionError(
                f"{len(self._answers)} answers, of {self._bytes} bytes, are not known to have arrived; at most "
                f"{MAX_UNANSWERED} and {MAX_BYTES} are remembered"
            )
        checksum = _checksum(message)
        answer = work()
        answer.number = message.number
        remembered = _Remembered(checksum, answer, answer.ByteSize())
        self._answers[message.number] = remembered
        self._bytes += remembered.size
        self.last_number = message.number
        return answer, False

    def answers_after(self, answered: int) -> list[pb.CloudMessage]:
        """For an edge that comes back: what it has no answer to yet, in order."""
        self._forget(answered)
        return [remembered.answer for remembered in self._answers.values()]

    def _forget(self, answered: int) -> None:
        while self._answers and next(iter(self._answers)) <= answered:
            self._bytes -= self._answers.pop(next(iter(self._answers))).size

    def _again(self, message: pb.EdgeMessage) -> pb.CloudMessage:
        remembered = self._answers.get(message.number)
        if remembered is None:
            raise PreconditionError(f"message {message.number} was answered, and the edge has said so")
        if remembered.checksum != _checksum(message):
            raise ProtocolError(f"message {message.number} was another one when it first came")
        return remembered.answer


def _checksum(message: pb.EdgeMessage) -> int:
    """Of all that a message asks for. Who forges one fools nobody but its own session, so a quick one is enough."""
    checksum = 0
    for field, value in message.ListFields():
        if field.name not in _OF_THE_SENDING:
            for part in value if isinstance(value, Sequence) else [value]:
                # A map has no order.
                is_message = isinstance(part, Message)
                data = part.SerializeToString(deterministic=True) if is_message else repr(part).encode()
                checksum = zlib.crc32(data, zlib.crc32(b"%d %d " % (field.number, len(data)), checksum))
    return checksum
