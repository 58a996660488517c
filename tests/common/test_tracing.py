"""Traces where the environment asks for them, and nothing anywhere else."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Dict

import pytest
from support.recorded_spans import RecordedSpans

from sft.tracing import NO_TRACER, Span, is_asked_for, open_tracer


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "edge"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4317"}, True),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}, False),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "console"}, False),
    ],
    ids=str,
)
def test_what_asks_for_traces(environment: Dict[str, str], expected: bool) -> None:
    assert is_asked_for(environment) is expected
    if not expected:
        assert open_tracer("sft-edge", environment) is NO_TRACER


def test_nothing_is_imported_where_nobody_asks() -> None:
    program = """
import sys
from sft.tracing import open_tracer
with open_tracer("sft-edge").span("step") as span:
    assert span.parent == ""
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER is 'zipkin'"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "OTEL_EXPORTER_OTLP_PROTOCOL is 'http/protobuf'",
        ),
    ],
    ids=["exporter", "protocol"],
)
def test_what_is_not_known_here_is_a_warning(
    environment: Dict[str, str], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert open_tracer("sft-edge", environment) is NO_TRACER
    (message,) = caplog.messages
    assert says in message


def test_missing_packages_are_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with caplog.at_level(logging.WARNING):
        assert open_tracer("sft-edge", {"OTEL_TRACES_EXPORTER": "console"}) is NO_TRACER
    (message,) = caplog.messages
    assert "pip install 'split-fine-tuning[otel]'" in message


def test_console_lines_go_to_standard_error() -> None:
    program = """
from sft.tracing import open_tracer
tracer = open_tracer("sft-edge")
with tracer.span("step"):
    pass
tracer.close()
"""
    environment = {**os.environ, "OTEL_TRACES_EXPORTER": "console", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    (line,) = done.stderr.splitlines()
    assert '"name": "step"' in line
    assert '"service.name": "sft-edge"' in line


def test_a_span_names_itself_to_others_and_they_become_parts_of_it() -> None:
    spans = RecordedSpans()
    with spans.tracer.span("step", attributes={"sft.step": 3}) as step:
        spans.tracer.span("forward", step.parent, asks=True).end()
        spans.tracer.server_span("work", step.parent).end("SessionLostError")
    work, (forward,), (root,) = spans.named("work")[0], spans.named("forward"), spans.named("step")
    assert spans.edges() == [("step", "forward"), ("step", "work")]
    assert (forward.kind.name, work.kind.name, root.kind.name) == ("CLIENT", "SERVER", "INTERNAL")
    assert root.attributes == {"sft.step": 3}
    assert (work.status.status_code.name, work.status.description) == ("ERROR", "SessionLostError")
    assert len({span.context.trace_id for span in spans.all()}) == 1


def test_ending_twice_is_ending_once() -> None:
    spans = RecordedSpans()
    with spans.tracer.span("step") as step:
        step.end()
    assert len(spans.all()) == 1


def test_an_error_in_the_block_is_noted_and_goes_on() -> None:
    spans = RecordedSpans()
    with pytest.raises(ZeroDivisionError), spans.tracer.span("step"):
        raise ZeroDivisionError
    assert spans.named("step")[0].status.description == "ZeroDivisionError"


@pytest.mark.parametrize(
    "parent",
    ["", "00", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "00-" + "g" * 32 + "-" + "1" * 16 + "-01", "x" * 999],
)
def test_whoever_does_not_trace_is_not_traced(parent: str) -> None:
    spans = RecordedSpans()
    with spans.tracer.server_span("work", parent) as span:
        assert type(span) is Span
    assert spans.all() == []
