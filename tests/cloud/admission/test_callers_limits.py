"""What a real server does with callers that take too much, or come too fast."""

import json
import threading

import grpc
import pytest
from support.callers import As, named
from support.calls import SECONDS, Stream, download, open_session, refusal
from support.tiny_edge import attach

from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import HEALTH_WATCH
from sft_cloud.access.protection import Access
from sft_cloud.admission.quotas import SPARE_CALLS
from sft_cloud.observability.audit import AuditLog
from sft_cloud.options import LimitOptions

REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


@pytest.mark.parametrize("method", [HEALTH_WATCH, REFLECTION])
def test_calls_of_other_services_are_counted_too(start_server, connect, raw, never, method):
    server = start_server(access=Access(identify=named(max_sessions=1)))
    held = [raw(server.address, method, never()) for _ in range(1 + SPARE_CALLS)]
    server.deadlines._waits.come("no first message", len(held))
    code, details = refusal(lambda: connect(server.address).Status(pb.StatusRequest(), timeout=SECONDS))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "5 calls of yours are running" in details
    for call in held:
        call.cancel()


@pytest.mark.parametrize("method", [HEALTH_WATCH, REFLECTION])
def test_bytes_of_other_services_are_counted_too(start_server, raw, method):
    server = start_server(access=Access(identify=named(max_bytes_per_day=1000)))
    code, details = refusal(lambda: list(raw(server.address, method, iter([bytes(1001)]))))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "1000 bytes that are yours for a day" in details


def test_so_many_calls_at_a_time(start_server, connect, raw, never):
    server = start_server(access=Access(identify=named(max_sessions=1)))
    stub = connect(server.address)
    held = [As(stub, "alice").Train(never(), timeout=SECONDS) for _ in range(1 + SPARE_CALLS)]
    server.deadlines._waits.come("no first message", len(held))
    request = pb.DownloadWeightsRequest(session_id="x")
    code, details = refusal(lambda: list(As(stub, "alice").DownloadWeights(request)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "5 calls of yours are running" in details
    assert refusal(lambda: list(As(stub, "bob").DownloadWeights(request)))[0] is grpc.StatusCode.NOT_FOUND
    for call in held:
        call.cancel()


def test_so_many_sessions_are_opened_in_a_minute(start_server, connect, edge):
    stub = connect(start_server(access=Access(identify=named()), limits=LimitOptions(opens_per_minute=3)).address)
    open_session(As(stub, "alice"), edge)
    stub_of_alice = As(stub, "alice")
    assert stub_of_alice.OpenSession(edge.request()).session_id
    code, details = refusal(lambda: stub_of_alice.OpenSession(edge.request()))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "more than 3 requests to open a session in a minute" in details


def test_so_many_bytes_a_day(start_server, connect, edge):
    server = start_server(access=Access(identify=named(max_bytes_per_day=200_000)))
    stub = As(connect(server.address), "alice")
    session_id = open_session(stub, edge)
    code, details = refusal(lambda: [download(stub, session_id) for _ in range(20)])
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "200000 bytes that are yours for a day" in details
    assert refusal(lambda: stub.OpenSession(edge.request()))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_models_and_ranks_that_are_not_for_the_caller(start_server, connect, edge):
    stub = connect(start_server(access=Access(identify=named(models=("tiny*",), max_split_rank=4))).address)
    open_session(stub, edge)
    other = edge.request(cut=pb.Cut(mode=pb.MODE_SFT, split_layer=2, split_rank=5, residual=pb.RESIDUAL_NONE))
    for request, says in ((edge.request(model_name="other"), "model 'other'"), (other, "5 wide")):
        code, details = refusal(lambda request=request: stub.OpenSession(request))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert says in details


def test_who_is_too_fast_waits(server, connect, edge):
    waits = []
    admission = server.admission
    server.calls._identify = named(steps_per_second=0.5)
    admission._wait = lambda over, seconds: waits.append(seconds)
    server.quotas._clock = lambda: 0.0
    stub = connect(server.address)
    stream = Stream(stub, attach(open_session(stub, edge)))
    next(stream.call)
    for step in range(4):
        stream.ask(edge.forward(step, commit=edge.commit_part(step - 1) if step else None))
        for micro_batch in (1, 2):  # which make a step longer, not two
            stream.ask(edge.forward(step, micro_batch))
        stream.ask(edge.evaluate())
    stream.ask(edge.commit(3))
    assert waits == pytest.approx([1.0, 3.0, 5.0])  # the first was free, and half of the second


def test_a_caller_that_waits_for_its_turn_can_go(server, connect, edge):
    entered = threading.Event()
    admission = server.admission
    server.calls._identify = named(steps_per_second=0.0001)
    admission._wait = lambda over, seconds: (entered.set(), over.wait(seconds))
    stub = connect(server.address)
    stream = Stream(stub, attach(open_session(stub, edge)))
    next(stream.call)
    stream.ask(edge.forward(0))
    stream.ask(edge.forward(1, commit=edge.commit_part(0)))
    stream.send(edge.commit(1))
    assert entered.wait(SECONDS)
    stream.call.cancel()
    server.stop()  # which returns when every call has ended


def test_what_happened_is_in_the_audit_log(start_server, connect, edge, tmp_path):
    path = tmp_path / "audit.jsonl"
    server = start_server(access=Access(identify=named()), audit=AuditLog(path))
    stub = As(connect(server.address), "alice")
    session_id = open_session(stub, edge)
    Stream(stub, attach(session_id), edge.forward(0)).end()
    refusal(lambda: stub.OpenSession(edge.request(model_name="../../etc/passwd\n")))
    refusal(lambda: list(stub.DownloadWeights(pb.DownloadWeightsRequest(session_id="x" * 1000))))
    server.stop()
    text = path.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    events = [line["what"] for line in lines]
    assert events == ["uploaded", "uploaded", "opened", "attached", "closed", "refused", "refused"]
    assert {line["who"] for line in lines} == {"alice"}
    opened = next(line for line in lines if line["what"] == "opened")
    assert opened["session"] == session_id[:8]
    assert opened["model"] == "tiny"
    assert opened["peer"].startswith("ipv4:127.0.0.1:")
    refused = lines[-2]
    assert (refused["code"], refused["method"]) == ("INVALID_ARGUMENT", "/sft.v1.SplitTraining/OpenSession")
    assert lines[-1]["session"] == "xxxxxxxx"
    assert session_id not in text
