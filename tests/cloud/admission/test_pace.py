"""How often a caller may ask, by a clock that stands until it is moved, and on a real server."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.callers import As, named
from support.calls import SECONDS, Stream, open_session, refusal
from support.tiny_edge import attach

from sft.v1 import split_training_pb2 as pb
from sft.v1.split_training_pb2_grpc import SplitTrainingStub
from sft_cloud.access.protection import Access, make_access
from sft_cloud.access.tokens import TokenFile
from sft_cloud.admission import pace as pacing
from sft_cloud.admission.pace import BURST_SECONDS, LONGEST_REST_SECONDS, MAX_WAITING, REFUSAL_SECONDS, Pace
from sft_cloud.errors import QuotaError
from sft_cloud.identity import Limits
from sft_cloud.options import LimitOptions, ServerAccess

RATE = 100
BURST = int(RATE * BURST_SECONDS)
STATUS = pb.StatusRequest()


class Clock:
    now = 50.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def slept():
    return []


@pytest.fixture
def pace(clock, slept):
    return Pace(RATE, clock, slept.append)


def test_what_comes_too_fast_waits_in_turn_and_is_then_refused_and_then_not_answered(pace):
    assert all(pace.call("fast").seconds == 0 for _ in range(BURST))
    waits = [pace.call("fast") for _ in range(MAX_WAITING)]
    assert [turn.seconds for turn in waits] == pytest.approx([(n + 1) / RATE for n in range(MAX_WAITING)])
    refused = [pace.call("fast") for _ in range(MAX_WAITING)]
    assert {turn.seconds for turn in refused} == {REFUSAL_SECONDS}
    assert refused[0].refusal == "more than 100 calls a second of yours; try again in 1 s"
    assert pace.call("fast") is None
    assert pace.call("other").seconds == 0


def test_a_call_that_has_waited_begins_or_is_refused_once(pace):
    turns = [pace.call("fast") for _ in range(BURST + MAX_WAITING + 1)]
    with pace.begins("fast", turns[-1]):
        with pytest.raises(QuotaError, match="more than 100 calls a second"):
            pace.check()
        pace.check()
    with pace.begins("fast", turns[-2]):
        pace.check()
    assert pace.call("fast").refusal == ""


def test_a_refusal_that_nobody_asked_for_is_not_the_next_call_s(pace):
    turns = [pace.call("fast") for _ in range(BURST + MAX_WAITING + 1)]
    with pace.begins("fast", turns[-1]):
        pass
    pace.check()


def test_who_pauses_may_ask_again(pace, clock):
    while pace.call("fast") is not None:
        pass
    clock.now += BURST_SECONDS
    assert pace.call("fast").seconds == 0


def test_messages_that_are_no_work_are_paid_for_in_calls(pace, slept):
    for _ in range(4 * BURST):
        pace.rest("fast", 0)
    assert slept == []
    pace.rest("fast", 0)
    assert slept == pytest.approx([0.25 / RATE])
    pace.rest("fast", 256 << 20)
    assert slept[1] == LONGEST_REST_SECONDS
    assert pace.call("fast").refusal


def test_who_asks_no_more_is_forgotten(pace, clock):
    for name in range(500):
        pace.call(name)
    clock.now += BURST_SECONDS
    for name in range(1000, 1300):
        pace.call(name)
    assert len(pace._asking) < 500


@pytest.fixture
def start_slow(start_server, monkeypatch):
    """Starts a server that takes a call a second, after three, and lets nobody wait."""
    monkeypatch.setattr(pacing, "LONGEST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(pacing, "REFUSAL_SECONDS", 0.01)
    return lambda access: start_server(access=access, limits=LimitOptions(calls_per_second=1))


@pytest.fixture
def slow(start_slow):
    return start_slow(Access(identify=named()))


@pytest.mark.parametrize("method", ["Status", "None"])
def test_a_caller_that_asks_too_often_is_refused_and_others_are_not(slow, connect, raw, method):
    stub = connect(slow.address)
    for _ in range(int(BURST_SECONDS)):
        stub.Status(STATUS)
    call = lambda: list(raw(slow.address, method, iter([b""])))  # noqa: E731
    code, details = refusal(call)
    assert (code, details[:29]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "more than 1 calls a second of")
    assert As(stub, "other").Status(STATUS).caller == "other"


def test_callers_that_only_certificates_tell_apart_are_told_apart(start_slow, certificates):
    files = ServerAccess(certificates.server.cert, certificates.server.key, certificates.ca)
    server = start_slow(make_access(files, "127.0.0.1"))

    def status(own):
        one = grpc.ssl_channel_credentials(certificates.ca.read_bytes(), own.key.read_bytes(), own.cert.read_bytes())
        with grpc.secure_channel(server.address, one, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            return SplitTrainingStub(channel).Status(STATUS).caller

    assert [status(certificates.alice) for _ in range(int(BURST_SECONDS))] == ["alice"] * int(BURST_SECONDS)
    assert refusal(lambda: status(certificates.alice))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert status(certificates.bob) == "bob"


def test_who_does_not_wait_for_refusals_has_its_connection_ended(slow, connect, monkeypatch):
    monkeypatch.setattr(pacing, "REFUSAL_SECONDS", 600.0)
    monkeypatch.setattr(pacing, "MAX_WAITING", 1)
    stub = connect(slow.address)
    for _ in range(int(BURST_SECONDS)):
        stub.Status(STATUS)
    parked, beyond = (stub.Status.future(STATUS, timeout=SECONDS) for _ in range(2))
    assert beyond.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
    assert parked.code() is grpc.StatusCode.UNAVAILABLE
    assert As(connect(slow.address), "other").Status(STATUS).caller == "other"


def test_health_that_strangers_ask_for_too_often_costs_no_caller_a_call(start_slow, connect, tmp_path):
    token = TokenFile(tmp_path / "tokens").create("alice", Limits(), None, sees_all=False)[1]
    server = start_slow(make_access(ServerAccess(tokens=tmp_path / "tokens"), "127.0.0.1"))
    with grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for _ in range(int(BURST_SECONDS)):
            check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        code, _ = refusal(lambda: check(health_pb2.HealthCheckRequest(), timeout=SECONDS))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    stub, mine = connect(server.address), [("authorization", f"Bearer {token}")]
    assert stub.Status(STATUS, metadata=mine, timeout=SECONDS).caller == "alice"


def test_a_stream_that_repeats_itself_or_only_probes_is_slowed(server, connect, edge, monkeypatch):
    rests = []
    monkeypatch.setattr(server.service, "_rest", lambda name, size: rests.append(size))
    stub = connect(server.address)
    stream = Stream(stub, attach(open_session(stub, edge)))
    next(stream.call)
    message = edge.forward(0)
    stream.ask(message)
    assert rests == []
    answer = stream.ask(message)
    assert rests == [message.ByteSize() + answer.ByteSize()]
    stream.end()
    again = Stream(stub)
    again.ask(pb.EdgeMessage(probe=pb.ProbeRequest(data=bytes(100))))
    assert rests[1] > 100
