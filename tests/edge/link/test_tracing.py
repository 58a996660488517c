"""A step of the edge is a span, its messages are below it, and they name themselves to the cloud."""

from __future__ import annotations

import pytest
from support.recorded_spans import RecordedSpans

from sft.v1 import split_training_pb2 as pb
from sft_edge.link.tracing import StepSpans


@pytest.fixture
def recorded() -> RecordedSpans:
    return RecordedSpans()


def forward(step: int, micro_batch: int = 0) -> pb.EdgeMessage:
    return pb.EdgeMessage(step=step, micro_batch=micro_batch, forward=pb.Forward())


def test_a_step_holds_its_messages(recorded: RecordedSpans) -> None:
    spans = StepSpans(recorded.tracer)
    for message in (forward(0, 0), forward(0, 1), pb.EdgeMessage(step=0, backward=pb.Backward())):
        span = spans.message(message)
        assert message.trace_parent == span.parent != ""
        span.end()
    spans.end_step()
    assert recorded.edges() == [("step", "forward"), ("step", "forward"), ("step", "backward")]
    (step,) = recorded.named("step")
    assert step.attributes == {"sft.step": 0}
    assert [span.attributes["sft.micro_batch"] for span in recorded.named("forward")] == [0, 1]


def test_steps_follow_each_other(recorded: RecordedSpans) -> None:
    spans = StepSpans(recorded.tracer)
    for step in range(3):
        spans.message(forward(step)).end()
        if step != 1:  # which nobody commits, nor gives up in so many words
            spans.end_step()
    assert [span.attributes["sft.step"] for span in recorded.named("step")] == [0, 1, 2]
    assert len({span.context.trace_id for span in recorded.named("forward")}) == 3


def test_what_is_between_steps_stands_for_itself(recorded: RecordedSpans) -> None:
    spans = StepSpans(recorded.tracer)
    spans.message(pb.EdgeMessage(evaluate=pb.Evaluate())).end()
    spans.message(pb.EdgeMessage(step=0, commit=pb.Commit())).end()
    assert [(span.name, span.parent) for span in recorded.all()] == [("evaluate", None), ("commit", None)]


def test_without_traces_a_message_stays_as_it_is() -> None:
    spans, message = StepSpans(), forward(0)
    spans.message(message).end()
    spans.end_step()
    assert message == forward(0)
