"""`grpc.health.v1` for the server as a whole: Check for everybody, Watch as any other method of a known caller.

Not the servicer of grpcio-health-checking: that one keeps every name it is asked for, has one thread wait for the
requests of all who watch, and waits for whatever strangers send to Check, or do not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2 as pb

from sft.errors import ProtocolError
from sft_cloud.admission import Deadlines
from sft_cloud.errors import NoSuchServiceError

HEALTH_SERVICE = pb.DESCRIPTOR.services_by_name["Health"].full_name


READERS = 4
"""Checks whose request is waited for at a time. One more is taken to ask about the server as a whole, as most do."""

READ_SECONDS = 1.0
"""For which a check's request is waited for; who has sent none by then is taken to ask about the server, too."""


class Health:
    """Whether the server serves."""

    def __init__(
        self, names: tuple[str, ...], deadlines: Deadlines, check_pace: Callable[[], object] = lambda: None
    ) -> None:
        """`names`: what may be asked about; `check_pace` raises QuotaError where a check is one too many."""
        self._check_pace = check_pace
        self._names = names
        self._deadlines = deadlines
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="health")
        self._places = threading.BoundedSemaphore(READERS)
        self._changed = threading.Condition()
        self._serves = True

    def add_to(self, server: grpc.Server) -> None:
        """As its handlers."""
        handlers = {
            # As a stream, of bytes, of which it looks at one message if it looks at any: gRPC waits for none and keeps
            # none. One answer, not a stream of them: gRPC then sends it without the thread, however long it has to
            # wait for the other side.
            "Check": grpc.stream_unary_rpc_method_handler(
                self._check, response_serializer=pb.HealthCheckResponse.SerializeToString
            ),
            "Watch": grpc.unary_stream_rpc_method_handler(
                self._watch,
                request_deserializer=pb.HealthCheckRequest.FromString,
                response_serializer=pb.HealthCheckResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(HEALTH_SERVICE, handlers),))

    def stop_serving(self) -> None:
        """Tells so whoever asks from now on, and who watches; their calls end."""
        with self._changed:
            self._serves = False
            self._changed.notify_all()

    def shutdown(self) -> None:
        """Once no call is left."""
        self._readers.shutdown()

    def _answer(self) -> pb.HealthCheckResponse:
        kinds = pb.HealthCheckResponse
        return pb.HealthCheckResponse(status=kinds.SERVING if self._serves else kinds.NOT_SERVING)

    def _check(self, received: Iterator[bytes], context: grpc.ServicerContext) -> pb.HealthCheckResponse:
        over = self._deadlines.stalling("answers are not read", context.cancel)
        if not context.add_callback(over):
            over()
        self._check_pace()
        data = self._read(received)
        try:
            name = pb.HealthCheckRequest.FromString(data or b"").service
        except DecodeError:
            raise ProtocolError("what came is no HealthCheckRequest") from None
        if name not in self._names:
            raise NoSuchServiceError("there is no such service on this server")
        return self._answer()

    def _read(self, received: Iterator[bytes]) -> bytes | None:
        """The request, or None: strangers, who may send nothing, are waited for on a few threads, and not for long."""
        if not self._places.acquire(blocking=False):
            return None

        def done(_: Future[bytes | None]) -> None:
            self._places.release()

        try:
            reading = self._readers.submit(next, received, None)
        except RuntimeError:  # the server has stopped
            self._places.release()
            return None
        reading.add_done_callback(done)
        try:
            return reading.result(READ_SECONDS)
        except Late:
            return None  # what is read ends with the call

    def _watch(self, request: pb.HealthCheckRequest, context: grpc.ServicerContext) -> Iterator[pb.HealthCheckResponse]:
        if request.service not in self._names:
            yield pb.HealthCheckResponse(status=pb.HealthCheckResponse.SERVICE_UNKNOWN)
            return
        if not context.add_callback(self._wake):
            return
        answer = self._answer()
        yield answer
        if answer.status != pb.HealthCheckResponse.SERVING:
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._serves or not context.is_active())
        if context.is_active():
            yield self._answer()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
