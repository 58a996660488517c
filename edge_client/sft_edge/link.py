"""The edge's end of one session: messages go out through one queue, one thread reads the answers.

Nothing outside this file knows about threads. Both that are needed (the reader here, and the transport's own that takes
messages from the queue) start with the first message, after a DataLoader has forked the workers of the first epoch.
"""

from __future__ import annotations

import queue
import threading
from types import TracebackType
from typing import Dict, Iterator, Mapping, Optional, Sequence, Tuple, Type

from google.protobuf.message import DecodeError

from sft.errors import LinkError, ProtocolError, SessionLostError
from sft.ledger import Traffic, framed_size
from sft.v1 import split_training_pb2 as pb
from sft_edge.replies import Blob, PendingReply, Reply
from sft_edge.transport import Stream, Transport

__all__ = ["Blob", "Link", "PendingReply", "Reply"]

REPLY_TIMEOUT_SECONDS = 600.0
"""How long an answer may take. A link that breaks is noticed long before; this is for a cloud that hangs."""

CLOSE_TIMEOUT_SECONDS = 5.0
"""How long the cloud may take to end the stream before it is broken off."""

_Key = Tuple[str, int, int]  # kind of the answer, step, micro-batch


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
        self._held = pb.EdgeMessage()  # weights, commit and gradient_scale of the next message
        self._step = 0  # that weights and gradients belong to now
        self._without_body = 0  # messages of that step
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
        self._blobs = {}  # what they read from may be half a model, and whoever offered it may have let go of it
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
        self,
        step: int,
        micro_batch: int,
        activation: pb.Activation,
        labels: Optional[pb.Labels],
        loss_scale: float,
        *,
        eval_mode: bool = False,
        want_logits: bool = False,
        frozen_edge: bool = False,
        autocast: pb.DataType = pb.DATA_TYPE_UNSPECIFIED,
    ) -> PendingReply:
        """Algorithm 1, lines 6 to 11, for one micro-batch; what is held rides along.

        With labels the reply holds a `Result`, see `pb.Forward` for what `loss_scale` 0 means. Without labels it holds
        `Outputs`, and the cloud waits for `backward`. Returns at once: several micro-batches may be on their way.
        """
        message = self._with_held(step, micro_batch)
        # Filled in place: every message given to a constructor is copied, and an activation may be megabytes.
        message.forward.activation.CopyFrom(activation)
        if labels is not None:
            message.forward.labels.CopyFrom(labels)
        message.forward.loss_scale = loss_scale
        message.forward.eval_mode = eval_mode
        message.forward.want_logits = want_logits
        message.forward.frozen_edge = frozen_edge
        message.forward.autocast = autocast
        kind = "outputs" if labels is None else "result"
        return self._send_with_held(kind, message, payload_bytes=len(activation.packed.data))

    def backward(self, step: int, micro_batch: int, gradient: pb.Tensor) -> PendingReply:
        """The second half of a `forward` without labels: `gradient` is that of the loss by the outputs it gave.

        What is held rides along. The reply holds a `Result`. Returns at once.
        """
        message = self._with_held(step, micro_batch)
        message.backward.gradient.CopyFrom(gradient)
        return self._send_with_held("result", message, payload_bytes=len(gradient.data))

    def evaluate(
        self,
        step: int,
        batch_index: int,
        activation: pb.Activation,
        autocast: pb.DataType = pb.DATA_TYPE_UNSPECIFIED,
    ) -> PendingReply:
        """Logits of one evaluation batch, after a held commit. The reply holds an `Evaluation`. Returns at once."""
        if self._held.HasField("commit"):
            self.flush()
        message = pb.EdgeMessage(step=step, micro_batch=batch_index)
        message.evaluate.activation.CopyFrom(activation)
        message.evaluate.autocast = autocast
        return self._send("evaluation", message, payload_bytes=len(activation.packed.data))

    def weigh(self, micro_batch: int, weight: float) -> None:
        """Says what the gradients of a `forward` with `loss_scale` 0 count in the step that is being accumulated.

        Held back like a commit.
        """
        self._hold_weight(pb.Weight(micro_batch=micro_batch, weight=weight))

    def drop(self, micro_batch: int) -> None:
        """Lets go of a `forward`, without labels or with `loss_scale` 0, that nobody will go backward through.

        Held back like a commit.
        """
        self._hold_weight(pb.Weight(micro_batch=micro_batch, dropped=True))

    def scale_gradients(self, scale: float) -> None:
        """Multiplies what the cloud has added up of net_2's gradients, after a held commit; 0 forgets them. Held back.

        Several before one message multiply.
        """
        self._raise_failure()
        before = self._held.gradient_scale if self._held.HasField("gradient_scale") else 1.0
        self._held.gradient_scale = before * scale

    def commit(
        self,
        step: int,
        learning_rates: Sequence[float],
        clip_scale: float,
        group_arguments: Sequence[pb.GroupArguments] = (),
    ) -> None:
        """Algorithm 1, line 14, for net_2. Held back until the next message; weights that are held go with it."""
        self._raise_failure()
        if self._held.HasField("commit") or self._held.HasField("gradient_scale"):
            self.flush()  # the scale is for gradients of this step, and in one message would come after the commit
        commit = pb.Commit(
            step=step, learning_rates=learning_rates, clip_scale=clip_scale, group_arguments=group_arguments
        )
        self._held.commit.CopyFrom(commit)

    def keep_gradients(self) -> None:
        """Net_2's gradients are not forgotten after the commit that is held. Raises ProtocolError when none is."""
        if not self._held.HasField("commit"):
            raise ProtocolError("no commit is held that could keep the gradients")
        self._held.commit.keep_gradients = True

    def flush(self) -> Optional[Reply]:
        """Sends what is held and waits until it is done: the reply holds `Committed`. None when nothing was held."""
        if not (self._held.weights or self._held.HasField("commit") or self._held.HasField("gradient_scale")):
            return None
        step = self._held.commit.step if self._held.HasField("commit") else self._step
        message = self._with_held(step, self._without_body)
        pending = self._send_with_held("committed", message, payload_bytes=0)
        self._without_body += 1
        return pending.result()

    def weights(self, optimizer_state: bool = False) -> Iterator[bytes]:
        """Net_2's parameters, or the state of its optimizer, after every commit so far.

        The bytes of one safetensors file, in chunks.
        """
        self._settle()
        return self._transport.download(self._session_id, optimizer_state)

    def load_state(self, blob: Blob, sha256: str, optimizer_state: bool) -> None:
        """Replaces net_2's parameters, or the state of its optimizer, by a file of the form that `weights` gives.

        `sha256` is that of its bytes. Returns when it is done. Gradients added so far stay. Raises ProtocolError while
        a `forward` waits for its weight or its `backward`, or when the file is not one of this net_2.
        """
        self._settle()
        self._transport.upload(sha256, blob.total_bytes, blob.chunks())
        message = pb.EdgeMessage(step=self._step, micro_batch=self._without_body)
        message.load_state.sha256 = sha256
        message.load_state.optimizer_state = optimizer_state
        self._without_body += 1
        self._send("committed", message, payload_bytes=0).result()

    def check(self) -> None:
        """Raises what ended the session, if it is known to have ended."""
        self._raise_failure()

    def abandon(self) -> None:
        """Ends the session without waiting for anything. For finalizers: it takes no lock and starts no thread."""
        self._outgoing.put(None)

    def close(self) -> None:
        """Ends the session and closes the transport; no thread is left. What is held is dropped. Idempotent."""
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

    def _settle(self) -> None:
        """Whatever was asked for so far has been done."""
        self.flush()
        with self._lock:
            waiting = list(self._waiting.values())
        for pending in waiting:  # a commit may ride on a message whose answer nobody waited for, as after Ctrl-C
            pending.result()
        self._raise_failure()

    def _hold_weight(self, weight: pb.Weight) -> None:
        self._raise_failure()
        if self._held.HasField("commit") or self._held.HasField("gradient_scale"):
            self.flush()  # in one message, both would come after the weight
        self._held.weights.append(weight)

    def _with_held(self, step: int, micro_batch: int) -> pb.EdgeMessage:
        message = pb.EdgeMessage()
        message.CopyFrom(self._held)
        message.step, message.micro_batch = step, micro_batch
        return message

    def _send_with_held(self, kind: str, message: pb.EdgeMessage, payload_bytes: int) -> PendingReply:
        pending = self._send(kind, message, payload_bytes)
        # Only now: lost to a Ctrl-C it would be lost for good, sent twice it is done once.
        self._held = pb.EdgeMessage()
        step = message.step + (message.HasField("commit") and message.WhichOneof("body") is None)
        if step != self._step:
            self._step, self._without_body = step, 0
        return pending

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
    """Bytes of the gradient, of the logits, or of both."""
    body = message.WhichOneof("body")
    if body == "result":
        return len(message.result.packed_gradient.data) + len(message.result.logits.data)
    if body == "outputs":
        return len(message.outputs.logits.data)
    return len(message.evaluation.logits.data) if body == "evaluation" else 0
