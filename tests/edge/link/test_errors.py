"""What can go wrong until a session is open becomes one of our errors, in one line and in time; so do stalled blobs."""

from __future__ import annotations

import hashlib
import http.server
import socket
import socketserver
import threading
from typing import Iterator, Type

import grpc
import pytest
from support.scripted_cloud import ScriptedCloud, one_line, serving, through_proxy

from sft.errors import (
    AccessError,
    CheckpointError,
    LinkError,
    NotOursError,
    ProtocolError,
    ServerFullError,
    ServerUnavailableError,
    SessionLostError,
    SFTError,
    StreamBrokenError,
    UsageError,
)
from sft.v1 import split_training_pb2 as pb
from sft.v1.split_training_pb2_grpc import SplitTrainingServicer
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.link.link import Blob, Link
from sft_edge.link.retries import GivenUpError, RetryPolicy

Code = grpc.StatusCode
REQUEST = pb.OpenSessionRequest()
AT_ONCE = RetryPolicy(reconnect_timeout_seconds=0)
"""With it a link that breaks is given up; test_reconnect.py is about links that are mended."""


@pytest.fixture
def cloud() -> ScriptedCloud:
    return ScriptedCloud()


def opening_error(address: str, expected: Type[SFTError]) -> str:
    """The message of the error that opening a session at `address` raises."""
    with pytest.raises(SFTError) as caught, Link(
        GrpcTransport(address, connect_timeout_seconds=0.3), REQUEST, {}, AT_ONCE
    ) as link:
        link.open()
    assert type(caught.value) is expected or (expected is SessionLostError and type(caught.value) is GivenUpError)
    return one_line(caught.value)


# Opening a session.


def test_nobody_listens() -> None:
    with socket.socket() as bound:  # bound but not listening: nobody else can get the port meanwhile
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        message = opening_error(address, ServerUnavailableError)
    assert message == f"nobody answers at {address} (Connection refused): is `sft-cloud serve` running there?"


def test_a_peer_that_accepts_and_is_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        message = opening_error(f"127.0.0.1:{silent.getsockname()[1]}", NotOursError)
    assert "answers, but it is not an sft-cloud server" in message


class _Http(http.server.BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


class _HangsUp(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(b"SSH-2.0-OpenSSH_9.0\r\n")


@pytest.mark.parametrize("handler", [_Http, _HangsUp])
def test_a_peer_that_speaks_something_else(handler: Type[socketserver.BaseRequestHandler]) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        message = opening_error(f"127.0.0.1:{server.server_address[1]}", NotOursError)
        server.shutdown()
        thread.join()
    assert "answers, but it is not an sft-cloud server" in message


def test_a_grpc_server_of_another_kind() -> None:
    with serving(SplitTrainingServicer()) as address:  # its methods are UNIMPLEMENTED
        assert "is not an sft-cloud server" in opening_error(address, ProtocolError)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (Code.FAILED_PRECONDITION, ProtocolError),
        (Code.INVALID_ARGUMENT, ProtocolError),
        (Code.RESOURCE_EXHAUSTED, ServerFullError),
        (Code.UNAUTHENTICATED, AccessError),
        (Code.PERMISSION_DENIED, AccessError),
        (Code.NOT_FOUND, SessionLostError),
        (Code.UNAVAILABLE, SessionLostError),
        (Code.CANCELLED, SessionLostError),
        (Code.UNKNOWN, SessionLostError),
        (Code.INTERNAL, LinkError),
    ],
)
def test_a_server_that_refuses_is_quoted(cloud: ScriptedCloud, code: Code, expected: Type[SFTError]) -> None:
    cloud.open_error = code, "the sentence of the server"
    with serving(cloud) as address:
        assert "the sentence of the server" in opening_error(address, expected)


def test_a_server_that_is_quoted_cannot_draw_on_the_terminal(cloud: ScriptedCloud) -> None:
    cloud.open_error = Code.FAILED_PRECONDITION, "\x1b[2J\x07all is well"
    with serving(cloud) as address:
        assert "?[2J?all is well" in opening_error(address, ProtocolError)


def test_a_server_that_opens_no_session_in_time(cloud: ScriptedCloud) -> None:
    with through_proxy(cloud, open_timeout_seconds=0.3) as (proxy, transport):
        transport.open_session(REQUEST)
        proxy.down.swallow = True
        with pytest.raises(ServerUnavailableError, match=r"did not open a session within 0\.3 s"):
            transport.open_session(REQUEST)
        transport.close()


@pytest.mark.parametrize("address", ["nas", "nas:", ":50051", "nas:http", "nas:0", "nas:65536", "::1:50051", "a b:c:1"])
def test_malformed_addresses(address: str) -> None:
    with pytest.raises(
        UsageError,
        match=f"^server must be HOST:PORT, such as .*, not '{address}'$",
    ):
        GrpcTransport(address)


# Uploading.


def blob(data: bytes, chunk_bytes: int = 5) -> Blob:
    def chunks() -> Iterator[bytes]:
        for start in range(0, len(data), chunk_bytes):
            yield data[start : start + chunk_bytes]

    return Blob(len(data), chunks)


def test_what_the_cloud_lacks_is_uploaded_and_no_more(cloud: ScriptedCloud) -> None:
    blobs = {hashlib.sha256(data).hexdigest(): blob(data) for data in (b"the weights", b"the factors", b"")}
    lacks = [hashlib.sha256(data).hexdigest() for data in (b"the weights", b"")]
    cloud.wanted = lacks[:1]
    with serving(cloud) as address, Link(GrpcTransport(address), REQUEST, blobs) as link:
        assert link.open().session_id == "s1"
    assert cloud.blobs == {lacks[0]: b"the weights"}


def test_a_cloud_that_wants_what_nobody_has(cloud: ScriptedCloud) -> None:
    cloud.wanted = ["0" * 64]
    with serving(cloud) as address:
        assert "never offered" in opening_error(address, ProtocolError)


def test_a_blob_that_is_not_what_it_was_announced_to_be(cloud: ScriptedCloud) -> None:
    cloud.wanted = ["0" * 64]
    with serving(cloud) as address:
        link = Link(GrpcTransport(address), REQUEST, {"0" * 64: blob(b"other")})
        with pytest.raises(ProtocolError, match="not what it was announced to be"), link:
            link.open()


def test_an_error_while_reading_a_blob_comes_through(cloud: ScriptedCloud) -> None:
    def torn() -> Iterator[bytes]:
        yield b"the first half"
        raise CheckpointError("the file is torn")

    cloud.wanted = ["0" * 64]
    with serving(cloud) as address:
        link = Link(GrpcTransport(address), REQUEST, {"0" * 64: Blob(100, torn)})
        with pytest.raises(CheckpointError, match="the file is torn"), link:
            link.open()
    assert not cloud.blobs


def test_an_upload_that_stalls(cloud: ScriptedCloud) -> None:
    cloud.wanted = ["0" * 64]
    with through_proxy(cloud, stall_timeout_seconds=0.3) as (proxy, transport):

        def chunks() -> Iterator[bytes]:
            proxy.up.swallow = True
            while True:  # until flow control stops it
                yield bytes(1 << 20)

        link = Link(transport, REQUEST, {"0" * 64: Blob(1 << 40, chunks)}, AT_ONCE)
        with pytest.raises(SessionLostError, match=r"nothing moved .* for 0\.3 s"), link:
            link.open()


def test_a_download_that_stalls(cloud: ScriptedCloud) -> None:
    with through_proxy(cloud, stall_timeout_seconds=0.3) as (proxy, transport):
        transport.open_session(REQUEST)
        proxy.down.swallow = True
        with pytest.raises(StreamBrokenError, match=r"nothing moved .* for 0\.3 s"):
            list(transport.download("s1"))
        transport.close()
