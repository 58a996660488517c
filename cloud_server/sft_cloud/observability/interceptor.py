"""Tells the observer of every call: an interceptor in front of all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from sft.errors import SFTError
from sft.tracing import METADATA_KEY, NO_SPAN, Tracer
from sft.v1 import split_training_pb2 as pb
from sft_cloud.observability.metrics import UNKNOWN, Metrics
from sft_cloud.observability.observer import Observer

_METHODS = {method.name for method in pb.DESCRIPTOR.services_by_name["SplitTraining"].methods} | {
    "Check",
    "Watch",
    "ServerReflectionInfo",
}
"""What becomes a label: not what callers make up."""

_STREAM = "Train"
"""A call as long as a run is no piece of work; its messages are."""


class CallObserver(grpc.ServerInterceptor):
    """Counts the calls that end with an error, and makes spans of those of known callers; before anything else sees
    them."""

    def __init__(
        self, metrics: Metrics, tracer: Tracer, tenant_of: Callable[[grpc.ServicerContext], str] = lambda _: UNKNOWN
    ) -> None:
        """`tenant_of` may raise any SFTError where the caller is not known."""
        self._metrics = metrics
        self._tracer = tracer
        self._tenant_of = tenant_of

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """See grpc.ServerInterceptor."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method.rpartition("/")[2]
        if method not in _METHODS:
            method = UNKNOWN  # whoever stands before this refuses methods that there are not, too
        parent = ""
        if self._tracer.active and method != _STREAM:
            metadata = dict(handler_call_details.invocation_metadata or ())
            parent = str(metadata.get(METADATA_KEY, ""))
        return _watched(handler, lambda context: self._call(method, parent, context))

    @contextmanager
    def _call(self, method: str, parent: str, context: grpc.ServicerContext) -> Iterator[None]:
        # None for strangers, whom nobody behind this lets in: they could make as many as they like.
        span = self._tracer.server_span(method, parent) if parent and self._is_known(context) else NO_SPAN
        try:
            with span:
                yield
        except Exception as error:
            code = context.code()  # type: ignore[attr-defined]  # missing in the stubs
            if isinstance(code, grpc.StatusCode):  # none where the edge has gone
                self._metrics.refused(self._tenant(context), method, code.name, _reason(error, code))
            raise

    def _is_known(self, context: grpc.ServicerContext) -> bool:
        try:
            self._tenant_of(context)
        except SFTError:
            return False
        return True

    def _tenant(self, context: grpc.ServicerContext) -> str:
        try:
            return self._tenant_of(context)
        except SFTError:
            return UNKNOWN


def observing(observer: Observer, tenant_of: Callable[[grpc.ServicerContext], str]) -> list[grpc.ServerInterceptor]:
    """To stand before all others; none where nobody wants to know. `tenant_of` may raise an SFTError."""
    if type(observer.metrics) is Metrics and not observer.tracer.active:
        return []
    return [CallObserver(observer.metrics, observer.tracer, tenant_of)]


def _watched(handler: Any, watch: Callable[[grpc.ServicerContext], Any]) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the same kind whose call is watched until its last answer."""
    kind = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
    behaviour = getattr(handler, kind)

    def one_answer(request: Any, context: grpc.ServicerContext) -> Any:
        with watch(context):
            return behaviour(request, context)

    def many_answers(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with watch(context):
            yield from behaviour(request, context)

    make = getattr(grpc, f"{kind}_rpc_method_handler")
    watched: grpc.RpcMethodHandler[Any, Any] = make(
        many_answers if handler.response_streaming else one_answer,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return watched


def _reason(error: BaseException, code: grpc.StatusCode) -> str:
    """The class of the error for which a handler broke the call off; the code where it gave none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, SFTError):
        cause = cause.__context__
    return code.name if cause is None else type(cause).__name__
