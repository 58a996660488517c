"""What goes through a link beside messages: files for the cloud, and answers on their way."""

from __future__ import annotations

import threading
import time
from typing import Callable, Iterator, NamedTuple, Optional

from sft.errors import CloudMemoryError, LinkError, SessionLostError
from sft.ledger import Traffic
from sft.printable import printable
from sft.tracing import NO_SPAN, Span
from sft.v1 import split_training_pb2 as pb


class Blob(NamedTuple):
    """A safetensors file that the cloud may ask for."""

    total_bytes: int
    chunks: Callable[[], Iterator[bytes]]
    """Its bytes from the start; called in another thread, and only when the cloud has no such file."""


class Reply(NamedTuple):
    """An answer of the cloud and what it cost."""

    message: pb.CloudMessage
    traffic: Traffic
    """Of the question, with what rode on it, and of the answer; each once, however often they were sent."""
    round_trip_seconds: float
    """From handing the question to the stream until the answer was here, queueing included."""
    waited_seconds: float
    """The part of it that the caller of `result` spent waiting."""
    cloud_seconds: float
    """The part of it that the cloud says it needed."""


class PendingReply:
    """An answer on its way."""

    def __init__(
        self, sent: Traffic, timeout_seconds: float, is_late: Callable[[], None], span: Span = NO_SPAN
    ) -> None:
        """`is_late` is told each time that so many seconds have passed without the answer; `span` ends with it."""
        self._sent = sent
        self._timeout_seconds = timeout_seconds
        self._is_late = is_late
        self._span = span
        self._asked = time.perf_counter()
        self._answered = self._asked
        self._settled = threading.Event()
        self._message: Optional[pb.CloudMessage] = None
        self._received = Traffic()
        self._error: Optional[LinkError] = None

    def wait(self) -> None:
        """Returns when the answer is here, or none will come."""
        while not self._settled.wait(self._timeout_seconds):
            self._is_late()

    def result(self) -> Reply:
        """Waits for the answer. Raises the link's error, and CloudMemoryError when the cloud has undone the step."""
        began = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - began
        if self._message is None:
            raise self._error or SessionLostError("the link is closed")
        if self._message.HasField("step_skipped"):
            raise CloudMemoryError(printable(self._message.step_skipped.reason))
        return Reply(
            message=self._message,
            traffic=self._sent + self._received,
            round_trip_seconds=self._answered - self._asked,
            waited_seconds=waited,
            cloud_seconds=self._message.cloud_seconds,
        )

    def resolve(self, message: pb.CloudMessage, received: Traffic) -> None:
        """Called once, by the link: here is the answer."""
        self._message, self._received, self._answered = message, received, time.perf_counter()
        self._span.end()
        self._settled.set()

    def fail(self, error: LinkError) -> None:
        """Called once, by the link: no answer will come."""
        self._error = error
        self._span.end(type(error).__name__)
        self._settled.set()
