"""The edge's end of one session: messages go out through one queue, one thread reads the answers.

Nothing outside this file knows about threads. Both that are needed (the reader here, and the transport's own that takes
messages from the queue) start with the first message, after a DataLoader has forked the workers of the first epoch.
"""

from __future__ import annotations

import queue
import threading
import time
from types import TracebackType
from typing import Callable, Dict, Iterator, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

from google.protobuf.message import DecodeError

from sft.errors import LinkError, ProtocolError, SessionLostError
from sft.ledger import Traffic, framed_size
from sft.v1 import split_training_pb2 as pb
from sft_edge.transport import Stream, Transport

REPLY_TIMEOUT_SECONDS = 600.0
"""How long an answer may take. A link that breaks is noticed long before; this is for a cloud that hangs."""

CLOSE_TIMEOUT_SECONDS = 5.0
"""How long the cloud may take to end the stream before it is broken off."""

_Key = Tuple[str, int, int]  # kind of the answer, step, micro-batch


class Blob(NamedTuple):
    """A safetensors file that the cloud may ask for."""

    total_bytes: int
    chunks: Callable[[], Iterator[bytes]]
    """Its bytes from the start; called in another thread, and only when the cloud has no such file."""


class Reply(NamedTuple):
    """An answer of the cloud and what it cost."""

    message: pb.CloudMessage
    traffic: Traffic
    """Of the question, with the commit that rode on it, and of the answer."""
    round_trip_seconds: float
    """From handing the question to the stream until the answer was here, queueing included."""
    waited_seconds: float
    """The part of it that the caller of `result` spent waiting."""
    cloud_seconds: float
    """The part of it that the cloud says it needed."""


class PendingReply:
    """An answer on its way."""

    def __init__(self, sent: Traffic, timeout_seconds: float, give_up: Callable[[LinkError], None]) -> None:
        self._sent = sent
        self._timeout_seconds = timeout_seconds
        self._give_up = give_up
        self._asked = time.perf_counter()
        self._answered = self._asked
        self._settled = threading.Event()
        self._message: Optional[pb.CloudMessage] = None
        self._received = Traffic()
        self._error: Optional[LinkError] = None

    def result(self) -> Reply:
        """Waits for the answer. Raises the stream's error, and SessionLostError when none came in time."""
        began = time.perf_counter()
        if not self._settled.wait(self._timeout_seconds):
            self._give_up(SessionLostError(f"the cloud did not answer within {self._timeout_seconds:g} s"))
        waited = time.perf_counter() - began
        if self._message is None:
            raise self._error or SessionLostError("the link is closed")
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
        self._settled.set()

    def fail(self, error: LinkError) -> None:
        """Called once, by the link: no answer will come."""
        self._error = error
        self._settled.set()


class Link:
    """One session on the cloud, from `open` to `close`; a context manager.

    Steps are sent in order and answered in order. Once a call has raised a LinkError the session is over, and later
    calls raise the same. Not for several threads at once.
    """

    def __init__(
        self,
        transport: Transport,
        request: pb.OpenSessionRequest,
        blobs: Mapping[str, Blob],
        reply_timeout_seconds: float = REPLY_TIMEOUT_SECONDS,
    ) -> None:
        """`blobs` are what `request` names by SHA-256; the transport is closed with the link."""
        self._transport = transport
        self._request = request
        self._blobs = blobs
        self._reply_timeout_seconds = reply_timeout_seconds
        self._session_id = ""
        self._held: Optional[pb.Commit] = None
        self._outgoing: queue.SimpleQueue[Optional[bytes]] = queue.SimpleQueue()  # None ends the stream
        self._stream: Optional[Stream] = None
        self._reader: Optional[threading.Thread] = None
        self._lock = threading.Lock()  # guards what follows
        self._waiting: Dict[_Key, PendingReply] = {}
        self._failure: Optional[LinkError] = None
        self._total = Traffic()

    @property
    def total(self) -> Traffic:
        """Of everything on the stream so far: of all replies, and of what no reply counts, such as attaching."""
        with self._lock:
            return self._total

    def open(self) -> pb.OpenSessionResponse:
        """Opens the session and uploads what the cloud lacks.

        Raises what Transport.open_session and upload raise; the link is closed then.
        """
        try:
            response = self._open()
        except BaseException:  # Ctrl-C during an upload too
            self.close()
            raise
        self._session_id = response.session_id
        return response

    def _open(self) -> pb.OpenSessionResponse:
        response = self._transport.open_session(self._request)
        if response.missing_blobs:
            for sha256 in response.missing_blobs:
                if sha256 not in self._blobs:
                    raise ProtocolError(f"the cloud asks for a blob that was never offered: {sha256[:64]}")
                blob = self._blobs[sha256]
                self._transport.upload(sha256, blob.total_bytes, blob.chunks())
            response = self._transport.open_session(self._request)
        if response.missing_blobs or not response.session_id:
            raise ProtocolError("the cloud neither opened a session nor said what it lacks")
        return response

    def forward(
        self, step: int, micro_batch: int, activation: pb.Activation, labels: pb.Labels, loss_scale: float
    ) -> PendingReply:
        """Algorithm 1, lines 6 to 11, for one micro-batch; a held commit rides along. The reply holds a `Result`.

        Returns at once: several micro-batches may be on their way.
        """
        message = pb.EdgeMessage(step=step, micro_batch=micro_batch, commit=self._held)
        # Filled in place: every message given to a constructor is copied, and an activation may be megabytes.
        message.forward.activation.CopyFrom(activation)
        message.forward.labels.CopyFrom(labels)
        message.forward.loss_scale = loss_scale
        pending = self._send("result", message, payload_bytes=len(activation.packed.data))
        self._held = None  # only now: lost to a Ctrl-C it would be lost for good, sent twice it is applied once
        return pending

    def evaluate(self, step: int, batch_index: int, activation: pb.Activation) -> PendingReply:
        """Logits of one evaluation batch, after a held commit. The reply holds an `Evaluation`. Returns at once."""
        self.flush()
        message = pb.EdgeMessage(step=step, micro_batch=batch_index)
        message.evaluate.activation.CopyFrom(activation)
        return self._send("evaluation", message, payload_bytes=len(activation.packed.data))

    def commit(self, step: int, learning_rates: Sequence[float], clip_scale: float) -> None:
        """Algorithm 1, line 14, for net_2. Held back until the next `forward`, `evaluate`, `weights` or `flush`."""
        self.flush()
        self._raise_failure()
        self._held = pb.Commit(step=step, learning_rates=learning_rates, clip_scale=clip_scale)

    def flush(self) -> Optional[Reply]:
        """Sends a held commit and waits until it is applied: the reply holds `Committed`. None when none was held."""
        if self._held is None:
            return None
        message = pb.EdgeMessage(step=self._held.step, commit=self._held)
        pending = self._send("committed", message, payload_bytes=0)
        self._held = None
        return pending.result()

    def weights(self) -> Iterator[bytes]:
        """Net_2's parameters after every commit so far: the bytes of one safetensors file, in chunks."""
        self.flush()
        with self._lock:
            waiting = list(self._waiting.values())
        for pending in waiting:  # a commit may ride on a message whose answer nobody waited for, as after Ctrl-C
            pending.result()
        self._raise_failure()
        return self._transport.download(self._session_id)

    def close(self) -> None:
        """Ends the session and closes the transport; no thread is left. A held commit is dropped. Idempotent."""
        if self._session_id and self._reader is None and self._failure is None:
            self._start()  # the cloud keeps a session for its stream; a stream that ends frees it
        self._outgoing.put(None)
        if self._stream is not None and self._reader is not None:
            self._reader.join(CLOSE_TIMEOUT_SECONDS)
            self._stream.cancel()
            self._reader.join()
        self._fail(SessionLostError("the link is closed"))
        self._transport.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        if error is not None and self._stream is not None:
            self._stream.cancel()  # whatever is under way, nobody waits for it
        self.close()

    def _send(self, kind: str, message: pb.EdgeMessage, payload_bytes: int) -> PendingReply:
        """Queues a message that the cloud answers with a `kind` for the same step and micro-batch."""
        self._raise_failure()
        if self._reader is None:
            self._start()
        return self._enqueue(kind, message, payload_bytes)

    def _start(self) -> None:
        self._enqueue("attached", pb.EdgeMessage(attach=pb.Attach(session_id=self._session_id)), payload_bytes=0)
        stream = self._stream = self._transport.stream(iter(self._outgoing.get, None))
        self._reader = threading.Thread(target=self._read, args=(stream,), name="sft-link-reader", daemon=True)
        self._reader.start()

    def _enqueue(self, kind: str, message: pb.EdgeMessage, payload_bytes: int) -> PendingReply:
        data = message.SerializeToString()
        sent = Traffic(payload_bytes_sent=payload_bytes, bytes_sent=framed_size(len(data)))
        pending = PendingReply(sent, self._reply_timeout_seconds, self._give_up)
        key = (kind, message.step, message.micro_batch)
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if key in self._waiting:
                raise ProtocolError(f"step {key[1]}, micro-batch {key[2]} was sent twice")
            self._waiting[key] = pending
            self._total += sent
        self._outgoing.put(data)
        return pending

    def _read(self, stream: Stream) -> None:
        """The reader thread: until the stream ends, for whatever reason."""
        error: LinkError = SessionLostError("reading the cloud's answers failed")
        try:
            for data in stream:
                self._resolve(data)
            error = SessionLostError("the cloud ended the session before the run did")
        except LinkError as stream_error:
            error = stream_error
        finally:
            stream.cancel()
            self._fail(error)

    def _resolve(self, data: bytes) -> None:
        try:
            message = pb.CloudMessage.FromString(data)
        except DecodeError as error:
            raise ProtocolError("the cloud sent something that is not an answer") from error
        kind = message.WhichOneof("body")
        received = Traffic(payload_bytes_received=_payload_bytes(message), bytes_received=framed_size(len(data)))
        with self._lock:
            pending = self._waiting.pop((str(kind), message.step, message.micro_batch), None)
            self._total += received
        if pending is None:
            raise ProtocolError(f"the cloud answered what was not asked: {kind} for step {message.step}")
        pending.resolve(message, received)

    def _give_up(self, error: LinkError) -> None:
        self._fail(error)
        if self._stream is not None:
            self._stream.cancel()

    def _fail(self, error: LinkError) -> None:
        """The session is over: the first error counts, every pending reply gets it."""
        with self._lock:
            self._failure = self._failure or error
            waiting, self._waiting = list(self._waiting.values()), {}
        for pending in waiting:
            pending.fail(self._failure)
        self._outgoing.put(None)  # ends the thread of the transport that takes messages

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if not self._session_id:
            raise SessionLostError("the link is not open")


def _payload_bytes(message: pb.CloudMessage) -> int:
    """Bytes of the gradient or of the logits."""
    return len(message.result.packed_gradient.data) + len(message.evaluation.logits.data)
