"""The gRPC face of the cloud: takes messages off the wire and hands them to sessions, on the worker's thread."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import grpc
from torch import Tensor

from sft import __version__
from sft.errors import ProtocolError, ServerUnavailableError, SFTError
from sft.tensor_stream import StoredTensor, safetensors_chunks
from sft.v1 import split_training_pb2 as pb
from sft.v1 import split_training_pb2_grpc as pb_grpc
from sft_cloud.errors import PreconditionError, ends_call
from sft_cloud.identity import ANONYMOUS
from sft_cloud.openers import Opener
from sft_cloud.registry import Entry, Registry
from sft_cloud.session import Session
from sft_cloud.store import BlobStore
from sft_cloud.worker import Worker

T = TypeVar("T")

_log = logging.getLogger(__name__)


class SplitTrainingService(pb_grpc.SplitTrainingServicer):
    """Implements `sft.v1.SplitTraining`. One thread of the server runs each call."""

    def __init__(
        self,
        worker: Worker,
        store: BlobStore,
        opener: Opener,
        max_sessions: int,
        clock: Callable[[], float] = time.monotonic,
        on_close: Callable[[Entry, str], None] = lambda entry, reason: None,
    ) -> None:
        """`store` takes uploads; `clock`: seconds, for how long a session has waited for its stream; `on_close` is told
        of every session that ends, and why.
        """
        self._worker = worker
        self._store = store
        self._opener = opener
        self._on_close = on_close
        self._draining = threading.Event()
        self._idle: set[grpc.ServicerContext] = set()
        self.sessions = Registry(max_sessions, self._log_closed, clock)

    def drain(self) -> None:
        """From now on no session is opened; streams end, with UNAVAILABLE, once what they work on is answered.

        Streams that wait for their edge cannot be told anything but CANCELLED.
        """
        self._draining.set()
        for context in list(self._idle):
            context.cancel()

    def OpenSession(self, request: pb.OpenSessionRequest, context: grpc.ServicerContext) -> pb.OpenSessionResponse:
        """See the .proto."""
        response = pb.OpenSessionResponse(package_version=__version__, device=str(self._worker.device))
        with ends_call(context):
            self._check_draining()
            started = time.monotonic()
            with self.sessions.place() as put:
                opened = self._opener.open(request, ANONYMOUS)
                if not isinstance(opened, Session):
                    response.missing_blobs.extend(opened)
                    return response
                entry = put(opened)
            response.session_id = entry.session_id
            fields = {
                "session": entry.label,
                "edge": request.package_version[:20],
                "model": request.model_name,
                "mode": pb.Mode.Name(request.cut.mode).rpartition("_")[2].lower(),
                "split_layer": request.cut.layer_name or request.cut.split_layer,
                "split_rank": request.cut.split_rank,
                "optimizer": request.optimizer.name,
                "seconds": round(time.monotonic() - started, 3),
            }
            _log.info("session opened", extra={"fields": fields})
        return response

    def UploadBlob(
        self, request_iterator: Iterator[pb.UploadBlobRequest], context: grpc.ServicerContext
    ) -> pb.UploadBlobResponse:
        """See the .proto."""
        with ends_call(context):
            self._check_draining()
            first = next(request_iterator, None)
            if first is None:
                raise ProtocolError("the upload holds no chunk; the first one names the blob")
            chunks = (request.data for request in itertools.chain([first], request_iterator))
            self._store.of(ANONYMOUS).add(first.sha256, first.total_bytes, chunks)
            _log.info("blob stored", extra={"fields": {"sha256": first.sha256, "bytes": first.total_bytes}})
        return pb.UploadBlobResponse()

    def Train(
        self, request_iterator: Iterator[pb.EdgeMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.CloudMessage]:
        """See the .proto. The session ends with the call, however that ends."""
        with ends_call(context):
            first = next(request_iterator, None)
            if first is None or first.WhichOneof("body") != "attach":
                raise PreconditionError("the first message of a stream must be an attach")
            session_id = first.attach.session_id
            self.sessions.attach(session_id)
            try:
                # A call that ends while its thread waits for the worker must not hold the session's place until then.
                if context.add_callback(lambda: self.sessions.close(session_id, "the stream ended")):
                    yield self._answer(session_id, first)
                    while (message := self._wait_for_message(request_iterator, context)) is not None:
                        yield self._answer(session_id, message)
            except SFTError as error:
                self.sessions.close(session_id, str(error))
                raise
            finally:
                self.sessions.close(session_id, "the stream ended")

    def DownloadWeights(
        self, request: pb.DownloadWeightsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.DownloadWeightsResponse]:
        """See the .proto. Tensor by tensor, so the worker is never held for long, but all of one step."""
        with ends_call(context):
            entry = self.sessions.get(request.session_id)
            version = entry.session.version

            def listed() -> list[StoredTensor]:
                session = entry.session
                return session.stored_optimizer_state() if request.optimizer_state else session.stored_parameters()

            def on_worker(read: Callable[[], Tensor]) -> Callable[[], Tensor]:
                return lambda: self._run(lambda: _read_at(entry.session, version, read))

            stored = [tensor._replace(read=on_worker(tensor.read)) for tensor in self._run(listed)]
            for data in safetensors_chunks(stored):
                yield pb.DownloadWeightsResponse(data=data)

    def _wait_for_message(
        self, request_iterator: Iterator[pb.EdgeMessage], context: grpc.ServicerContext
    ) -> pb.EdgeMessage | None:
        self._idle.add(context)
        try:
            self._check_draining()
            return next(request_iterator, None)
        finally:
            self._idle.discard(context)

    def _answer(self, session_id: str, message: pb.EdgeMessage) -> pb.CloudMessage:
        arrived = time.monotonic()

        def work() -> pb.CloudMessage:
            # Looked up each time: whoever held on to a session would keep its memory when its edge has gone.
            entry = self.sessions.get(session_id)
            answer = entry.session.handle(message)
            answer.cloud_seconds = time.monotonic() - arrived
            entry.bytes_received += message.ByteSize()
            entry.bytes_sent += answer.ByteSize()
            return answer

        return self._run(work)

    def _run(self, work: Callable[[], T]) -> T:
        return self._worker.submit(work).result()

    def _check_draining(self) -> None:
        if self._draining.is_set():
            raise ServerUnavailableError("the server is shutting down")

    def _log_closed(self, entry: Entry, reason: str) -> None:
        fields = {
            "session": entry.label,
            "reason": reason,
            "steps": entry.session.next_step,
            "seconds": round(self.sessions.age(entry), 3),
            "bytes_received": entry.bytes_received,
            "bytes_sent": entry.bytes_sent,
        }
        _log.info("session closed", extra={"fields": fields})
        self._on_close(entry, reason)


def _read_at(session: Session, version: int, read: Callable[[], Tensor]) -> Tensor:
    if session.version != version:
        raise PreconditionError("the session trained on while its weights were read; download them between two steps")
    return read()
