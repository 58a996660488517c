"""Messages that come to a real server in parts: each part is charged before it is kept, and the next has a time."""

import time

import grpc
import pytest
from support.calls import open_session, refusal
from support.tiny_edge import attach

from sft.v1 import split_training_pb2 as pb
from sft.wire.parts import parts_of
from sft.wire.protocol import MAX_MESSAGE_BYTES, PART_BYTES
from sft_cloud.memory import Kind

SIZE = 2 * PART_BYTES + 100


def padded(message):
    """The message, with a field that nobody knows, so that it is large."""
    return message.SerializeToString() + b"\xc2\x3e\x80\x80\x80\x01" + bytes(2 << 20)


def part(size=PART_BYTES, total=0):
    return pb.EdgeMessage(part=pb.Part(data=bytes(size), total_bytes=total)).SerializeToString()


def test_a_message_in_parts_is_one_message(server, stub, raw, edge):
    begun = attach(open_session(stub, edge)).SerializeToString()
    message = edge.forward(0)
    message.number = 1
    parts = list(parts_of(padded(message)))
    assert len(parts) == 3
    answers = [pb.CloudMessage.FromString(data) for data in raw(server.address, "Train", iter([begun, *parts, *parts]))]
    assert [answer.WhichOneof("body") for answer in answers] == ["attached", "result", "result"]
    assert answers[1] == answers[2]
    assert server.memory.held()[Kind.MESSAGES] == 0


def test_half_of_a_message_is_charged_and_ended_like_any_stall(start_server, raw, never):
    server = start_server()
    call = raw(server.address, "Train", never(part(total=SIZE), part()))
    server.deadlines._waits.come("no next part", so_far=2)
    reasons = {wait.reason for wait in server.deadlines._waits.values()}
    assert reasons == {"no next part", "a message comes too slowly"}
    assert server.memory.held()[Kind.MESSAGES] == 2 * PART_BYTES
    server.deadlines._clock = lambda: time.monotonic() + 61
    server.deadlines.look()
    assert refusal(lambda: list(call))[0] is grpc.StatusCode.CANCELLED
    server.stop(grace_seconds=0)
    assert server.memory.held()[Kind.MESSAGES] == 0


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([part(total=PART_BYTES)], "is said to have 1048576 bytes"),
        ([part(total=MAX_MESSAGE_BYTES + 1)], "is said to have 268435457 bytes"),
        ([part()], "is said to have 0 bytes"),
        ([part(0, SIZE)], "a part of 0 bytes came"),
        ([part(PART_BYTES - 1, SIZE)], "each part but the last has 1048576"),
        ([part(total=SIZE), part(), part(99)], "a part of 99 bytes came"),
        ([part(PART_BYTES + 1, SIZE)], "a part of 1048577 bytes came"),
        ([part(total=SIZE), part(), part(101)], "a part of 101 bytes came, where a message has 100 left"),
        ([part(total=SIZE), part(total=SIZE)], "the message before this one has 1048576 of its 2097252 bytes"),
        ([part(total=SIZE), attach("x").SerializeToString()], "the message before this one has 1048576 of its"),
        ([part(total=SIZE), part()], "the stream ended in the middle of a message"),
        (list(parts_of(part(PART_BYTES, SIZE) + part(PART_BYTES, SIZE))), "the first message of a stream must be"),
    ],
)
def test_what_is_no_message_in_parts_is_refused(server, raw, messages, words):
    code, details = refusal(lambda: list(raw(server.address, "Train", iter(messages))))
    assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
    assert words in details


def test_where_there_is_no_room_the_message_may_come_again(server, raw):
    server.memory.total_bytes = 16 << 20
    messages = [part(total=SIZE), part(), part(100)]
    with server.memory.charge(Kind.SESSIONS, 13 << 20):
        code, details = refusal(lambda: list(raw(server.address, "Train", iter(messages))))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "this message would take" in details
    code, details = refusal(lambda: list(raw(server.address, "Train", iter([part(total=8 << 20)]))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "send smaller batches" in details
