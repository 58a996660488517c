"""The edge's end of one session: what an edge can ask of the cloud, one method each."""

from __future__ import annotations

import secrets
from types import TracebackType
from typing import Callable, Iterator, Mapping, Optional, Sequence, Type

from sft.errors import CloudMemoryError, ProtocolError, StorageError
from sft.printable import said
from sft.v1 import split_training_pb2 as pb
from sft.wire.ledger import Traffic
from sft_edge.link.left import Left
from sft_edge.link.opening import Opening
from sft_edge.link.reliable_stream import BREAK_TIMEOUT_SECONDS, TRANSIENT, Counts, ReliableStream
from sft_edge.link.replies import Blob, PendingReply, Reply
from sft_edge.link.retries import Retries, RetryPolicy
from sft_edge.link.tracing import StepSpans, edge_tracer
from sft_edge.link.transport import Transport
from sft_edge.signals import interrupts_deferred

__all__ = ["Blob", "Left", "Link", "PendingReply", "Reply"]


class Link:
    """One session on the cloud, from `open` to `close`; a context manager.

    Steps are sent in order and answered in order. A link that breaks is mended: what was not answered is sent again,
    and the cloud applies nothing twice. Once a call has raised a LinkError the session is over, and later calls raise
    the same. Not for several threads at once.
    """

    def __init__(
        self,
        transport: Transport,
        request: pb.OpenSessionRequest,
        blobs: Mapping[str, Blob],
        policy: RetryPolicy = RetryPolicy(),  # noqa: B008  # a tuple
        on_status: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`blobs` are what `request` names by SHA-256; the transport is closed with the link.

        `on_status`, called in any thread, is told what the link is waiting for while it is broken; an empty text when
        it is whole again.
        """
        self._transport = transport
        self._request = pb.OpenSessionRequest()
        self._request.CopyFrom(request)
        self._request.request_id = secrets.token_urlsafe(24)
        self._blobs = blobs
        self._policy = policy
        self._on_status = on_status
        self._stream = ReliableStream(transport, policy, on_status)
        self._spans = StepSpans(edge_tracer())
        self._session_id = ""
        self.ahead = False
        """Whether what is sent now is sent before the answers to what was sent before were looked at."""
        self.takes_detach = False
        """Whether the cloud goes on without its edge; known once the link is open."""
        self.takes_ahead = False
        """Whether the cloud knows what that means, and a commit's `max_grad_norm`; known once the link is open."""
        self.takes_variants = False
        """Whether the cloud knows `Activation.variant`; known once the link is open."""
        self._held = pb.EdgeMessage()  # weights, commit and gradient_scale of the next message
        self._step = 0  # that weights and gradients belong to now
        self._without_body = 0  # messages of that step

    @property
    def total(self) -> Traffic:
        """See ReliableStream."""
        return self._stream.total

    @property
    def counts(self) -> Counts:
        """What it took to keep the session going."""
        return self._stream.counts

    @property
    def stopping(self) -> bool:
        """Whether the server has said that it stops soon: a checkpoint that is saved now loses nothing."""
        return self._stream.stopping

    @property
    def keeps_only(self) -> Optional[int]:
        """The sequences up to this number are kept on the cloud, and no others any more; None while it keeps all."""
        return self._stream.keeps_only

    def open(self) -> pb.OpenSessionResponse:
        """Opens the session and uploads what the cloud lacks.

        A call that breaks is tried again; one that finds nobody, or no room, for the policy's `wait_seconds`; one that
        is not let in only if one before it was. Raises what Transport.open_session and upload raise; the link is closed
        then.
        """
        opening = Opening(self._transport, self._request, self._blobs, self._policy, self._stream.wake, self._on_status)
        try:
            response = opening.open()
        except BaseException:  # Ctrl-C during an upload too
            self.close()
            raise
        self._session_id = response.session_id
        self.takes_ahead, self.takes_detach = response.takes_ahead, response.takes_detach
        self.takes_variants = response.takes_variants
        self._step = response.next_step
        self._stream.begin(response.session_id)
        self._blobs = {}  # what they read from may be half a model, and whoever offered it may have let go of it
        return response

    def attach(self, left: Left, step: int) -> None:
        """Instead of `open`: a session as an edge has left it after so many steps. Raises SessionLostError."""
        self._transport.check_session(left.session_id)
        self._session_id, self._step = left.session_id, step
        self.takes_ahead = self.takes_detach = True
        self._stream.begin(left.session_id, left)
        self._blobs = {}

    @property
    def makes_again(self) -> bool:
        """Whether an edge had left, and what it left is not done and made again yet; the session stays when the link
        is closed."""
        return self._stream.makes_again

    def leave(self, messages: Callable[[], None], announce: Callable[[Left], None]) -> None:
        """Has the cloud do what `messages` sends, one after the other, when the link is closed; the session stays.

        `messages` is called, and may wait for nothing; then `announce`, before anything is sent. Raises what they do,
        and CloudMemoryError where the cloud does not take it: then nothing was done.
        """
        self._settle()
        message = pb.EdgeMessage(step=self._step, micro_batch=self._without_body)
        self._stream.collect()
        self._without_body = 0  # as it is for who makes them again
        try:
            messages()
            pending = self._stream.leave(message, announce)
        except BaseException:
            self._stream.drop_collected()
            raise
        finally:
            self._held, self._step, self._without_body = pb.EdgeMessage(), message.step, message.micro_batch + 1
        detached = pending.result().message.detached
        if detached.error:
            self._stream.stay()
            raise CloudMemoryError(said(detached.error))

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
        draws: Optional[pb.Draws] = None,
        scored: Optional[pb.Labels] = None,
    ) -> PendingReply:
        """Algorithm 1, lines 7 to 11, for one micro-batch; what is held rides along.

        With labels the reply holds a `Result` (`pb.Forward` has what `loss_scale` 0 means), without them `Outputs`, and
        the cloud waits for `backward`. Returns at once: several micro-batches may be on their way."""
        message = self._with_held(step, micro_batch)
        # Filled in place: every message given to a constructor is copied, and an activation may be megabytes.
        message.forward.activation.CopyFrom(activation)
        said = pb.Forward(loss_scale=loss_scale, eval_mode=eval_mode, want_logits=want_logits, labels=labels)
        message.forward.MergeFrom(said)
        message.forward.MergeFrom(pb.Forward(frozen_edge=frozen_edge, autocast=autocast, draws=draws, scored=scored))
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
        labels: Optional[pb.Labels] = None,
        scored: Optional[pb.Labels] = None,
    ) -> PendingReply:
        """An `Evaluation`, later: logits of a batch, the loss of `labels`, or what is `scored`. A held commit first."""
        if self._held.HasField("commit") or self._held.HasField("averaged"):
            self.flush()
        asked = pb.Evaluate(autocast=autocast, labels=labels, scored=scored)
        message = pb.EdgeMessage(step=step, micro_batch=batch_index, evaluate=asked)
        message.evaluate.activation.CopyFrom(activation)
        return self._send("evaluation", message, payload_bytes=len(activation.packed.data))

    def weigh(self, micro_batch: int, weight: float) -> None:
        """Says what the gradients of a `forward` with `loss_scale` 0 count in the step that is accumulated; held."""
        self._hold_weight(pb.Weight(micro_batch=micro_batch, weight=weight))

    def drop(self, micro_batch: int) -> None:
        """Lets go of a `forward`, without labels or with `loss_scale` 0, that nobody will go backward through; held."""
        self._hold_weight(pb.Weight(micro_batch=micro_batch, dropped=True))

    def scale_gradients(self, scale: float) -> None:
        """Multiplies what the cloud has added up of net_2's gradients, after a held commit; 0 forgets them, -0 makes
        zeros of them. Held back; several before one message multiply."""
        self._stream.check()
        before = self._held.gradient_scale if self._held.HasField("gradient_scale") else 1.0
        self._held.gradient_scale = before * scale if scale else scale

    def average(self, averaged: bool) -> None:
        """A schedule-free optimizer's weights: at their average from here on, or back where they train. Held back."""
        self._stream.check()
        self._held.averaged = averaged

    def commit(
        self,
        step: int,
        learning_rates: Sequence[float],
        clip_scale: float,
        group_arguments: Sequence[pb.GroupArguments] = (),
        max_grad_norm: Optional[float] = None,
    ) -> None:
        """Algorithm 1, line 14, for net_2. Held back until the next message; weights that are held go with it.

        With `max_grad_norm` the cloud finds the clip scale itself, and takes no step with numbers that are not finite.
        """
        self._stream.check()
        if any(map(self._held.HasField, ("commit", "gradient_scale", "averaged"))):
            self.flush()  # what is held is for this step, and in one message would come after the commit
        commit = pb.Commit(
            step=step,
            learning_rates=learning_rates,
            clip_scale=clip_scale,
            group_arguments=group_arguments,
            max_grad_norm=max_grad_norm,
        )
        self._held.commit.CopyFrom(commit)
        self._spans.end_step()

    def forget_held(self) -> None:
        """What is held is for a step that the cloud has undone, or will never take."""
        self._held = pb.EdgeMessage()
        self._stream.give_up_left()

    def keep_gradients(self) -> None:
        """Net_2's gradients are not forgotten after the commit that is held. Raises ProtocolError when none is."""
        if not self._held.HasField("commit"):
            raise ProtocolError("no commit is held that could keep the gradients")
        self._held.commit.keep_gradients = True

    def flush(self) -> Optional[Reply]:
        """Sends what is held and waits until it is done: the reply holds `Committed`. None when nothing was held."""
        pending = self.send_held()
        return None if pending is None else pending.result()

    def send_held(self) -> Optional[PendingReply]:
        """As `flush`, without waiting."""
        if not self._held.ListFields():
            return None
        step = self._held.commit.step if self._held.HasField("commit") else self._step
        message = self._with_held(step, self._without_body)
        pending = self._send_with_held("committed", message, payload_bytes=0)
        self._without_body += 1
        return pending

    def weights(self, optimizer_state: bool = False) -> Iterator[bytes]:
        """Net_2's parameters, or the state of its optimizer, after every commit so far.

        The bytes of one safetensors file, in chunks; a download that breaks goes on where it was.
        """
        self._settle()
        return self._download(optimizer_state)

    def _download(self, optimizer_state: bool) -> Iterator[bytes]:
        tries, offset = Retries(self._policy, self._stream.wake, self._on_status), 0
        while True:
            try:
                for data in self._transport.download(self._session_id, optimizer_state, offset):
                    offset += len(data)
                    tries.reset()
                    yield data
                return
            except TRANSIENT as error:
                tries.after(error)

    def load_state(
        self, blob: Blob, sha256: str, optimizer_state: bool, group_arguments: Sequence[pb.GroupArguments] = ()
    ) -> None:
        """Replaces net_2's parameters, or the state of its optimizer, by a file of the form that `weights` gives.

        `sha256` is that of its bytes; for `group_arguments` see pb.LoadState. Returns when it is done; gradients stay.
        Raises ProtocolError while a `forward` waits for its weight or its `backward`, or for another net_2's file.
        """
        self._settle()
        tries = Retries(self._policy, self._stream.wake, self._on_status)
        while True:
            try:
                self._transport.upload(sha256, blob.total_bytes, blob.chunks())
                break
            except TRANSIENT as error:
                tries.after(error)
        message = self._beside()
        load = pb.LoadState(sha256=sha256, optimizer_state=optimizer_state, group_arguments=group_arguments)
        message.load_state.CopyFrom(load)
        self._send("committed", message, payload_bytes=0).result()

    def save_checkpoint(self) -> pb.CheckpointSaved:
        """First phase of a checkpoint after every commit so far: the cloud's half is where it survives the process.

        Raises StorageError when the cloud could not save it; the session goes on.
        """
        self._settle()
        message = self._beside()
        message.save_checkpoint.SetInParent()
        saved = self._send("checkpoint_saved", message, payload_bytes=0).result().message.checkpoint_saved
        if saved.error:
            raise StorageError(f"the cloud could not save its half of the checkpoint: {said(saved.error)}")
        return saved

    def keep_checkpoints(self, steps: Sequence[int]) -> None:
        """After its second phase: the steps that are whole here; the cloud may delete the others of the run."""
        message = self._beside()
        message.keep_checkpoints.steps.extend(steps)
        self._send("committed", message, payload_bytes=0).result()

    def hurry(self) -> None:
        """See ReliableStream: for who is about to end, and should not wait for a link that is broken."""
        self._stream.hurry()

    def check(self) -> None:
        """Raises what ended the session, if it is known to have ended."""
        self._stream.check()

    def give_up_waiting(self) -> None:
        """A link that is broken, now or later, ends the session at once. For signal handlers: it takes no lock."""
        self._stream.wake.put(None)

    def abandon(self) -> None:
        """Ends the session without waiting for anything. For finalizers: it takes no lock and starts no thread."""
        self._stream.abandon()

    def close(self) -> None:
        """Ends the session and closes the transport; no thread is left. What is held is dropped. Idempotent."""
        self._stream.close()
        self._transport.close()
        self._spans.end_step()

    def __enter__(self) -> Link:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        if error is not None:
            self._stream.close(BREAK_TIMEOUT_SECONDS)
        self.close()

    def _settle(self) -> None:
        """Whatever was asked for so far has been done."""
        self.ahead = False
        self.flush()
        self._stream.settle()  # a commit may ride on a message whose answer nobody waited for, as after Ctrl-C

    def _beside(self) -> pb.EdgeMessage:
        """A message beside those of the step."""
        message = pb.EdgeMessage(step=self._step, micro_batch=self._without_body)
        self._without_body += 1
        return message

    def _hold_weight(self, weight: pb.Weight) -> None:
        self._stream.check()
        if self._held.HasField("commit") or self._held.HasField("gradient_scale"):
            self.flush()  # in one message, both would come after the weight
        self._held.weights.append(weight)

    def _with_held(self, step: int, micro_batch: int) -> pb.EdgeMessage:
        message = pb.EdgeMessage()
        message.CopyFrom(self._held)
        message.step, message.micro_batch = step, micro_batch
        return message

    def _send_with_held(self, kind: str, message: pb.EdgeMessage, payload_bytes: int) -> PendingReply:
        self._stream.make_room()
        with interrupts_deferred():  # what is held is either still here, or on its way
            pending = self._send(kind, message, payload_bytes)
            self._held = pb.EdgeMessage()
            step = message.step + (message.HasField("commit") and message.WhichOneof("body") is None)
            if step != self._step:
                self._step, self._without_body = step, 0
        return pending

    def _send(self, kind: str, message: pb.EdgeMessage, payload_bytes: int) -> PendingReply:
        self._stream.make_room()
        message.ahead = self.ahead
        return self._stream.send(kind, message, payload_bytes, self._spans.message(message))
