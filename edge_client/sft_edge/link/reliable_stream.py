"""Questions and answers over streams that may break: what was not answered is sent again over the next.

    link ----> Unanswered ----> queue of the stream that is open now ----> transport
                    ^                                                          |
    who waits <-----+------------------- reader thread <-----------------------+

The two threads that are needed (the reader here, and the transport's own that takes messages from the queue) start with
the first message, after a DataLoader has forked the workers of the first epoch. docs/protocol.md has the rules.
"""

from __future__ import annotations

import logging
import queue
import threading
from contextlib import suppress
from typing import Callable, List, Optional

from google.protobuf.message import DecodeError

from sft.errors import (
    CloudMemoryError,
    LinkError,
    ProtocolError,
    ServerFullError,
    ServerUnavailableError,
    SessionLostError,
    StaleAccessError,
    StreamBrokenError,
)
from sft.tracing import NO_SPAN, Span
from sft.v1 import split_training_pb2 as pb
from sft.wire.ledger import Traffic, framed_size
from sft.wire.parts import sent_size
from sft.wire.protocol import MAX_MESSAGE_BYTES, MAX_UNANSWERED
from sft_edge.link.answers import check_answer
from sft_edge.link.cuts import Cuts
from sft_edge.link.left import Digest, Left
from sft_edge.link.replies import PendingReply, Sent, Unanswered
from sft_edge.link.retries import Retries, RetryPolicy, Wake
from sft_edge.link.transport import Stream, Transport

CLOSE_TIMEOUT_SECONDS = 5.0
"""How long the cloud may take to end the stream before it is broken off."""

BREAK_TIMEOUT_SECONDS = 1.0
"""The same after an error, or Ctrl-C: somebody wants to be gone."""

_JOIN_SECONDS = 0.1

_MOST_LEFT = 100_000
"""Messages; a server looks through no more fields of one than that, and somewhat."""

TRANSIENT = (StreamBrokenError, ServerUnavailableError, ServerFullError, StaleAccessError)
"""After these another stream may go on."""

_log = logging.getLogger(__name__)

_CLOSE = pb.EdgeMessage(close=pb.Close()).SerializeToString()

_Queue = queue.SimpleQueue  # of serialized messages; None ends a stream


class Counts:
    """What it took to keep a session going."""

    def __init__(self) -> None:
        self.reconnects = 0
        """Streams that were opened in the place of one that broke."""
        self.sent_again = 0
        """Messages."""
        self.came_twice = 0
        """Answers."""


class ReliableStream:
    """The messages of one session. Once a call has raised a LinkError the session is over, and later calls raise the
    same. Not for several threads at once."""

    def __init__(self, transport: Transport, policy: RetryPolicy, on_status: Callable[[str], None]) -> None:
        self.counts = Counts()
        self.stopping = False
        """Whether the server has said that it stops soon."""
        self.keeps_only: Optional[int] = None
        """See Link."""
        self.wake: Wake[None] = queue.SimpleQueue()
        self._transport = transport
        self._policy = policy
        self._on_status = on_status
        self._retries = Retries(policy, self.wake, self._say)
        self._session_id = ""
        self._is_over = False
        self._digest = Digest()  # of what is left, or made again
        self._left_sha256 = ""
        self._collected: Optional[List[bytes]] = None  # instead of being sent
        self._collected_bytes = 0
        self._outgoing: _Queue[Optional[bytes]] = queue.SimpleQueue()
        self._stream: Optional[Stream] = None
        self._reader: Optional[threading.Thread] = None
        self._watch = threading.Timer(0.0, lambda: None)  # for the answer to the attach of the stream that is open now
        self._why: Optional[LinkError] = None  # the stream was broken off here
        self._cuts = Cuts()
        self._is_attached = False  # the stream that is open now
        self._opened_at = 0.0  # the stream that is open now
        self._lock = threading.Lock()  # guards what follows
        self._sent_bytes = 0  # by that stream
        self._unanswered = Unanswered()
        self._flows = False  # whether messages go to the stream, or wait for the next
        self._failure: Optional[LinkError] = None
        self._total = Traffic()

    @property
    def total(self) -> Traffic:
        """Of everything on streams so far: of all replies, of what no reply counts, such as attaching, and of what was
        sent more than once."""
        with self._lock:
            return self._total

    def begin(self, session_id: str, left: Optional[Left] = None) -> None:
        """From now on messages may be sent. `left`: as an edge has left the session, whose messages are found out
        again; until that is done the session stays when the link is closed.
        """
        self._session_id = session_id
        if left is not None:
            self._unanswered.next_number = left.number + 1
            self._unanswered.left_from, self._unanswered.left_to = left.number, left.last
            self._left_sha256 = left.sha256

    def collect(self) -> None:
        """From now on messages are put aside, for `leave`."""
        self._collected, self._collected_bytes, self._digest = [], 0, Digest()

    def drop_collected(self) -> None:
        """As if none of them had been made."""
        self._collected = None

    def leave(self, message: pb.EdgeMessage, announce: Callable[[Left], None]) -> PendingReply:
        """Sends `message` with all that was put aside in it; `announce` is told before, and may raise. From now on the
        session stays when the link is closed, until `stay`.
        """
        collected, self._collected = self._collected or [], None
        message.detach.messages.extend(collected)
        number = self._unanswered.next_number
        announce(Left(self._session_id, number, number + len(collected), self._digest.hexdigest()))
        with self._lock:
            self._unanswered.left_from, self._unanswered.left_to = number, number + len(collected)
        return self.send("detached", message, payload_bytes=0)

    def stay(self) -> None:
        """The cloud does not take what was left to it, and has done nothing of it."""
        with self._lock:
            self._unanswered.stay()

    @property
    def makes_again(self) -> bool:
        """Whether messages are those that an edge has left, or will be; the session then stays when the link is
        closed."""
        return self._unanswered.makes_again

    def give_up_left(self) -> None:
        """The cloud takes no step of what was left and is not answered."""
        with self._lock:
            self._unanswered.give_up_left()

    def check(self) -> None:
        """Raises what ended the session, if it is known to have ended."""
        if self._failure is not None:
            raise self._failure
        if not self._session_id:
            raise SessionLostError("the link is not open")

    def send(self, kind: str, message: pb.EdgeMessage, payload_bytes: int, span: Span = NO_SPAN) -> PendingReply:
        """Sends a message that the cloud answers with a `kind` for the same step and micro-batch. Returns at once.

        To be called after `make_room`. `span` ends with the answer.
        """
        self.check()
        if self._reader is None:
            self._start()
        with self._lock:
            if self._failure is not None:
                raise self._failure
            message.number, message.answered = self._unanswered.next_number, self._unanswered.answered
            if self._collected is not None:
                message.number += 1 + len(self._collected)  # one is for the message that they are in
                self._digest.add(message)
                self._collected.append(message.SerializeToString())
                self._collected_bytes += len(self._collected[-1])
                if self._collected_bytes > MAX_MESSAGE_BYTES // 2 or len(self._collected) > _MOST_LEFT:
                    raise CloudMemoryError("what is left to do takes more than a message may hold")
                return PendingReply(Traffic(), self._policy.reply_timeout_seconds, self._break_off, span)
            if self._unanswered.is_left(message.number):
                self._check_left(message)
            data = message.SerializeToString()
            sent = Traffic(payload_bytes_sent=payload_bytes, bytes_sent=sent_size(len(data)))
            pending = PendingReply(sent, self._policy.reply_timeout_seconds, self._break_off, span)
            self._unanswered.add(Sent(kind, message.step, message.micro_batch, data, pending))
            self._total += sent
            if self._flows and not self._unanswered.is_left(message.number):
                self._outgoing.put(data)
                self._sent_bytes += len(data)
        return pending

    def _check_left(self, message: pb.EdgeMessage) -> None:
        self._digest.add(message)
        if message.number == self._unanswered.left_to and self._digest.hexdigest() != self._left_sha256:
            raise ProtocolError(
                "what was left to the cloud is not what is made again here: other rows, or other options"
            )

    def make_room(self) -> None:
        """Waits while so many answers are due that the cloud would remember no more."""
        while self._collected is None:
            oldest = self._oldest(MAX_UNANSWERED)
            if oldest is None:
                return
            oldest.wait()

    def settle(self) -> None:
        """Waits until everything that was sent is answered."""
        for oldest in iter(lambda: self._oldest(1), None):
            oldest.wait()
        self.check()

    def _oldest(self, at_least: int) -> Optional[PendingReply]:
        """The answer that is due first, where so many are."""
        with self._lock:
            return self._unanswered.oldest() if len(self._unanswered) >= at_least else None

    def abandon(self) -> None:
        """Ends the session without waiting for anything. For finalizers: it takes no lock and starts no thread."""
        self._is_over = True
        if not self.makes_again:
            self._outgoing.put(_CLOSE)
        self._outgoing.put(None)
        self.wake.put(None)

    def hurry(self) -> None:
        """From now on a link that breaks is not tried for long, and one that is broken is given up."""
        self._retries.timeout_seconds = min(self._retries.timeout_seconds, CLOSE_TIMEOUT_SECONDS)
        if self._reader is not None and not self._flows:
            self.wake.put(None)

    def close(self, timeout_seconds: Optional[float] = None) -> None:
        """Ends the session; no thread is left. Idempotent."""
        if self._session_id and self._reader is None and self._failure is None:
            self._start()  # or the cloud would keep the session for a stream to come
        self.abandon()
        if self._reader is not None:
            if self._flows:
                self._reader.join(CLOSE_TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds)
            while self._reader.is_alive():
                self._transport.close()  # or a call beside the stream would have to end first
                if self._stream is not None:
                    self._stream.cancel()  # which may have become another one since
                self._reader.join(_JOIN_SECONDS)
        self._fail(SessionLostError("the link is closed"))

    def _start(self) -> None:
        # A session that is new has had no message: they need not wait until it says so.
        stream = self._open_stream(flows=not self._unanswered.left_to)
        self._reader = threading.Thread(target=self._run, args=(stream,), name="sft-link-reader", daemon=True)
        self._reader.start()

    def _open_stream(self, flows: bool) -> Stream:
        outgoing: _Queue[Optional[bytes]] = queue.SimpleQueue()
        with self._lock:
            attach = pb.EdgeMessage(attach=pb.Attach(session_id=self._session_id), answered=self._unanswered.answered)
            data = attach.SerializeToString()
            outgoing.put(data)
            self._total += Traffic(bytes_sent=framed_size(len(data)))
            self._outgoing, self._flows = outgoing, flows
            self._sent_bytes, self._opened_at = len(data), self._policy.clock()
            again = self._unanswered.size
        if not flows:
            self._transport.check_again(*again)
        self._is_attached = False
        stream = self._stream = self._transport.stream(iter(outgoing.get, None))
        self._watch = threading.Timer(self._policy.attach_timeout_seconds, self._not_attached, [stream])
        self._watch.daemon = True
        self._watch.start()
        if self._is_over:  # since before the queue was this one
            self.abandon()
        return self._stream

    def _not_attached(self, stream: Stream) -> None:
        """Who took the connection says nothing: a server that is being stopped or started may leave it so for ever."""
        if self._stream is stream:
            seconds = self._policy.attach_timeout_seconds
            self._why = StreamBrokenError(f"the cloud took the connection, and said nothing for {seconds:g} s")
        stream.cancel()

    def _run(self, stream: Stream) -> None:
        """The reader thread: until there is no going on."""
        error: LinkError = SessionLostError("reading the cloud's answers failed")
        try:
            while True:
                broken = self._read(stream)
                if self._is_over:
                    error = SessionLostError("the link is closed")
                    break
                if isinstance(broken, StreamBrokenError) and not self._is_attached:
                    self._transport.check_session(self._session_id)
                alike = self._cuts.note(self._sent_bytes, self._policy.clock() - self._opened_at)
                if alike and self._retries.tries:
                    self._transport.check_carries(self._sent_bytes)
                if alike:
                    _log.warning("%s", alike)
                self._retries.after(broken)
                self.counts.reconnects += 1
                self._transport.renew()
                stream = self._open_stream(flows=False)
        except LinkError as fatal:
            error = fatal
        finally:
            self._watch.cancel()
            stream.cancel()
            self._fail(error)

    def _read(self, stream: Stream) -> LinkError:
        """Until the stream breaks: returns why. Raises what no other stream would mend."""
        self._why = None
        try:
            for data in stream:
                self._take(data)
            broken: LinkError = StreamBrokenError("the cloud ended the stream before the run did")
        except TRANSIENT as error:
            broken = error
        self._watch.cancel()
        with self._lock:
            self._flows = False
            self._outgoing.put(None)  # ends the thread of the transport that takes messages
        stream.cancel()
        return self._why or broken

    def _take(self, data: bytes) -> None:
        try:
            message = pb.CloudMessage.FromString(data)
        except DecodeError as error:
            raise ProtocolError("the cloud sent something that is not an answer") from error
        check_answer(message)
        self.stopping = message.stopping
        if message.HasField("keeps_only"):
            known = message.keeps_only if self.keeps_only is None else self.keeps_only
            self.keeps_only = min(message.keeps_only, known)
        received = Traffic(payload_bytes_received=_payload_bytes(message), bytes_received=framed_size(len(data)))
        if message.HasField("attached"):
            self._is_attached = True
            self._watch.cancel()
        with self._lock:
            self._total += received
            if message.HasField("attached"):
                self._send_again(message.attached.last_number)
                is_whole, came_twice = not len(self._unanswered), False
            else:
                is_whole = self._unanswered.resolve(message, received)
                came_twice = not is_whole
        self.counts.came_twice += came_twice
        if is_whole:  # what was missing is here, or nothing is
            self._retries.reset()

    def _send_again(self, last_number: int) -> None:
        missing = self._unanswered.after(last_number)
        if self._flows:
            return  # the first stream of the session: they are on their way
        for data in missing:
            self._outgoing.put(data)
            self._sent_bytes += len(data)
            self._total += Traffic(bytes_sent=sent_size(len(data)))
        self.counts.sent_again += len(missing)
        self._flows = True

    def _say(self, text: str) -> None:
        with suppress(OSError):  # a terminal that has gone is no reason to lose a session
            self._on_status(text)

    def _break_off(self) -> None:
        """An answer is late: whatever holds it up, another stream may get it."""
        seconds = self._policy.reply_timeout_seconds
        if self._transport.has_held(seconds):
            return
        self._why = StreamBrokenError(f"the cloud did not answer within {seconds:g} s")
        if self._stream is not None:
            self._stream.cancel()

    def _fail(self, error: LinkError) -> None:
        """The session is over: the first error counts, every pending reply gets it."""
        with self._lock:
            self._failure = self._failure or error
            self._flows = False
            self._unanswered.fail(self._failure)
        self._outgoing.put(None)


def _payload_bytes(message: pb.CloudMessage) -> int:
    """Bytes of the gradient, of the logits, or of both; a body that is not there has none."""
    logits = (message.result.logits, message.outputs.logits, message.evaluation.logits)
    return len(message.result.packed_gradient.data) + sum(len(each.data) for each in logits)
