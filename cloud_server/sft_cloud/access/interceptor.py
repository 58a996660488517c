"""Nobody reaches a method, reflection included, before it is known who calls; the health check is for everybody."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import grpc

from sft.wire.protocol import HEALTH_CHECK
from sft_cloud.access.authentication import Authentication
from sft_cloud.errors import UnauthenticatedError
from sft_cloud.identity import Identity
from sft_cloud.observability import LogLimit

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]


OPEN_METHODS = (HEALTH_CHECK,)
"""What load balancers and containers ask; it says no more than whether the server serves, and reads no request."""

REFUSALS_PER_SECOND = 10
"""Lines of the log about strangers; more are counted, and how many is said in the next one."""

_KINDS: dict[tuple[bool, bool], tuple[str, Any]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}

_log = logging.getLogger(__name__)


class AuthenticationInterceptor(grpc.ServerInterceptor):
    """Refuses strangers with UNAUTHENTICATED, and ends calls whose caller is not let in any more."""

    def __init__(
        self,
        authentication: Authentication,
        on_refused: Callable[[str, str], None] = lambda peer, reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_refused` is told the peer's address and why, for an audit log."""
        self._authentication = authentication
        self._on_refused = on_refused
        self._lines = LogLimit(REFUSALS_PER_SECOND, clock)
        self._running: dict[grpc.ServicerContext, Identity] = {}
        self._lock = threading.Lock()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """See grpc.ServerInterceptor."""
        if handler_call_details.method in OPEN_METHODS:
            return continuation(handler_call_details)
        try:
            self._authentication.identify_metadata(handler_call_details.invocation_metadata)
        except UnauthenticatedError as error:
            refusal = error
            # As a stream, whatever the method is: then not even one message is read.
            return grpc.stream_stream_rpc_method_handler(lambda _, context: self._refuse(context, refusal))
        handler = continuation(handler_call_details)
        return handler and self._guarded(handler)

    def identify(self, context: grpc.ServicerContext) -> Identity:
        """Who calls, as found out when the call began, for all who want to know. Raises UnauthenticatedError."""
        with self._lock:
            identity = self._running.get(context)
        # None where the call was not let in, or has ended meanwhile.
        return self._authentication.identify(context) if identity is None else identity

    def end_stale_calls(self) -> None:
        """Ends what runs for callers that would not be let in now, though it waits for them and nothing happens.

        One look; the server has it repeated.
        """
        with self._lock:
            running = list(self._running.items())
        for context, identity in running:
            if not self._authentication.still_valid(identity):
                context.cancel()

    def _guarded(self, handler: Handler) -> Handler:
        kind, make = _KINDS[handler.request_streaming, handler.response_streaming]
        behavior = getattr(handler, kind)

        def one_answer(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                identity = self._admit(context)
                taken = self._checked(request, identity) if handler.request_streaming else request
                return behavior(taken, context)
            except UnauthenticatedError as error:
                self._refuse(context, error)

        def many_answers(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                identity = self._admit(context)
                taken = self._checked(request, identity) if handler.request_streaming else request
                yield from self._checked(behavior(taken, context), identity)
            except UnauthenticatedError as error:
                self._refuse(context, error)

        return make(  # type: ignore[no-any-return]
            many_answers if handler.response_streaming else one_answer,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _admit(self, context: grpc.ServicerContext) -> Identity:
        identity = self._authentication.identify(context)
        with self._lock:
            self._running[context] = identity
        if not context.add_callback(lambda: self._forget(context)):
            self._forget(context)
        return identity

    def _forget(self, context: grpc.ServicerContext) -> None:
        with self._lock:
            self._running.pop(context, None)

    def _checked(self, messages: Iterator[Any], identity: Identity) -> Iterator[Any]:
        for message in messages:
            if not self._authentication.still_valid(identity):
                raise UnauthenticatedError(
                    "the token or the certificate that this call began with has expired or was revoked",
                    f"{identity.name} is not let in any more",
                )
            yield message
            del message  # a stream that idles must not keep it

    def _refuse(self, context: grpc.ServicerContext, error: UnauthenticatedError) -> None:
        left_out = self._lines.take()
        if left_out is not None:
            fields = {
                "peer": context.peer(),
                "reason": error.reason,
                **({"left_out_before": left_out} if left_out else {}),
            }
            _log.info("caller refused", extra={"fields": fields})
        self._on_refused(context.peer(), error.reason)
        context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
