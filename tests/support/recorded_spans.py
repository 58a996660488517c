"""A tracer whose spans a test can look at."""

from __future__ import annotations

from typing import Dict, List, Tuple

import pytest

from sft.tracing import OtelTracer

pytest.importorskip("opentelemetry.sdk", reason="the otel extra is missing")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


class RecordedSpans:
    """`tracer` makes them; they are here as soon as they have ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = OtelTracer(provider)

    def all(self) -> List[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> List[ReadableSpan]:
        return [span for span in self.all() if span.name == name]

    def edges(self) -> List[Tuple[str, str]]:
        """Names of parent and child, of all whose parent is here, in the order in which they ended."""
        names: Dict[int, str] = {span.context.span_id: span.name for span in self.all()}
        found = [(names.get(span.parent.span_id, ""), span.name) for span in self.all() if span.parent is not None]
        return [edge for edge in found if edge[0]]
