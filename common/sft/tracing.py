"""Traces by OpenTelemetry, where the environment asks for them; otherwise nothing of it is imported, and nothing sent.

They are asked for by `OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` or `OTEL_TRACES_EXPORTER`
(`otlp`, or `console` for lines on standard error), unless `OTEL_SDK_DISABLED` is true. The packages are the `otel`
extra. What else OpenTelemetry reads from the environment holds as it says, `OTEL_SERVICE_NAME` for one.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Mapping, Optional, Type, Union

from sft.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OtelSpan


Value = Union[str, int, float, bool]

METADATA_KEY = "traceparent"
"""Under which gRPC's metadata name the caller's span."""

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_TRACE_PARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context, version 00

_log = logging.getLogger(__name__)


class Span:
    """A piece of work in a trace, which ends with the `with` block or with `end`; this one is of no trace."""

    parent = ""
    """What names this span to others, as W3C's `traceparent`; empty for a span of no trace."""

    def set(self, name: str, value: Value) -> None:
        """Notes something about the work."""

    def end(self, error: str = "") -> None:
        """The work is over; `error` says what went wrong, if anything did. Ending twice does nothing."""

    def __enter__(self) -> Span:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        self.end("" if error is None else type(error).__name__)


class Tracer:
    """Makes spans; this one makes none that anybody will see."""

    active = False
    """Whether somebody will see them."""

    def span(
        self, name: str, parent: str = "", attributes: Optional[Mapping[str, Value]] = None, *, asks: bool = False
    ) -> Span:
        """Begins a piece of work, part of the span that `parent` names, or else of what the caller is in.

        `asks`: it is done on the other side.
        """
        return NO_SPAN

    def server_span(self, name: str, parent: str, attributes: Optional[Mapping[str, Value]] = None) -> Span:
        """As `span`, for work that the other side asked for; without a well-formed `parent` nobody will see it."""
        return NO_SPAN

    def past_span(self, name: str, parent: str, began_ns: int, ended_ns: int, error: str = "") -> None:
        """As `span`, for work that is over: Unix time in nanoseconds; `error` as `Span.end` has it."""

    def close(self) -> None:
        """Sends what has not been sent."""


NO_SPAN = Span()
"""For where nobody asked for traces."""
NO_TRACER = Tracer()
"""Likewise."""


def open_tracer(service_name: str, environment: Optional[Mapping[str, str]] = None) -> Tracer:
    """A tracer as the environment asks for one; `service_name` where it does not name the service itself.

    Where the packages are missing that says a warning: the environment may be meant for other programs.
    """
    environment = os.environ if environment is None else environment
    if not is_asked_for(environment):
        return NO_TRACER
    try:
        return _make(service_name, environment)
    except ImportError as error:
        _log.warning("no traces, as %s is missing: pip install 'split-fine-tuning[otel]'", error.name)
    except ValueError as error:
        _log.warning("no traces: %s", error)
    return NO_TRACER


def is_asked_for(environment: Mapping[str, str]) -> bool:
    """Whether the environment asks for traces."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter:
        return exporter != "none"
    return any(environment.get(name) for name in _ENDPOINTS)


class _OtelSpan(Span):
    def __init__(self, span: OtelSpan) -> None:
        self._span = span
        context = span.get_span_context()
        self.parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    def set(self, name: str, value: Value) -> None:
        self._span.set_attribute(name, value)

    def end(self, error: str = "", at_ns: Optional[int] = None) -> None:
        if error:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, error))
        if self._span.is_recording():
            self._span.end(at_ns)


class OtelTracer(Tracer):
    """Makes spans with a provider of OpenTelemetry's SDK."""

    active = True

    def __init__(self, provider: TracerProvider, owned: bool = True) -> None:
        """`owned`: it ends with this."""
        self._provider = provider
        self._owned = owned
        self._tracer = provider.get_tracer("split-fine-tuning", __version__)

    def span(
        self, name: str, parent: str = "", attributes: Optional[Mapping[str, Value]] = None, *, asks: bool = False
    ) -> Span:
        from opentelemetry.trace import SpanKind

        kind = SpanKind.CLIENT if asks else SpanKind.INTERNAL
        return _OtelSpan(self._tracer.start_span(name, _context(parent), kind=kind, attributes=dict(attributes or {})))

    def server_span(self, name: str, parent: str, attributes: Optional[Mapping[str, Value]] = None) -> Span:
        from opentelemetry.trace import SpanKind

        context = _context(parent)
        if context is None:  # whoever does not trace is not traced
            return NO_SPAN
        kind = SpanKind.SERVER
        return _OtelSpan(self._tracer.start_span(name, context, kind=kind, attributes=dict(attributes or {})))

    def past_span(self, name: str, parent: str, began_ns: int, ended_ns: int, error: str = "") -> None:
        _OtelSpan(self._tracer.start_span(name, _context(parent), start_time=began_ns)).end(error, ended_ns)

    def close(self) -> None:
        if self._owned:
            self._provider.shutdown()


def _make(service_name: str, environment: Mapping[str, str]) -> OtelTracer:
    from opentelemetry import trace
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):  # a script that traces has set its own, which gets these spans, too
        return OtelTracer(provider, owned=False)
    named = {} if environment.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: service_name}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(_exporter(environment)))
    return OtelTracer(provider)


def _exporter(environment: Mapping[str, str]) -> Any:
    kind = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower() or "otlp"
    if kind == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        # Standard output belongs to what a command is asked for.
        return ConsoleSpanExporter(out=sys.stderr, formatter=lambda span: span.to_json(indent=None) + "\n")
    if kind != "otlp":
        raise ValueError(f"OTEL_TRACES_EXPORTER is {kind[:20]!r}, but otlp and console are all that is known here")
    protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol and protocol != "grpc":
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol[:20]!r}, but only grpc is known here")
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _context(parent: str) -> Any:
    """What OpenTelemetry calls a context: that of a span elsewhere; None where there is none, or it is malformed."""
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    if not _TRACE_PARENT.fullmatch(parent):
        return None
    _, trace_id, span_id, flags = parent.split("-")
    context = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
    return set_span_in_context(NonRecordingSpan(context)) if context.is_valid else None
