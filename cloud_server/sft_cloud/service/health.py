"""`grpc.health.v1` for the server as a whole: Check for everybody, Watch as any other method of a known caller.

Not the servicer of grpcio-health-checking: that one keeps every name it is asked for, has one thread wait for the
requests of all who watch, and reads what strangers send to Check.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
from grpc_health.v1 import health_pb2 as pb

from sft_cloud.admission import Deadlines

HEALTH_SERVICE = pb.DESCRIPTOR.services_by_name["Health"].full_name


class Health:
    """Whether the server serves."""

    def __init__(self, names: tuple[str, ...], deadlines: Deadlines) -> None:
        """`names` may be watched."""
        self._names = names
        self._deadlines = deadlines
        self._changed = threading.Condition()
        self._serves = True

    def add_to(self, server: grpc.Server) -> None:
        """As its handlers."""
        handlers = {
            # As a stream that it never looks at, Check has no message to wait for, and gRPC keeps none. One answer, not
            # a stream of them: gRPC then sends it without the thread, however long it has to wait for the other side.
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

    def _answer(self) -> pb.HealthCheckResponse:
        kinds = pb.HealthCheckResponse
        return pb.HealthCheckResponse(status=kinds.SERVING if self._serves else kinds.NOT_SERVING)

    def _check(self, unread: object, context: grpc.ServicerContext) -> pb.HealthCheckResponse:
        over = self._deadlines.stalling("answers are not read", context.cancel)
        if not context.add_callback(over):
            over()
        return self._answer()

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
