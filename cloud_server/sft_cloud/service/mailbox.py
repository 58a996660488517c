"""What an edge has left for its session to do while it is away."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import DecodeError

from sft.errors import ProtocolError
from sft.v1 import split_training_pb2 as pb

_BODIES = ("forward", "evaluate", None)


class Mailbox:
    """What an edge has left to do, in order. Not for several threads at once."""

    def __init__(self, message: pb.EdgeMessage, release: Callable[[], None] = lambda: None) -> None:
        """Of a message with a Detach; `release` is called once, when nothing is left. Raises ProtocolError."""
        self._messages = list(message.detach.messages)
        self._first = message.number + 1
        self._release = release
        if not self._messages:
            raise ProtocolError("a detach leaves nothing to do")
        for number in range(self._first, self.last + 1):
            _check(self._parsed(number), number)

    @property
    def last(self) -> int:
        """The number of the last message."""
        return self._first + len(self._messages) - 1

    def after(self, number: int) -> pb.EdgeMessage | None:
        """The message that comes after that of this number; None where all are done."""
        return self._parsed(number + 1) if self._first <= number + 1 <= self.last else None

    def close(self) -> None:
        """Nobody needs it any more."""
        self._messages.clear()
        release, self._release = self._release, lambda: None
        release()

    def _parsed(self, number: int) -> pb.EdgeMessage:
        try:
            return pb.EdgeMessage.FromString(self._messages[number - self._first])
        except DecodeError:
            raise ProtocolError(f"what a detach holds as message {number} is none") from None


def _check(message: pb.EdgeMessage, number: int) -> None:
    if message.number != number:
        raise ProtocolError(f"a detach holds message {message.number} where {number} is next")
    body = message.WhichOneof("body")
    if body not in _BODIES:
        raise ProtocolError(f"a detach holds a {body}, which needs its edge")
    if not message.ahead:
        raise ProtocolError(f"a detach holds message {number}, which is not ahead")
    if body == "forward" and not (message.forward.HasField("labels") and message.forward.loss_scale):
        raise ProtocolError("a detach holds a forward without labels, or without their weight: it needs its edge")
