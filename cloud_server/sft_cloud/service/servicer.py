"""The gRPC face of the cloud: takes messages off the wire and asks the engine in which the sessions are."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from sft.errors import ProtocolError, ServerUnavailableError, SessionLostError, SFTError, StorageError
from sft.tensors.stream import CHUNK_BYTES
from sft.v1 import split_training_pb2 as pb
from sft.v1 import split_training_pb2_grpc as pb_grpc
from sft.version import __version__
from sft.wire.codec.rows import NAMES
from sft.wire.cut import mode_name
from sft_cloud.engine import PIECE_BYTES, Engine
from sft_cloud.errors import PreconditionError, StreamTakenError
from sft_cloud.identity import Identity
from sft_cloud.memory import Kind, MemoryBudget
from sft_cloud.observability import NOBODY, Observer, Watch
from sft_cloud.rpc import Call, ends_session
from sft_cloud.service.absent import Absent, Checks
from sft_cloud.service.registry import DONE, Entry, Registry, StreamHandle
from sft_cloud.service.status import Status
from sft_cloud.storage import BlobStore

_DOWNLOAD_BYTES = PIECE_BYTES + 4 * CHUNK_BYTES
"""What a download holds: a piece of it, and a chunk as a message, as bytes and on its way."""

_COPIES_ON_WAY = 2
"""Of an answer that is sent again: as bytes, and on the way to the edge."""

_ROOM_SECONDS = 30.0
"""How long one waits for that: a trained model should not be lost because others read theirs slowly."""

_log = logging.getLogger(__name__)


class SplitTrainingService(pb_grpc.SplitTrainingServicer):
    """Implements `sft.v1.SplitTraining`, behind a CallInterceptor. One thread of the server runs each call."""

    def __init__(
        self,
        engine: Engine,
        store: BlobStore,
        sessions: Registry,
        observer: Observer = NOBODY,
        memory: MemoryBudget | None = None,
        rest: Callable[[str, int], object] = lambda name, size: None,
        checks: Checks | None = None,
    ) -> None:
        """`store` takes uploads; `observer` is told what happens; `memory` is what downloads are charged to; `rest` is
        called after a message of a caller that was no work for the engine, and of how many bytes it was with its
        answer, and may wait; `checks` are for messages that came in no call of their own. Whoever closes one of
        `sessions` closes it in the `engine`, too.
        """
        self._memory = MemoryBudget() if memory is None else memory
        self._rest = rest
        self._engine = engine
        self._store = store
        self._observer = observer
        self._draining = threading.Event()
        self._idle: set[Call] = set()
        self.sessions = sessions
        self.stopping = threading.Event()
        """Set some time before `drain`: every answer tells its edge to save a checkpoint now."""
        self._absent = Absent(sessions, self._answer_left, self._memory, checks or Checks())
        self._status = Status(sessions, engine.device, lambda: self.stopping.is_set() or self._draining.is_set())

    def drain(self) -> None:
        """From now on no session is opened; streams end, with UNAVAILABLE, once what they work on is answered.

        Streams that wait for their edge cannot be told anything but CANCELLED.
        """
        self._draining.set()
        self._absent.stop()
        for context in list(self._idle):
            context.cancel()

    def OpenSession(self, request: pb.OpenSessionRequest, context: Call) -> pb.OpenSessionResponse:
        """See the .proto."""
        response = pb.OpenSessionResponse(
            package_version=__version__, device=self._engine.device, codecs=NAMES.values()
        )
        response.takes_ahead = response.takes_detach = response.takes_variants = response.takes_mixed = True
        response.takes_modes = True
        caller = context.caller
        self._check_draining()
        if request.only_check:
            response.missing_blobs.extend(self._missing_blobs(request, context))
            return response
        if self.stopping.is_set():
            raise ServerUnavailableError("the server is about to stop")
        entry = self.sessions.opened(request, caller)
        if entry is None:
            started = time.monotonic()
            # Nobody loses a session to a request that then turns out to be none.
            if self.sessions.ends_others(request, caller):
                response.missing_blobs.extend(self._missing_blobs(request, context))
                if response.missing_blobs:
                    return response
            with self.sessions.place(request, caller) as put:
                session_id = self._drawn(context)
                try:
                    opened = self._engine.open(session_id, request, caller)
                    if not opened.session_id:
                        response.missing_blobs.extend(opened.missing_blobs)
                        return response
                    entry = put(session_id, opened.next_step)
                    entry.keeps, entry.kept = opened.keeps_activations, opened.kept
                except BaseException:
                    self._engine.close(session_id)  # which may have made it, and nobody would ever ask for it
                    raise
            self._log_opened(entry, time.monotonic() - started)
            self._observer.metrics.opened(caller.name, resumed=bool(request.resume_from))
        response.session_id = entry.session_id
        response.next_step = entry.next_step
        response.keeps_activations, response.kept = entry.keeps, entry.kept
        response.session_timeout_seconds = self.sessions.session_timeout_seconds
        return response

    def UploadBlob(self, request_iterator: Iterator[pb.UploadBlobRequest], context: Call) -> pb.UploadBlobResponse:
        """See the .proto."""
        caller = context.caller
        self._check_draining()
        first = next(request_iterator, None)
        if first is None:
            raise ProtocolError("the upload holds no chunk; the first one names the blob")
        chunks = (request.data for request in itertools.chain([first], request_iterator))
        self._store.of(caller).add(first.sha256, first.total_bytes, chunks)
        self._observer.metrics.uploaded(caller.name, first.total_bytes)
        _log.info("blob stored", extra={"fields": {"sha256": first.sha256, "bytes": first.total_bytes}})
        return pb.UploadBlobResponse()

    def Train(self, request_iterator: Iterator[pb.EdgeMessage], context: Call) -> Iterator[pb.CloudMessage]:
        """See the .proto."""
        caller = context.caller
        first = next(request_iterator, None)
        if first is not None and first.WhichOneof("body") == "probe":
            yield from self._probes(first, request_iterator, context)
            return
        if first is None or first.WhichOneof("body") != "attach":
            raise PreconditionError("the first message of a stream must be an attach")
        self._check_draining()  # who is let in now would lose the stream before it hears of it
        stream = StreamHandle(context.cancel)
        again = self.sessions.get(first.attach.session_id, caller).was_attached
        entry = self.sessions.attach(first.attach.session_id, caller, stream)
        session_id, answered = entry.session_id, first.answered
        self._observer.metrics.attached(caller.name, again)
        # Whoever held on to an entry would keep the answers in it when its session has ended.
        del entry, first
        try:
            # A call that ends while its thread waits for the engine must not hold the session until then.
            if not context.add_callback(lambda: self._detach(session_id, caller, stream)):
                return
            yield from self._attached(session_id, caller, stream, answered)
            for answer in self._absent.answers(session_id, caller, stream):
                yield answer
                del answer
                self._sent(session_id, caller, stream)
            while (message := self._wait_for_message(request_iterator, context)) is not None:
                if message.WhichOneof("body") == "close":
                    self.sessions.end(session_id, stream, DONE)
                    return
                answer, repeated = self._answer(session_id, caller, stream, message)
                if repeated or message.WhichOneof("body") == "keep_checkpoints":
                    self._rest(caller.name, message.ByteSize() + answer.ByteSize())
                yield answer
                del answer, message  # a stream that idles must not keep it
                self._sent(session_id, caller, stream)
        except Exception as error:
            if ends_session(error):
                reason = str(error) if isinstance(error, SFTError) else "internal error"
                self.sessions.end(session_id, stream, reason)
            raise
        finally:
            self._sent(session_id, caller, stream)
            self._detach(session_id, caller, stream)

    def DownloadWeights(
        self, request: pb.DownloadWeightsRequest, context: Call
    ) -> Iterator[pb.DownloadWeightsResponse]:
        """See the .proto. Piece by piece, so the engine is never held for long, but all of one step."""
        caller = context.caller
        session_id = self.sessions.get(request.session_id, caller).session_id
        with self._memory.charge(Kind.DOWNLOADS, _DOWNLOAD_BYTES, caller, wait_seconds=_ROOM_SECONDS):
            version, sizes = self._engine.contents(session_id, request.optimizer_state)
            skip = request.offset
            for index, size in enumerate(sizes):
                for piece in range(skip - skip % PIECE_BYTES, size, PIECE_BYTES):
                    data = self._engine.read(session_id, request.optimizer_state, index, piece, version)
                    for start in range(max(skip - piece, 0), len(data), CHUNK_BYTES):
                        yield pb.DownloadWeightsResponse(data=data[start : start + CHUNK_BYTES])
                    del data
                skip = max(skip - size, 0)
        self._observer.metrics.downloaded(caller.name, max(0, sum(sizes) - request.offset))

    def Status(self, request: pb.StatusRequest, context: Call) -> pb.StatusResponse:
        """See the .proto."""
        return self._status.status(context.caller)

    def Probe(self, request: pb.ProbeRequest, context: Call) -> pb.ProbeResponse:
        """See the .proto."""
        return self._status.probe(request)

    def _drawn(self, context: Call) -> str:
        """An id for a session to be opened, which is given up with the call as long as it only waits."""
        session_id = secrets.token_urlsafe(24)
        if not context.add_callback(lambda: self._engine.give_up(session_id)):
            raise ServerUnavailableError("the call is over")
        return session_id

    def _missing_blobs(self, request: pb.OpenSessionRequest, context: Call) -> Sequence[str]:
        """Checks a request as far as it can be without a session."""
        checked = pb.OpenSessionRequest()
        checked.CopyFrom(request)
        checked.only_check = True
        return self._engine.open(self._drawn(context), checked, context.caller).missing_blobs

    def _probes(
        self, message: pb.EdgeMessage | None, request_iterator: Iterator[pb.EdgeMessage], context: Call
    ) -> Iterator[pb.CloudMessage]:
        while message is not None:
            if message.WhichOneof("body") != "probe":
                raise PreconditionError("a stream that begins with a probe has no session")
            answer = pb.CloudMessage(probed=self._status.probe(message.probe))
            self._rest(context.caller.name, message.ByteSize() + answer.ByteSize())
            yield answer
            message = self._wait_for_message(request_iterator, context)

    def _wait_for_message(self, request_iterator: Iterator[pb.EdgeMessage], context: Call) -> pb.EdgeMessage | None:
        self._idle.add(context)
        try:
            self._check_draining()
            return next(request_iterator, None)
        finally:
            self._idle.discard(context)

    def _attached(
        self, session_id: str, caller: Identity, stream: StreamHandle, answered: int
    ) -> Iterator[pb.CloudMessage]:
        """Where the session is, and the answers that the edge lacks."""
        entry = self.sessions.get(session_id, caller)
        with entry.lock:  # what the stream before this one had begun is finished
            _check_has(entry, stream)
            answers = entry.messages.answers_after(answered)
            on_way = _COPIES_ON_WAY * max((answer.ByteSize() for answer in answers), default=0)
            self._engine.keep_answers(session_id, entry.messages.held_bytes + on_way)
            attached = pb.Attached(next_step=entry.next_step, last_number=entry.messages.last_number)
        del entry
        yield pb.CloudMessage(attached=attached, stopping=self.stopping.is_set())
        for answer in answers:
            self._rest(caller.name, answer.ByteSize())
            yield answer
        self._sent(session_id, caller, stream)

    def _sent(self, session_id: str, caller: Identity, stream: StreamHandle) -> None:
        """What there is of the newest answer from now on is what is remembered."""
        with suppress(SessionLostError):
            entry = self.sessions.get(session_id, caller)
            # Whoever works on it says so itself, and nobody may wait here: this may be the end of a call.
            if entry.stream in (stream, None) and entry.lock.acquire(blocking=False):
                try:
                    self._engine.keep_answers(session_id, entry.messages.held_bytes)
                finally:
                    entry.lock.release()

    def _answer(
        self, session_id: str, caller: Identity, stream: StreamHandle, message: pb.EdgeMessage, is_left: bool = False
    ) -> tuple[pb.CloudMessage, bool]:
        """And whether it came from memory."""
        arrived = time.monotonic()
        entry = self.sessions.get(session_id, caller)  # looked up each time, see `Train`

        def work() -> pb.CloudMessage:
            if message.HasField("detach"):
                return self._absent.leave(entry, message)
            answer = self._handle(entry, message, watch)
            if message.HasField("save_checkpoint"):
                answer.checkpoint_saved.CopyFrom(self._save(entry))
            if message.HasField("keep_checkpoints"):
                steps = list(message.keep_checkpoints.steps)
                entry.saves += entry.next_step in steps
                with suppress(StorageError):  # too many is no harm; they are told again with the next checkpoint
                    self._engine.keep(session_id, steps)
            answer.cloud_seconds = time.monotonic() - arrived
            return answer

        with self._observer.message(caller.name, entry.label, message) as watch, entry.lock:
            _check_has(entry, stream)
            self.sessions.touch(entry)
            if entry.left is not None and message.number > entry.left.last:  # its edge is back, and goes on itself
                entry.left.close()
                entry.left = None
            before = entry.next_step
            answer, repeated = entry.messages.apply(message, work, is_left)
            answer.stopping = self.stopping.is_set()
            received, sent = message.ByteSize(), answer.ByteSize()
            if repeated:
                self._engine.keep_answers(session_id, entry.messages.held_bytes + _COPIES_ON_WAY * sent)
            entry.bytes_received += received
            entry.bytes_sent += sent
            watch.answered(answer, (received, sent), entry.next_step - before, repeated)
        return answer, repeated

    def _answer_left(
        self, session_id: str, caller: Identity, stream: StreamHandle, message: pb.EdgeMessage
    ) -> pb.CloudMessage:
        return self._answer(session_id, caller, stream, message, is_left=True)[0]

    def _handle(self, entry: Entry, message: pb.EdgeMessage, watch: Watch) -> pb.CloudMessage:
        handled = self._engine.handle(entry.session_id, message, entry.messages.held_bytes)
        try:
            watch.worked(handled.waited_seconds, handled.worked_seconds, handled.error)
            entry.next_step = handled.next_step
            if handled.error is not None:
                raise handled.error
            return handled.answer
        finally:
            del handled  # the error's traceback would hold the error in a circle, and with it the session

    def _save(self, entry: Entry) -> pb.CheckpointSaved:
        try:
            return self._engine.save(entry.session_id)
        except StorageError as error:
            _log.warning("checkpoint not saved", extra={"fields": {"session": entry.label, "reason": str(error)}})
            return pb.CheckpointSaved(error=str(error))

    def _detach(self, session_id: str, caller: Identity, stream: StreamHandle) -> None:
        stream.over.set()
        with suppress(SessionLostError):  # it has ended
            self.sessions.detach(self.sessions.get(session_id, caller), stream)
            self._absent.go_on(session_id, caller)

    def _check_draining(self) -> None:
        if self._draining.is_set():
            raise ServerUnavailableError("the server is shutting down")

    def _log_opened(self, entry: Entry, seconds: float) -> None:
        request = entry.request
        fields = {
            "session": entry.label,
            "owner": entry.owner.name,
            "edge": request.package_version[:20],
            "model": entry.model,
            "mode": mode_name(request.cut.mode),
            "split_layer": request.cut.layer_name or request.cut.split_layer,
            "split_rank": request.cut.split_rank,
            "optimizer": request.optimizer.name,
            "next_step": entry.next_step,
            "seconds": round(seconds, 3),
        }
        _log.info("session opened", extra={"fields": fields})


def log_closed(entry: Entry, reason: str, age_seconds: float) -> None:
    """For the registry's `on_close`."""
    fields = {
        "session": entry.label,
        "owner": entry.owner.name,
        "reason": reason,
        "steps": entry.next_step,
        "seconds": round(age_seconds, 3),
        "bytes_received": entry.bytes_received,
        "bytes_sent": entry.bytes_sent,
    }
    _log.info("session closed", extra={"fields": fields})


def _check_has(entry: Entry, stream: StreamHandle) -> None:
    if entry.stream is not stream:
        raise StreamTakenError("another stream has this session now")
