"""What proxies on the way do to calls: answers of their own, limits, and calls that reach several servers."""

from __future__ import annotations

import hashlib
from typing import Callable, List

import grpc
import pytest
from support.proxy import TcpProxy
from support.scripted_cloud import ScriptedCloud, serving
from support.waits import ACTIVATION, LABELS, Waits, losses

from sft.errors import ProtocolError, ServerUnavailableError, SessionLostError
from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import INSTANCE_KEY
from sft_edge.link.cuts import Cuts
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.link.link import Blob, Link

Code = grpc.StatusCode
TOO_LARGE = "Received http2 header with status: 413"
NO_SERVER = "Received http2 header with status: 502"


class Several(ScriptedCloud):
    """Behind one address; which of them answers a call is the first of `turns`, and the next for the next call."""

    def __init__(self, *turns: str) -> None:
        super().__init__()
        self.turns = list(turns)
        self.knows: Callable[[str], bool] = lambda name: True
        self.refuses_probe = ""

    def sign(self, context: grpc.ServicerContext) -> str:
        name = self.turns.pop(0) if len(self.turns) > 1 else self.turns[0]
        context.set_trailing_metadata(((INSTANCE_KEY, name),))
        return name

    def OpenSession(self, request: pb.OpenSessionRequest, context: grpc.ServicerContext) -> pb.OpenSessionResponse:
        self.sign(context)
        return super().OpenSession(request, context)

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusResponse:
        name = self.sign(context)
        return pb.StatusResponse(caller="me", sessions=[pb.SessionStatus(label="s1")] if self.knows(name) else [])

    def Probe(self, request: pb.ProbeRequest, context: grpc.ServicerContext) -> pb.ProbeResponse:
        if self.refuses_probe:
            context.abort(Code.UNKNOWN, self.refuses_probe)
        return pb.ProbeResponse()


@pytest.fixture
def waits() -> Waits:
    return Waits()


def test_an_upload_that_a_proxy_refuses_is_not_tried_again(waits: Waits) -> None:
    cloud = ScriptedCloud()
    cloud.wanted = ["0" * 64]
    cloud.UploadBlob = lambda requests, context: context.abort(Code.UNKNOWN, TOO_LARGE)  # type: ignore[method-assign]
    with serving(cloud) as address:
        blobs = {"0" * 64: Blob(1, lambda: iter([b"x"]))}
        link = Link(GrpcTransport(address), pb.OpenSessionRequest(), blobs, waits.policy())
        with pytest.raises(ProtocolError, match=r"HTTP 413.*client_max_body_size 0"):
            link.open()
    assert not waits.delays


def test_a_proxy_without_a_server_behind_it_is_an_absent_server(waits: Waits) -> None:
    cloud = ScriptedCloud()
    cloud.open_error = (Code.UNAVAILABLE, NO_SERVER)
    with serving(cloud) as address:
        link = Link(GrpcTransport(address), pb.OpenSessionRequest(), {}, waits.policy())
        with pytest.raises(ServerUnavailableError, match=r"HTTP 502"):
            link.open()
    assert not waits.delays


def test_uploads_that_are_missing_again_at_another_server(waits: Waits) -> None:
    content = b"the weights"
    sha256 = hashlib.sha256(content).hexdigest()
    cloud = Several("one", "another", "one")
    cloud.wanted = [sha256, "1" * 64]  # the second never comes
    blobs = {name: Blob(len(content), lambda: iter([content])) for name in cloud.wanted}
    cloud.UploadBlob = lambda requests, context: (list(requests), pb.UploadBlobResponse())[1]  # type: ignore[method-assign]
    with serving(cloud) as address:
        link = Link(GrpcTransport(address), pb.OpenSessionRequest(), blobs, waits.policy(reconnect_timeout_seconds=0))
        with pytest.raises(ProtocolError, match="missing again: calls reach different servers"):
            link.open()


@pytest.mark.parametrize(
    ("turns", "expected", "says"),
    [
        (["one", "another", "one"], ProtocolError, "calls reach different servers"),
        (["one", "started anew"], SessionLostError, "no such session"),
        (["one"], SessionLostError, "no such session"),
    ],
)
def test_a_session_that_is_not_there(turns: List[str], expected: type, says: str, waits: Waits) -> None:
    cloud = Several(*turns)

    def refuse(message: pb.EdgeMessage, context: grpc.ServicerContext) -> None:
        cloud.sign(context)
        context.abort(Code.NOT_FOUND, "no such session")

    cloud.before_answer = refuse
    with serving(cloud) as address, Link(GrpcTransport(address), pb.OpenSessionRequest(), {}, waits.policy()) as link:
        link.open()
        with pytest.raises(expected, match=says):
            losses(link, range(1))


@pytest.mark.parametrize("is_there", [True, False])
def test_a_proxy_that_loses_why_a_stream_ended(is_there: bool, waits: Waits) -> None:
    """HAProxy passes RST_STREAM on in the place of a status: the server is asked."""
    cloud = Several("one")
    cloud.knows = lambda name: is_there
    left = [None, None]

    def end(message: pb.EdgeMessage, context: grpc.ServicerContext) -> None:
        if left:
            left.pop()
            context.abort(Code.CANCELLED, "Stream removed")

    cloud.before_answer = end
    with serving(cloud) as address, Link(GrpcTransport(address), pb.OpenSessionRequest(), {}, waits.policy()) as link:
        link.open()
        if is_there:
            assert losses(link, range(1)) == [0, 0]
        else:
            with pytest.raises(SessionLostError, match="there is no such session"):
                losses(link, range(1))
    assert len(waits.delays) == 2 * is_there


def test_streams_that_are_cut_at_the_same_size(waits: Waits, caplog: pytest.LogCaptureFixture) -> None:
    cloud = Several("one")
    big = pb.Activation(packed=pb.Tensor(data_type=pb.DATA_TYPE_FLOAT32, shape=[5000, 1], data=bytes(20_000)))
    with serving(cloud) as address, TcpProxy(address) as proxy:
        left = [None] * 4

        def cut(message: pb.EdgeMessage, context: grpc.ServicerContext) -> None:
            if message.number and message.number % 10 == 0 and left:
                left.pop()
                proxy.cut()

        cloud.before_answer = cut
        with Link(GrpcTransport(proxy.address), pb.OpenSessionRequest(), {}, waits.policy()) as link:
            link.open()
            for step in range(60):
                link.forward(step, 0, big, LABELS, 1).result()
                link.commit(step, [0.1], 1)
    said = [record.getMessage() for record in caplog.records if "has broken 3 times" in record.getMessage()]
    assert len(said) == 1, "once"
    assert "client_max_body_size 0" in said[0]


def test_messages_that_are_larger_than_what_a_proxy_takes(waits: Waits) -> None:
    cloud = Several("one")
    cloud.refuses_probe = TOO_LARGE
    big = pb.Activation(packed=pb.Tensor(data=bytes(100_000)))

    def reset(message: pb.EdgeMessage, context: grpc.ServicerContext) -> None:
        if message.number:
            context.abort(Code.CANCELLED, "Stream removed")

    cloud.before_answer = reset
    with serving(cloud) as address, Link(GrpcTransport(address), pb.OpenSessionRequest(), {}, waits.policy()) as link:
        link.open()
        with pytest.raises(ProtocolError, match="HTTP 413"):
            link.forward(0, 0, big, LABELS, 1).result()
    assert len(waits.delays) == 2


def test_what_ends_alike() -> None:
    def said(*streams: tuple) -> str:
        cuts = Cuts()
        return "".join(cuts.note(*stream) for stream in streams)

    assert said((1_050_000, 1), (1_100_000, 7), (1_048_600, 3)).count("1.05 MB") == 1
    assert "15s" in said((70_000, 15.0), (400_000, 15.2), (900_000, 15.1))
    assert not said((70_000, 1.0), (400_000, 15.2), (900_000, 70.1))
    assert not said((100, 0.1), (100, 0.1), (100, 0.1)), "a server that is away"
    assert ACTIVATION.packed.data
