"""A handler around another is of its kind, whichever of the four that is."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from support.calls import SECONDS

from sft_cloud.rpc.handlers import around, at_once, raw

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
    handler = raw(handler_of(kind), lambda requests, context: b"one", lambda requests, context: iter([[b"many"]]))
    assert handler.request_streaming
    assert handler.response_streaming is kind.endswith("stream")
    assert handler.request_deserializer is None
    if handler.response_streaming:
        answers = list(handler.stream_stream(None, None))
        assert list(map(handler.response_serializer, answers)) == [b"many"]
        assert answers == [[]]  # what was sent is kept by nobody
    else:
        assert handler.response_serializer is None
        assert handler.stream_unary(None, None) == b"one"


def test_what_is_done_at_once_needs_no_thread_of_the_servers():
    threads, busy = ThreadPoolExecutor(1), threading.Event()
    threads.submit(busy.wait)
    server = grpc.server(threads)

    @contextmanager
    def block(context):
        yield context

    handler = around(grpc.stream_unary_rpc_method_handler(at_once(lambda requests, context: b"done")), block)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("here", {"Do": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert channel.stream_unary("/here/Do")(iter([]), timeout=SECONDS) == b"done"
    finally:
        busy.set()
        server.stop(0)
        threads.shutdown()
