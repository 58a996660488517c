"""What an edge has left for its session to do while it is away."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import DecodeError

from sft.errors import ProtocolError
from sft.v1 import split_training_pb2 as pb

_BODIES = ("forward", "evaluate", None)


class Mailbox:
    """What an edge has left to do, in order. Safe to use from several threads."""

    def __init__(
        self,
        message: pb.EdgeMessage,
        check_form: Callable[[bytes], object] = lambda data: None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """Of a message with a Detach; `check_form` looks at each before it is parsed, `release` is called when nobody
        needs them any more. Raises ProtocolError.
        """
        self._messages = list(message.detach.messages)
        self._first = message.number + 1
        self._release = release
        if not self._messages:
            raise ProtocolError("a detach leaves nothing to do")
        for number, data in enumerate(self._messages, self._first):
            check_form(data)
            _check(_parsed(data, number), number)

    @property
    def last(self) -> int:
        """The number of the last message."""
        return self._first + len(self._messages) - 1

    def after(self, number: int) -> pb.EdgeMessage | None:
        """The message that comes after that of this number; None where all are done."""
        messages, place = self._messages, number + 1 - self._first  # as they are now: another thread may close it
        return _parsed(messages[place], number + 1) if 0 <= place < len(messages) else None

    def is_done(self, number: int) -> bool:
        """Whether nothing comes after that of this number."""
        return not self._first <= number + 1 <= self.last

    def close(self) -> None:
        """Nobody needs it any more: nothing comes after any."""
        self._messages = []
        self._release()


def _parsed(data: bytes, number: int) -> pb.EdgeMessage:
    try:
        return pb.EdgeMessage.FromString(data)
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
