"""Messages that would take much more memory than their bytes are refused before they are parsed."""

import random

import pytest
from google.protobuf.message import DecodeError

from sft.errors import ProtocolError
from sft.v1 import split_training_pb2 as pb
from sft_cloud.admission import wire_check
from sft_cloud.admission.wire_check import MAX_FIELDS, MAX_PACKED_BYTES, check_wire


@pytest.fixture
def check_all(monkeypatch):
    """Small messages are looked at, too."""
    monkeypatch.setattr(wire_check, "UNCHECKED_BYTES", 0)


def tag(number, wire_type):
    return bytes([number << 3 | wire_type])


def with_length(number, data):
    size, prefix = len(data), b""
    while size > 0x7F:
        prefix, size = prefix + bytes([size & 0x7F | 0x80]), size >> 7
    return tag(number, 2) + prefix + bytes([size]) + data


LENGTHS = with_length(7, with_length(1, with_length(2, b"\1" * (MAX_PACKED_BYTES + 1))))

BOMBS = {
    "empty weights": (pb.EdgeMessage, with_length(3, b"") * (MAX_FIELDS + 1), "more than 131072 fields"),
    "lengths": (pb.EdgeMessage, LENGTHS, "lists of numbers of more than"),
    "lengths in parts": (
        pb.EdgeMessage,
        with_length(7, with_length(1, with_length(2, b"\1" * (MAX_PACKED_BYTES // 4)) * 5)),
        "lists of numbers of more than",
    ),
    "lengths that are not packed": (
        pb.EdgeMessage,
        with_length(7, with_length(1, (tag(2, 0) + b"\1") * (MAX_FIELDS + 1))),
        "more than 131072 fields",
    ),
    "group settings": (
        pb.EdgeMessage,
        with_length(4, with_length(4, with_length(1, b"")) * MAX_FIELDS),
        "more than 131072 fields",
    ),
    "parameter groups": (
        pb.OpenSessionRequest,
        with_length(10, with_length(2, b"") * (MAX_FIELDS + 1)),
        "more than 131072 fields",
    ),
    "a field that nobody knows": (pb.EdgeMessage, b"\xa2\x01\x01x" * (MAX_FIELDS + 1), "more than 131072 fields"),
    "groups": (pb.EdgeMessage, tag(15, 3) * 100_000, "a group"),
    "a field that is longer than the message": (pb.EdgeMessage, with_length(7, b"x" * 100_000)[:-1], "cut short"),
    "a number without end": (pb.EdgeMessage, b"\xff" * 100_000, "cut short"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name):
    message_type, data, says = BOMBS[name]
    with pytest.raises(ProtocolError, match=says):
        check_wire(data, message_type.DESCRIPTOR)


def test_tensors_may_be_large(edge):
    message = edge.forward(0)
    message.forward.activation.packed.data = bytes(50 << 20)
    check_wire(message.SerializeToString(), pb.EdgeMessage.DESCRIPTOR)
    upload = pb.UploadBlobRequest(sha256="0" * 64, data=bytes(1 << 20))
    check_wire(upload.SerializeToString(), pb.UploadBlobRequest.DESCRIPTOR)


def test_what_edges_send_is_let_through(edge, check_all):
    edge_messages = [edge.forward(0), edge.evaluate(commit=edge.commit_part(0)), edge.commit(3), edge.unlabelled(0)]
    for message in [*edge_messages, edge.request()]:
        check_wire(message.SerializeToString(), type(message).DESCRIPTOR)
    labels = pb.Labels(tokens=pb.Labels.Tokens(ids=[200_000] * (1 << 18)))
    check_wire(edge.forward(0, labels=labels).SerializeToString(), pb.EdgeMessage.DESCRIPTOR)


def test_what_protobuf_takes_is_taken_and_nothing_breaks(edge, check_all):
    """Of a few thousand mutations: whatever is refused here for its form, protobuf refuses, too."""
    draw = random.Random(0)
    sound = [
        m.SerializeToString() for m in (edge.forward(0), edge.commit(3), edge.unlabelled(0, commit=edge.commit_part(0)))
    ]
    refused = taken = 0
    for _ in range(3000):
        data = bytearray(draw.choice(sound))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data))
            if draw.random() < 0.5:
                data[at] = draw.randrange(256)
            else:
                del data[at : at + draw.randint(1, 8)]
        try:
            check_wire(bytes(data), pb.EdgeMessage.DESCRIPTOR)
            taken += 1
        except ProtocolError as error:
            refused += 1
            if "group" not in str(error):
                with pytest.raises(DecodeError):
                    pb.EdgeMessage.FromString(bytes(data))
    assert refused > 100
    assert taken > 100
