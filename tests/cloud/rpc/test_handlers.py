"""A handler around another is of its kind, whichever of the four that is."""

from contextlib import contextmanager

import grpc
import pytest

from sft_cloud.rpc.handlers import around, raw

KINDS = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]


def handler_of(kind):
    """Answers with what was asked and the context, once or twice."""

    def one(request, context):
        return [*request, context] if kind.startswith("stream") else [request, context]

    def many(request, context):
        yield one(request, context)
        yield "last"

    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(many if kind.endswith("stream") else one, bytes.decode, str.encode)


@pytest.mark.parametrize("kind", KINDS)
def test_around_each_kind(kind):
    told = []

    @contextmanager
    def block(context):
        told.append("begins")
        yield context + 1
        told.append("ends")

    handler = around(handler_of(kind), block)
    assert (handler.request_deserializer, handler.response_serializer) == (bytes.decode, str.encode)
    assert [name for name in KINDS if getattr(handler, name)] == [kind]
    answers = getattr(handler, kind)(iter(["asked"]) if kind.startswith("stream") else "asked", 1)
    if kind.endswith("stream"):
        assert next(answers) == ["asked", 2]
        assert told == ["begins"]
        assert list(answers) == ["last"]
    else:
        assert answers == ["asked", 2]
    assert told == ["begins", "ends"]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_each_kind(kind):
    handler = raw(handler_of(kind), lambda requests, context: b"one", lambda requests, context: iter([b"many"]))
    assert handler.request_streaming
    assert handler.response_streaming is kind.endswith("stream")
    assert handler.request_deserializer is handler.response_serializer is None
    answer = handler.stream_stream or handler.stream_unary
    answers = answer(None, None)
    assert answers == b"one" if handler.stream_unary else list(answers) == [b"many"]
