"""The edge's part of a trace: a span for each step, below it one for each message until its answer is here.

The cloud's work becomes part of the message's span: its name is in the message, and in the metadata of other calls.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import grpc

from sft.tracing import METADATA_KEY, NO_SPAN, NO_TRACER, Span, Tracer, open_tracer
from sft.v1 import split_training_pb2 as pb

_OF_A_STEP = ("forward", "backward")


class StepSpans:
    """Of one link. A step begins with its first Forward, and ends when it is committed or given up."""

    def __init__(self, tracer: Tracer = NO_TRACER) -> None:
        self._tracer = tracer
        self._step: Optional[int] = None
        self._span = NO_SPAN

    def message(self, message: pb.EdgeMessage) -> Span:
        """Begins the span of a message that is about to go out, and names it in the message; its answer ends it."""
        if not self._tracer.active:
            return self._span
        body = message.WhichOneof("body") or ("commit" if message.HasField("commit") else "no body")
        if body in _OF_A_STEP and message.step != self._step:
            self.end_step()
            self._step = message.step
            self._span = self._tracer.span("step", attributes={"sft.step": message.step})
        attributes = {"sft.step": message.step, "sft.micro_batch": message.micro_batch}
        span = self._tracer.span(body, self._span.parent, attributes, asks=True)
        message.trace_parent = span.parent
        return span

    def end_step(self) -> None:
        """The step is taken, or will never be."""
        self._span.end()
        self._step, self._span = None, NO_SPAN


class _Details(NamedTuple):
    """What gRPC wants to know of a call, in the form it wants it."""

    method: str
    timeout: Optional[float]
    metadata: Optional[List[Tuple[str, str]]]
    credentials: Any
    wait_for_ready: Optional[bool]
    compression: Any


class _Interceptor(
    grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamUnaryClientInterceptor
):
    """A span for each call but the stream, whose messages have their own."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def intercept_unary_unary(self, continuation: Callable[..., Any], client_call_details: Any, request: Any) -> Any:
        return self._call(continuation, client_call_details, request)

    def intercept_unary_stream(self, continuation: Callable[..., Any], client_call_details: Any, request: Any) -> Any:
        return self._call(continuation, client_call_details, request)

    def intercept_stream_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request_iterator: Any
    ) -> Any:
        return self._call(continuation, client_call_details, request_iterator)

    def _call(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        method = str(details.method).rpartition("/")[2]
        span = self._tracer.span(method, asks=True)
        metadata = [*(details.metadata or ()), (METADATA_KEY, span.parent)]
        known = (details.credentials, details.wait_for_ready, getattr(details, "compression", None))
        call = continuation(_Details(details.method, details.timeout, metadata, *known), request)

        def end() -> None:
            code = call.code()
            span.end("" if code is grpc.StatusCode.OK else code.name)

        if call.done() or not call.add_callback(end):
            end()  # it is over already
        return call


def traced(channel: grpc.Channel, tracer: Tracer) -> grpc.Channel:
    """The channel whose calls carry the names of their spans; the channel itself where nobody traces."""
    return grpc.intercept_channel(channel, _Interceptor(tracer)) if tracer.active else channel


@lru_cache(maxsize=None)
def edge_tracer() -> Tracer:
    """The tracer of this process: its spans are sent by one thread, however many runs it sees."""
    return open_tracer("sft-edge")
