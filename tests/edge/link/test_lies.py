"""Whatever a server says, an edge ends with one line or goes on; whole runs are in end_to_end/test_lying_server.py."""

from __future__ import annotations

import math
from typing import Any, Dict

import grpc
import pytest
import torch
from support.scripted_cloud import ScriptedCloud, one_line, serving

from sft.errors import ProtocolError, SFTError
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.messages import encode_activation
from sft_edge.link.answers import check_answer
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.link.link import Blob, Link
from sft_edge.link.retries import RetryPolicy

ACTIVATION = encode_activation(torch.ones(3, 2), pb.DATA_TYPE_FLOAT32, [2, 1], 2)
LABELS = pb.Labels(classes=pb.Labels.Classes(ids=[0, 1]))
AT_ONCE = RetryPolicy(reconnect_timeout_seconds=0)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"cloud_seconds": math.nan}, "worked for nan seconds"),
        ({"cloud_seconds": math.inf}, "worked for inf seconds"),
        ({"cloud_seconds": -1.0}, "worked for -1.0 seconds"),
        ({"result": pb.Result(squared_gradient_norm=-1.0)}, "sent -1.0 for the square of a norm"),
        ({"result": pb.Result(own_squared_norm=-math.inf)}, "sent -inf for the square of a norm"),
        ({"committed": pb.Committed(squared_gradient_norm=-0.5)}, "sent -0.5 for the square of a norm"),
        ({"checkpoint_saved": pb.CheckpointSaved()}, "did not say which"),
        ({"checkpoint_saved": pb.CheckpointSaved(id=pb.CheckpointId(sha256="../../x"))}, "did not say which"),
    ],
    ids=str,
)
def test_a_number_that_cannot_be_true(answer: Dict[str, Any], says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        check_answer(pb.CloudMessage(**answer))


def test_numbers_that_are_for_the_run_to_judge() -> None:
    for number in (0.0, math.nan, math.inf, 1e300):
        result = pb.Result(loss=number, squared_gradient_norm=number, own_squared_norm=number, gradient_product=-number)
        check_answer(pb.CloudMessage(result=result, cloud_seconds=0.25))
    check_answer(pb.CloudMessage(checkpoint_saved=pb.CheckpointSaved(error="full")))


def test_the_reader_ends_with_the_line() -> None:
    cloud = ScriptedCloud()

    def lie(answer: pb.CloudMessage) -> pb.CloudMessage:
        answer.cloud_seconds = math.nan
        return answer

    with serving(cloud) as address, Link(GrpcTransport(address), pb.OpenSessionRequest(), {}, AT_ONCE) as link:
        link.open()
        link.forward(0, 0, ACTIVATION, LABELS, 1.0).result()
        cloud.change_answer = lie
        with pytest.raises(ProtocolError, match="worked for nan seconds"):
            link.forward(0, 1, ACTIVATION, LABELS, 1.0).result()


@pytest.mark.parametrize(
    ("response", "says"),
    [
        ({"session_id": "s1", "next_step": 7}, "go on from step 7, which was not asked for"),
        ({"session_id": "s" * 1000}, "whose name is none"),
        ({"session_id": "s\x1b[2J"}, "whose name is none"),
        ({"missing_blobs": ["\x1b[2J" + "x" * 1000]}, r"never offered: \?\[2Jx+$"),
        ({"missing_blobs": ["a" * 64] * 5000}, "neither opened a session nor said what it lacks"),
        ({}, "neither opened a session nor said what it lacks"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_opens_no_session(monkeypatch: pytest.MonkeyPatch, response: Dict[str, Any], says: str) -> None:
    cloud, uploads = ScriptedCloud(), []
    monkeypatch.setattr(cloud, "OpenSession", lambda request, context: pb.OpenSessionResponse(**response))
    monkeypatch.setattr(GrpcTransport, "upload", lambda *arguments: uploads.append(arguments))
    with serving(cloud) as address:
        link = Link(GrpcTransport(address), pb.OpenSessionRequest(), {"a" * 64: Blob(1, lambda: iter([b"x"]))}, AT_ONCE)
        with link, pytest.raises(ProtocolError, match=says) as caught:
            link.open()
    assert len(one_line(caught.value)) < 200
    assert len(uploads) <= 1


def test_strings_of_package_device_and_time_are_of_no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = ScriptedCloud()
    odd = {"package_version": "\x1b" * 100_000, "device": "\n" * 100_000, "session_timeout_seconds": math.nan}
    response = pb.OpenSessionResponse(session_id="s1", **odd)
    monkeypatch.setattr(cloud, "OpenSession", lambda request, context: response)
    with serving(cloud) as address, Link(GrpcTransport(address), pb.OpenSessionRequest(), {}, AT_ONCE) as link:
        link.open()
        link.forward(0, 0, ACTIVATION, LABELS, 1.0).result()


def test_details_of_an_error_are_one_short_line() -> None:
    cloud = ScriptedCloud()
    cloud.open_error = grpc.StatusCode.INVALID_ARGUMENT, "\x1b[2J\r\n" + "x" * 5000
    with serving(cloud) as address, Link(
        GrpcTransport(address), pb.OpenSessionRequest(), {}, AT_ONCE
    ) as link, pytest.raises(SFTError) as caught:
        link.open()
    assert one_line(caught.value).isprintable()
    assert len(str(caught.value)) < 500
