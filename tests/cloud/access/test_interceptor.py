"""Nobody reaches a method without an identity: the real server, over a loopback socket."""

import logging
import socket
import threading
import time
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.calls import SECONDS, Stream, open_session, refusal
from support.servers import start_server
from support.tiny_edge import attach
from support.tls import make_token

from sft.v1 import split_training_pb2 as pb
from sft.v1 import split_training_pb2_grpc as pb_grpc
from sft.wire.protocol import HEALTH_CHECK, MAX_RECEIVED_BYTES
from sft_cloud import server as serve
from sft_cloud.access.authentication import Authentication
from sft_cloud.access.interceptor import REFUSALS_PER_SECOND, AuthenticationInterceptor
from sft_cloud.access.protection import make_access
from sft_cloud.access.tokens import LiveTokens, TokenFile
from sft_cloud.errors import UnauthenticatedError
from sft_cloud.options import SPARE_CALLS, ServerAccess

Code = grpc.StatusCode
CALLS_AT_A_TIME = 4 + SPARE_CALLS
STRANGER = (Code.UNAUTHENTICATED, "this server does not know the caller: it asks for a valid token")


class Calls:
    """A channel whose calls show a token."""

    def __init__(self, channel, token=None):
        metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._metadata = metadata
        self.channel = grpc.intercept_channel(channel, *([_Showing(metadata)] if metadata else []))
        self.cloud = pb_grpc.SplitTrainingStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        self.reflection = reflection_pb2_grpc.ServerReflectionStub(self.channel)


class _Showing(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    def __init__(self, metadata):
        self._metadata = metadata

    def _shown(self, continuation, details, request):
        return continuation(details._replace(metadata=self._metadata), request)

    intercept_unary_unary = intercept_unary_stream = _shown
    intercept_stream_unary = intercept_stream_stream = _shown


@pytest.fixture
def tokens(tmp_path):
    return tmp_path / "tokens.json"


@pytest.fixture
def alice(tokens):
    return make_token(tokens, "alice")


@pytest.fixture
def refused():
    return []


@pytest.fixture
def server(tmp_path, tokens, alice, refused):
    access = make_access(
        ServerAccess(tokens=tokens),
        "127.0.0.1",
        on_refused=lambda peer, reason: refused.append((peer.partition(":")[0], reason)),
    )
    server = start_server(tmp_path, access=access)
    server.access = access
    yield server
    server.stop(grace_seconds=0)


@pytest.fixture
def calls(server):
    channels = []

    def make(token=None, options=()):
        options = [("grpc.use_local_subchannel_pool", 1), *options]
        channels.append(grpc.insecure_channel(server.address, options=options))
        return Calls(channels[-1], token)

    yield make
    for channel in channels:
        channel.close()


def never():
    """A stream of requests that has none until the test is over."""
    threading.Event().wait(SECONDS)
    yield from ()


def ends_with(call):
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return Code.OK


EVERY_METHOD = {
    "OpenSession": lambda calls: calls.cloud.OpenSession(pb.OpenSessionRequest(), timeout=SECONDS),
    "UploadBlob": lambda calls: calls.cloud.UploadBlob(iter([pb.UploadBlobRequest()]), timeout=SECONDS),
    "Train": lambda calls: next(calls.cloud.Train(iter([attach("any")]), timeout=SECONDS)),
    "DownloadWeights": lambda calls: next(calls.cloud.DownloadWeights(pb.DownloadWeightsRequest(), timeout=SECONDS)),
    "Status": lambda calls: calls.cloud.Status(pb.StatusRequest(), timeout=SECONDS),
    "Probe": lambda calls: calls.cloud.Probe(pb.ProbeRequest(), timeout=SECONDS),
    "Watch": lambda calls: next(calls.health.Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)),
    "ServerReflectionInfo": lambda calls: next(
        calls.reflection.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=SECONDS
        )
    ),
    "one that there is not": lambda calls: calls.channel.unary_unary("/sft.v1.Other/Method")(b"", timeout=SECONDS),
}


def test_every_method_of_the_service_is_tried_here():
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["SplitTraining"].methods}
    assert methods <= set(EVERY_METHOD)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_strangers_reach_no_method(calls, alice, refused, method):
    call = EVERY_METHOD[method]
    assert refusal(lambda: call(calls())) == STRANGER
    assert refusal(lambda: call(calls("sft_" + "0" * 12 + "_" + "x" * 43))) == STRANGER
    assert refusal(lambda: call(calls(alice[:-1] + ("A" if alice[-1] != "A" else "B")))) == STRANGER
    assert refused == [("ipv4", "no token")] + 2 * [("ipv4", "a token that is none of those here")]


def test_strangers_cannot_fill_the_log(tokens, alice, caplog):
    now = [0.0]
    strangers = AuthenticationInterceptor(
        Authentication(LiveTokens(tokens), needs_certificate=False), clock=lambda: now[0]
    )
    details = SimpleNamespace(method="/any", invocation_metadata=())

    def call():
        context = SimpleNamespace(peer=lambda: "ipv4:192.0.2.1:1")
        with pytest.raises(UnauthenticatedError):
            strangers.intercept_service(lambda details: None, details).stream_unary(None, context)

    with caplog.at_level(logging.INFO):
        for _ in range(1000):
            call()
        assert [record.message for record in caplog.records] == REFUSALS_PER_SECOND * ["caller refused"]
        now[0] += 1
        call()
        call()
    fields = [record.fields for record in caplog.records[-2:]]
    assert [one.get("left_out_before") for one in fields] == [1000 - REFUSALS_PER_SECOND, None]


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_known_caller_reaches_every_method(calls, alice, refused, method):
    assert ends_with(lambda: EVERY_METHOD[method](calls(alice))) is not Code.UNAUTHENTICATED
    assert refused == []


def test_who_calls_is_found_out_once(server, calls, alice, monkeypatch):
    asked = []
    identify = server.calls._identify
    monkeypatch.setattr(server.calls, "_identify", lambda context: asked.append(context) or identify(context))
    assert calls(alice).cloud.Status(pb.StatusRequest(), timeout=SECONDS).caller == "alice"
    assert len(asked) == 1


def test_the_health_check_is_for_everybody(calls):
    answer = calls().health.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_who_watches_the_health_is_told_as_without_a_gate(calls, alice):
    watch = calls(alice).health.Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


PATHS = [f"/sft.v1.SplitTraining/{method.name}" for method in pb.DESCRIPTOR.services_by_name["SplitTraining"].methods]
PATHS += [
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/none/None",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_stranger_is_refused_before_its_message_is_there(calls, path):
    """Else it could hold a thread, and have the server keep a message of 256 MB."""
    call = calls().channel.stream_unary(path)
    assert refusal(lambda: call(never(), timeout=SECONDS)) == STRANGER


def test_a_strangers_health_check_is_answered_before_its_message_is_there(calls, alice, monkeypatch):
    """Else strangers could hold every thread, and those who hold a token would find none."""
    monkeypatch.setattr("sft_cloud.service.health.READ_SECONDS", 0.05)
    check = calls().channel.stream_stream(HEALTH_CHECK)
    serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING).SerializeToString()
    for _ in range(CALLS_AT_A_TIME):
        assert list(check(never(), timeout=SECONDS)) == [serving]
    assert calls(alice).cloud.Status(pb.StatusRequest(), timeout=SECONDS).caller == "alice"


def test_of_a_strangers_health_check_no_more_is_taken_than_of_other_calls(calls):
    check = calls(options=[("grpc.max_send_message_length", -1)]).channel.stream_stream(HEALTH_CHECK)
    code, _ = refusal(lambda: list(check(iter([bytes(MAX_RECEIVED_BYTES + 1)]), timeout=SECONDS)))
    assert code is Code.RESOURCE_EXHAUSTED


def test_a_health_check_whose_answer_is_not_read_holds_no_thread(server, calls, alice):
    with Unreading(server.address) as stranger, Unreading(server.address) as other:
        for _ in range(CALLS_AT_A_TIME):
            for one in (stranger, other):
                assert one.check() == "answered, and the call goes on"
        assert calls(alice).cloud.Status(pb.StatusRequest(), timeout=SECONDS).caller == "alice"
        server.deadlines._clock = lambda: time.monotonic() + 61
        server.deadlines.look()
        for one in (stranger, other):
            one.come_to_an_end(CALLS_AT_A_TIME)


class Unreading:
    """A client by whose settings no byte of a message may be sent to it."""

    def __init__(self, address):
        host, port = address.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)), SECONDS)
        self._socket.settimeout(SECONDS)
        self._received = self._socket.makefile("rb")
        self._next = 1
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self._send(4, 0, 0, b"\0\4\0\0\0\0")  # SETTINGS: initial window size 0

    def check(self):
        """Begins a call."""
        names = {":method": "POST", ":scheme": "http", ":path": HEALTH_CHECK, ":authority": "here"}
        names.update({"content-type": "application/grpc", "te": "trailers"})
        number, self._next = self._next, self._next + 2
        literal = [text.encode() for pair in names.items() for text in pair]
        block = b"".join(
            (b"\0" if place % 2 == 0 else b"") + bytes([len(text)]) + text for place, text in enumerate(literal)
        )
        self._send(1, 4, number, block)
        while True:
            kind, flags, stream = self._receive()
            if kind == 4 and not flags:
                self._send(4, 1, 0, b"")
            if stream == number and kind == 1:
                return "refused" if flags & 1 else "answered, and the call goes on"

    def come_to_an_end(self, count):
        """Returns when so many calls were broken off."""
        while count:
            count -= self._receive()[0] == 3

    def _send(self, kind, flags, stream, payload):
        head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
        self._socket.sendall(head + payload)

    def _receive(self):
        head = self._received.read(9)
        self._received.read(int.from_bytes(head[:3], "big"))
        return head[3], head[4], int.from_bytes(head[5:], "big")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._received.close()
        self._socket.close()


def test_a_run_of_a_known_caller_is_as_without_a_gate(calls, alice, edge):
    stub = calls(alice).cloud
    stream = Stream(stub, attach(open_session(stub, edge)))
    assert next(stream.call).HasField("attached")
    assert stream.ask(edge.forward(0)).result.loss > 0
    assert stream.ask(edge.commit(0)).committed.next_step == 1
    assert stream.end() == []


def test_a_stream_ends_at_its_next_message_once_the_token_is_revoked(calls, alice, edge, tokens, refused):
    stub = calls(alice).cloud
    stream = Stream(stub, attach(open_session(stub, edge)))
    assert next(stream.call).HasField("attached")
    assert stream.ask(edge.forward(0)).result.loss > 0
    TokenFile(tokens).revoke(lambda token: True)
    assert refusal(lambda: stream.ask(edge.commit(0))) == (
        Code.UNAUTHENTICATED,
        "the token or the certificate that this call began with has expired or was revoked",
    )
    assert refusal(lambda: stub.OpenSession(edge.request(), timeout=SECONDS)) == (
        Code.UNAUTHENTICATED,
        "the token was revoked: ask whoever runs the server for a new one",
    )


def test_an_idle_stream_is_ended_once_the_token_is_revoked(calls, alice, edge, tokens, server):
    bob = calls(make_token(tokens, "bob")).cloud
    streams = [Stream(stub, attach(open_session(stub, edge))) for stub in (calls(alice).cloud, bob)]
    for stream in streams:
        assert next(stream.call).HasField("attached")
    TokenFile(tokens).revoke(lambda token: token.name == "alice")
    server.access.interceptor.end_stale_calls()
    assert refusal(lambda: next(streams[0].call))[0] is Code.CANCELLED
    assert streams[1].ask(edge.forward(0)).result.loss > 0
    assert streams[1].end() == []


def test_what_runs_is_forgotten_when_it_ends(calls, alice, server):

    with pytest.raises(grpc.RpcError):
        calls(alice).cloud.OpenSession(pb.OpenSessionRequest(), timeout=SECONDS)
    server.stop(grace_seconds=0)  # waits for the ends of calls
    assert server.access.interceptor._running == {}


def test_the_server_looks_for_such_calls_by_itself(alice, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "IDENTITIES_SECONDS", 0.01)
    access = make_access(ServerAccess(tokens=tokens), "127.0.0.1")
    looks, ended = [], threading.Event()

    def look():
        looks.append(None)
        if len(looks) == 1:
            raise KeyError("which is no reason to stop")
        ended.set()

    monkeypatch.setattr(access.interceptor, "end_stale_calls", look)
    server = start_server(tmp_path / "other", 1, access=access)
    try:
        assert ended.wait(SECONDS)
    finally:
        server.stop(grace_seconds=0)
