"""Whatever goes wrong on the stream becomes one of our errors, in one line and in time, for all that is under way."""

from __future__ import annotations

import threading
from functools import partial
from typing import Callable, Iterator, Type

import grpc
import pytest
from support.scripted_cloud import TIMEOUT_SECONDS, ScriptedCloud, one_line, serving, through_proxy

from sft.errors import (
    AccessError,
    ProtocolError,
    SessionLostError,
    SFTError,
)
from sft.v1 import split_training_pb2 as pb
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.link.link import Blob, Link
from sft_edge.link.retries import GivenUpError, RetryPolicy
from sft_edge.link.transport import Stream

Code = grpc.StatusCode
ACTIVATION = pb.Activation(
    packed=pb.Tensor(data_type=pb.DATA_TYPE_FLOAT32, shape=[2, 1], data=bytes(8)), lengths=[1, 1]
)
LABELS = pb.Labels(classes=pb.Labels.Classes(ids=[0, 1]))
REQUEST = pb.OpenSessionRequest()
AT_ONCE = RetryPolicy(reconnect_timeout_seconds=0)
"""With it a link that breaks is given up; test_reconnect.py is about links that are mended."""


@pytest.fixture
def cloud() -> ScriptedCloud:
    return ScriptedCloud()


def stream_error(cloud: ScriptedCloud, expected: Type[SFTError]) -> str:
    """The message of the error that both of two training messages under way end with, and everything after them."""
    with serving(cloud) as address, Link(GrpcTransport(address), REQUEST, {}, AT_ONCE) as link:
        link.open()
        calls = []
        for index in range(2):
            try:
                calls.append(link.forward(0, index, ACTIVATION, LABELS, 1).result)
            except expected as error:  # as soon as that
                calls.append(partial(_raise, error))
        return fails(link, calls, expected)


def _raise(error: BaseException) -> None:
    raise error


def fails(link: Link, calls: list, expected: Type[SFTError]) -> str:
    later: list[Callable[[], object]] = [
        lambda: link.forward(9, 0, ACTIVATION, LABELS, 1),
        lambda: link.evaluate(9, 0, ACTIVATION),
        lambda: link.backward(9, 0, pb.Tensor()),
        lambda: link.commit(9, [0.1], 1),
        lambda: link.weigh(0, 1.0),
        lambda: link.scale_gradients(0.5),
        lambda: link.load_state(Blob(5, lambda: iter([b"state"])), "0" * 64, True),
        lambda: link.check(),
        lambda: link.weights(),
    ]
    errors = []
    for call in calls + later:
        with pytest.raises(SFTError) as caught:
            call()
        errors.append(caught.value)
    assert all(error is errors[0] for error in errors)
    assert type(errors[0]) is expected or (expected is SessionLostError and type(errors[0]) is GivenUpError)
    return one_line(errors[0])


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (Code.NOT_FOUND, SessionLostError),
        (Code.CANCELLED, SessionLostError),
        (Code.UNAVAILABLE, SessionLostError),
        (Code.INTERNAL, SessionLostError),
        (Code.RESOURCE_EXHAUSTED, SessionLostError),
        (Code.UNAUTHENTICATED, AccessError),
        (Code.FAILED_PRECONDITION, ProtocolError),
        (Code.INVALID_ARGUMENT, ProtocolError),
    ],
)
def test_a_server_that_ends_the_stream_is_quoted(cloud: ScriptedCloud, code: Code, expected: Type[SFTError]) -> None:
    def abort(message: pb.EdgeMessage, context: grpc.ServicerContext) -> None:
        if message.HasField("forward"):
            context.abort(code, "the sentence of the server")

    cloud.before_answer = abort
    assert "the sentence of the server" in stream_error(cloud, expected)


def test_a_stream_that_failed_leaves_no_thread(cloud: ScriptedCloud) -> None:
    cloud.last_message = lambda message: message.HasField("forward")
    with serving(cloud) as address, Link(GrpcTransport(address), REQUEST, {}, AT_ONCE) as link:
        link.open()
        before = set(threading.enumerate())
        pending = link.forward(0, 0, ACTIVATION, LABELS, 1)
        started = set(threading.enumerate()) - before
        with pytest.raises(SessionLostError):
            pending.result()
        assert started
        for thread in started:
            if not thread.name.startswith("ThreadPoolExecutor"):  # the server's
                thread.join(TIMEOUT_SECONDS)
                assert not thread.is_alive(), thread


def test_a_server_that_ends_the_stream_without_an_error(cloud: ScriptedCloud) -> None:
    cloud.last_message = lambda message: message.HasField("forward")
    assert "ended the stream before the run did" in stream_error(cloud, SessionLostError)


def test_an_answer_to_no_question(cloud: ScriptedCloud) -> None:
    cloud.change_answer = lambda answer: pb.CloudMessage(number=9, step=7, committed=pb.Committed(next_step=8))
    assert "answered message 9, which was never sent" in stream_error(cloud, ProtocolError)


def test_an_answer_to_another_question(cloud: ScriptedCloud) -> None:
    def other(answer: pb.CloudMessage) -> pb.CloudMessage:
        is_result = answer.HasField("result")
        return pb.CloudMessage(number=1, step=7, committed=pb.Committed()) if is_result else answer

    cloud.change_answer = other
    assert "answered what was not asked: committed for step 7" in stream_error(cloud, ProtocolError)


def test_an_answer_without_a_body(cloud: ScriptedCloud) -> None:
    cloud.change_answer = lambda answer: pb.CloudMessage()
    assert "answered message 0, which was never sent" in stream_error(cloud, ProtocolError)


class _Garbled(Stream):
    """Whatever the cloud answers, a byte comes that no message starts with."""

    def __init__(self, inner: Stream) -> None:
        self._inner = inner

    def __next__(self) -> bytes:
        next(self._inner)
        return b"\xff"

    def cancel(self) -> None:
        self._inner.cancel()


class _GarblingTransport(GrpcTransport):
    def stream(self, messages: Iterator[bytes]) -> Stream:
        return _Garbled(super().stream(messages))


def test_an_answer_that_is_none_of_ours(cloud: ScriptedCloud) -> None:
    with serving(cloud) as address, Link(_GarblingTransport(address), REQUEST, {}, AT_ONCE) as link:
        link.open()
        with pytest.raises(ProtocolError, match="sent something that is not an answer"):
            link.forward(0, 0, ACTIVATION, LABELS, 1).result()


def test_a_message_over_the_limit_is_not_a_full_server(cloud: ScriptedCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_edge.link.grpc_transport.CLIENT_OPTIONS", [("grpc.max_send_message_length", 1000)])
    huge = pb.Activation(packed=pb.Tensor(data=bytes(1001)))
    with serving(cloud) as address, Link(GrpcTransport(address), REQUEST, {}, AT_ONCE) as link:
        link.open()
        with pytest.raises(ProtocolError, match="larger than max"):
            link.forward(0, 0, huge, LABELS, 1).result()


def test_a_server_that_vanishes_in_the_middle_of_a_step(cloud: ScriptedCloud) -> None:
    cloud.before_answer = cloud.hang
    with through_proxy(cloud) as (proxy, transport), Link(transport, REQUEST, {}, AT_ONCE) as link:
        link.open()
        proxy.up.cut_after = proxy.up.forwarded + 40_000
        big = pb.Activation(packed=pb.Tensor(data=bytes(100_000)))
        pending = link.forward(0, 0, big, LABELS, 1)
        assert proxy.address in fails(link, [pending.result], SessionLostError)
        assert not [message for message in cloud.received if message.HasField("forward")]


def test_a_link_that_goes_dead_without_a_word(cloud: ScriptedCloud) -> None:
    with through_proxy(cloud) as (proxy, transport), Link(
        transport, REQUEST, {}, RetryPolicy(0.3, reconnect_timeout_seconds=0)
    ) as link:
        link.open()
        link.forward(0, 0, ACTIVATION, LABELS, 1).result()
        proxy.up.swallow = True
        pending = [link.forward(1, index, ACTIVATION, LABELS, 1) for index in range(2)]
        message = fails(link, [each.result for each in pending], SessionLostError)
    assert message == "the cloud did not answer within 0.3 s"


def test_a_cloud_that_does_not_end_the_stream_is_not_waited_for(
    cloud: ScriptedCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft_edge.link.reliable_stream.CLOSE_TIMEOUT_SECONDS", 0.1)
    cloud.before_answer = cloud.hang
    with serving(cloud) as address:
        link = Link(GrpcTransport(address), REQUEST, {}, AT_ONCE)
        link.open()
        pending = link.forward(0, 0, ACTIVATION, LABELS, 1)
        link.close()
        with pytest.raises(SessionLostError):
            pending.result()
        assert cloud.ended.wait(TIMEOUT_SECONDS)
        assert not cloud.ended_properly.is_set()
