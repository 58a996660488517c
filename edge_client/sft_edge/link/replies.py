"""What goes through a link beside messages: files for the cloud, and answers on their way."""

from __future__ import annotations

import threading
import time
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from sft.errors import CloudMemoryError, LinkError, ProtocolError, SessionLostError
from sft.printable import said
from sft.tracing import NO_SPAN, Span
from sft.v1 import split_training_pb2 as pb
from sft.wire.ledger import Traffic


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

    @property
    def traffic(self) -> Traffic:
        """Of the message and, once it is here, its answer."""
        return self._sent + self._received

    def result(self) -> Reply:
        """Waits for the answer. Raises the link's error, and CloudMemoryError when the cloud has undone the step."""
        began = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - began
        if self._message is None:
            raise self._error or SessionLostError("the link is closed")
        if self._message.HasField("step_skipped"):
            raise CloudMemoryError(said(self._message.step_skipped.reason))
        return Reply(
            message=self._message,
            traffic=self.traffic,
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


class Sent(NamedTuple):
    """A message on its way."""

    kind: str
    """Of the answer it wants: the name of a body of CloudMessage."""
    step: int
    micro_batch: int
    data: bytes
    pending: PendingReply


class Unanswered:
    """By number, the oldest first. Not for several threads at once."""

    def __init__(self) -> None:
        self.next_number = 1
        """Of the message that is sent next."""
        self.left_from = self.left_to = 0
        """Messages above the one number, up to the other, the cloud has as an edge has left them: they are made again,
        and not sent, and their answers may come before that."""
        self._sent: Dict[int, Sent] = {}
        self._early: Dict[int, Tuple[pb.CloudMessage, Traffic]] = {}

    def __len__(self) -> int:
        return len(self._sent)

    @property
    def size(self) -> Tuple[int, int]:
        """Bytes of the messages, and of how many steps they are."""
        sent = self._sent.values()
        return sum(len(each.data) for each in sent), len({each.step for each in sent})

    @property
    def answered(self) -> int:
        """The answers to all messages up to this number are here, and need not be given again: those to what was left
        may have to be, to who comes back once more, until all are here."""
        return min(self._done, self.left_from) if self.makes_again else self._done

    @property
    def makes_again(self) -> bool:
        """Whether not all that was left is made again and answered."""
        return self._done < self.left_to

    @property
    def _done(self) -> int:
        return min(self._sent, default=self.next_number) - 1

    def is_left(self, number: int) -> bool:
        """Whether the cloud has the message of this number as it was left."""
        return self.left_from < number <= self.left_to

    def add(self, sent: Sent) -> None:
        """The message of number `next_number`. Raises ProtocolError for an early answer that is none to it."""
        number, self.next_number = self.next_number, self.next_number + 1
        self._sent[number] = sent
        if number in self._early:
            self.resolve(*self._early.pop(number))

    def give_up_left(self) -> None:
        """What was left, and is not answered yet, is of no account: the cloud takes none of its steps."""
        self.next_number = max(self.next_number, self.left_to + 1)
        self._sent = {number: sent for number, sent in self._sent.items() if number > self.left_to}
        self.left_from = self.left_to = 0
        self._early.clear()

    def stay(self) -> None:
        """The cloud does not take what was to be left."""
        self.left_from = self.left_to = 0
        self._early.clear()

    def oldest(self) -> PendingReply:
        """The answer that is due first; there is one."""
        return next(iter(self._sent.values())).pending

    def after(self, number: int) -> List[bytes]:
        """What the cloud has not had yet, when it has had all up to `number`. Raises ProtocolError for a number of no
        message, SessionLostError where it never heard that its edge left."""
        if number < self.left_from and self.left_from not in self._sent:
            raise SessionLostError("the cloud never heard that its edge left")
        if number > max(self.next_number - 1, self.left_to) or number < self.answered:
            raise ProtocolError(
                f"the cloud has had {number} messages of this session, and answered {self.answered} of "
                f"{self.next_number - 1}: it is not the one that it was"
            )
        return [sent.data for own, sent in self._sent.items() if own > number and not self.is_left(own)]

    def resolve(self, answer: pb.CloudMessage, received: Traffic) -> bool:
        """Hands an answer to who waits for it; False for one that came before.

        Raises ProtocolError for an answer to what was never asked, or of another kind.
        """
        sent = self._sent.get(answer.number)
        if sent is None:
            if 1 <= answer.number < self.next_number:
                return False
            if self.next_number <= answer.number <= self.left_to:
                is_new = answer.number not in self._early
                self._early[answer.number] = (answer, received)
                return is_new
            raise ProtocolError(f"the cloud answered message {answer.number}, which was never sent")
        kind = answer.WhichOneof("body")
        if kind not in (sent.kind, "step_skipped") or (answer.step, answer.micro_batch) != sent[1:3]:
            raise ProtocolError(
                f"the cloud answered what was not asked: {kind} for step {answer.step}, micro-batch "
                f"{answer.micro_batch}, to message {answer.number}"
            )
        del self._sent[answer.number]
        sent.pending.resolve(answer, received)
        return True

    def fail(self, error: LinkError) -> None:
        """No answer will come any more."""
        sent, self._sent = list(self._sent.values()), {}
        for each in sent:
            each.pending.fail(error)
