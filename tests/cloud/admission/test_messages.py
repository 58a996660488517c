"""What a real server takes for a message: its form, its size, and how long it is kept."""

import sys

import grpc
import pytest
from support.calls import SECONDS, Stream, open_session, refusal
from support.tiny_edge import attach

from sft.v1 import split_training_pb2 as pb
from sft.wire.parts import parts_of
from sft.wire.protocol import HEALTH_WATCH, MAX_RECEIVED_BYTES
from sft_cloud.admission.interceptor import _Admitted

METHODS = ("OpenSession", "UploadBlob", "Train", "DownloadWeights")


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_message_is_refused_as_such(server, raw, method):
    code, details = refusal(lambda: list(raw(server.address, method, iter([b"\xff\xff\xff"]))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("what came is no ")


def test_other_services_do_not_tell_what_went_wrong_inside(server, raw):
    code, details = refusal(lambda: list(raw(server.address, "/grpc.health.v1.Health/Watch", iter([b"\xff\xff"]))))
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "what came is no message")


@pytest.mark.parametrize("method", ["OpenSession", "UploadBlob", "DownloadWeights", "Train"])
def test_each_method_takes_messages_of_its_size(server, raw, method):
    code, details = refusal(lambda: list(raw(server.address, method, iter([bytes((4 << 20) + 2000)]))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "this method takes at most" in details


def test_a_message_larger_than_any_is_refused(server, raw):
    options = [("grpc.max_send_message_length", -1)]
    call = raw(server.address, "Train", iter([bytes(MAX_RECEIVED_BYTES + 1)]), options=options)
    assert refusal(lambda: list(call))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_small_messages_that_would_take_much_memory_are_refused(server, raw):
    weights = b"\x1a\x00" * (1 << 20)
    assert refusal(lambda: list(raw(server.address, "Train", parts_of(weights)))) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "the message has more than 131072 fields",
    )


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_nothing_compressed_is_taken(server, raw, algorithm):
    call = raw(server.address, "Train", iter([bytes(200 << 20)]), compression=algorithm)
    code, details = refusal(lambda: list(call))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert "is disabled" in details


def test_headers_have_a_size(server, connect):
    stub = connect(server.address)
    request = pb.DownloadWeightsRequest(session_id="x")
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.DownloadWeights(request, metadata=[("name", "x" * 20_000)], timeout=SECONDS))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_health_watch_takes_messages_of_its_size(server, raw):
    code, details = refusal(lambda: list(raw(server.address, HEALTH_WATCH, iter([bytes((1 << 16) + 1)]))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "this method takes at most 65536" in details


def test_a_stream_that_idles_keeps_no_message(server, connect, edge, monkeypatch):
    came, messages, answers = [], [], []
    parsed, serialized = _Admitted._parsed, _Admitted._serialized

    def parse(admitted, data, call):
        came.append(data)
        messages.append(parsed(admitted, data, call))
        return messages[-1]

    def serialize(admitted, response):
        answers.append(response)
        return serialized(admitted, response)

    stub = connect(server.address)
    session_id = open_session(stub, edge)
    monkeypatch.setattr(_Admitted, "_parsed", parse)
    monkeypatch.setattr(_Admitted, "_serialized", serialize)
    stream = Stream(stub, attach(session_id))
    next(stream.call)
    server.deadlines._waits.come("idle stream")
    made = [bytes(100_000)]
    (alone,) = [sys.getrefcount(one) for one in (*made,)]
    assert [sys.getrefcount(one) for one in (*came, *messages, *answers)] == [alone] * 3
    stream.ask(edge.forward(0))
    server.deadlines._waits.come("idle stream", so_far=2)
    # The answer to a forward is remembered for who reconnects.
    assert [sys.getrefcount(one) for one in (*came, *messages)] == [alone] * 4
    stream.end()
