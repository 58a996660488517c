"""Tells the observer of every call: an interceptor in front of those that may refuse one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from sft.errors import SFTError
from sft.tracing import METADATA_KEY, NO_SPAN, Tracer
from sft.wire.protocol import TRAIN
from sft_cloud.observability.metrics import METHODS, NO_SUCH_METHOD, UNKNOWN, Metrics
from sft_cloud.observability.observer import Observer
from sft_cloud.rpc import Call, Handler, around, outcome


class CallObserver(grpc.ServerInterceptor):
    """Counts the calls that end with an error, and makes spans of those of known callers."""

    def __init__(self, metrics: Metrics, tracer: Tracer) -> None:
        self._metrics = metrics
        self._tracer = tracer

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """See grpc.ServerInterceptor."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        # Whoever stands behind this refuses methods that there are not, too.
        method = METHODS.get(handler_call_details.method, NO_SUCH_METHOD)
        parent = ""
        # A call as long as a run is no piece of work; its messages are.
        if self._tracer.active and handler_call_details.method != TRAIN:
            metadata = dict(handler_call_details.invocation_metadata or ())
            parent = str(metadata.get(METADATA_KEY, ""))
        return around(handler, lambda call: self._watched(method, parent, call))

    @contextmanager
    def _watched(self, method: str, parent: str, call: Call) -> Iterator[Call]:
        # None for strangers, whom nobody behind this lets in: they could make as many as they like.
        tenant = _tenant(call)
        span = self._tracer.server_span(method, parent) if parent and tenant != UNKNOWN else NO_SPAN
        self._metrics.known(tenant)
        try:
            with span:
                yield call
        except grpc.RpcError:
            raise  # the edge has gone
        except Exception as error:
            code, _ = outcome(call, error)
            reason = type(error).__name__ if isinstance(error, SFTError) else code.name
            self._metrics.refused(tenant, method, code.name, reason)
            raise


def observing(observer: Observer) -> list[grpc.ServerInterceptor]:
    """To stand before all others but a CallInterceptor; none where nobody wants to know."""
    if type(observer.metrics) is Metrics and not observer.tracer.active:
        return []
    return [CallObserver(observer.metrics, observer.tracer)]


def _tenant(call: Call) -> str:
    try:
        return call.caller.name
    except SFTError:
        return UNKNOWN
