"""What a real server does with callers that send too much, too fast, too slowly, or nothing at all."""

import json
import sys
import threading
import time
from collections import Counter

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.calls import SECONDS, Stream, chunks_of, download, open_session, refusal
from support.tiny_edge import attach

from sft.cli.durations import Duration
from sft.models import Cut
from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import CLIENT_OPTIONS, HEALTH_WATCH
from sft_cloud.access.protection import Access
from sft_cloud.admission.interceptor import _Admitted
from sft_cloud.admission.quotas import SPARE_CALLS
from sft_cloud.identity import ANONYMOUS, Identity, Limits
from sft_cloud.observability.audit import AuditLog
from sft_cloud.options import LimitOptions

SERVICE = "/sft.v1.SplitTraining/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
METHODS = ("OpenSession", "UploadBlob", "Train", "DownloadWeights")


class Never:
    """A side that says nothing until it is let go."""

    def __init__(self, *messages):
        self._messages = list(messages)
        self._done = threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        if self._messages:
            return self._messages.pop(0)
        self._done.wait(SECONDS)
        raise StopIteration

    def let_go(self):
        self._done.set()


@pytest.fixture
def never():
    made = []

    def make(*messages):
        made.append(Never(*messages))
        return made[-1]

    yield make
    for one in made:
        one.let_go()


@pytest.fixture
def raw():
    """Calls of a method with bytes, whatever they are; all methods are called as streams."""
    channels = []

    def make(address, method, messages, **options):
        channels.append(
            grpc.insecure_channel(address, options=[*CLIENT_OPTIONS, *options.pop("options", [])], **options)
        )
        return channels[-1].stream_stream(SERVICE + method if "/" not in method else method)(messages, timeout=SECONDS)

    yield make
    for channel in channels:
        channel.close()


def named(**limits):
    """An `identify` that takes the caller's word for who it is; all have the same limits."""

    def identify(context):
        return Identity(dict(context.invocation_metadata()).get("name", "anonymous"), Limits(**limits))

    return identify


class As:
    """The stub of a named caller."""

    def __init__(self, stub, name):
        self._stub, self._name = stub, name

    def __getattr__(self, method):
        return lambda *arguments, **options: getattr(self._stub, method)(
            *arguments, metadata=[("name", self._name)], **options
        )


class Announcing(dict):
    """The waits of a watch, whose comings can be waited for."""

    def __init__(self):
        super().__init__()
        self.changed = threading.Condition()
        self.so_far = Counter()

    def __setitem__(self, number, wait):
        with self.changed:
            super().__setitem__(number, wait)
            self.so_far[wait.reason] += 1
            self.changed.notify_all()

    def come(self, reason, count=1, so_far=0):
        """Returns when so many wait now, of so many or more in all."""
        with self.changed:
            come = self.changed.wait_for(
                lambda: sum(w.reason == reason for w in self.values()) >= count and self.so_far[reason] >= so_far,
                SECONDS,
            )
        assert come, f"nobody waits: {reason}"


@pytest.fixture
def start_server(start_server):
    def start(**values):
        server = start_server(**values)
        server.deadlines._waits = Announcing()
        return server

    return start


def overdue(server, reason, seconds=1e6):
    """Ends what waits for this reason, as the watch does when so much time is over; returns how many were ended."""
    watch = server.deadlines
    watch._waits.come(reason)
    clock, watch._clock = watch._clock, lambda: time.monotonic() + seconds
    watch.look()
    watch._clock = clock
    return watch.ended[reason]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_message_is_refused_as_such(server, raw, method):
    code, details = refusal(lambda: list(raw(server.address, method, iter([b"\xff\xff\xff"]))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("what came is no ")


def test_other_services_do_not_tell_what_went_wrong_inside(server, raw):
    code, details = refusal(lambda: list(raw(server.address, "/grpc.health.v1.Health/Watch", iter([b"\xff\xff"]))))
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "what came is no message")


@pytest.mark.parametrize("method", ["OpenSession", "UploadBlob", "DownloadWeights"])
def test_each_method_takes_messages_of_its_size(server, raw, method):
    code, details = refusal(lambda: list(raw(server.address, method, iter([bytes(17 << 20)]))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "this method takes at most" in details


def test_a_message_larger_than_any_is_refused(server, raw):
    options = [("grpc.max_send_message_length", -1)]
    call = raw(server.address, "Train", iter([bytes((256 << 20) + 1)]), options=options)
    assert refusal(lambda: list(call))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_small_messages_that_would_take_much_memory_are_refused(server, raw):
    weights = b"\x1a\x00" * (1 << 20)
    assert refusal(lambda: list(raw(server.address, "Train", iter([weights])))) == (
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


@pytest.mark.parametrize("method", METHODS)
def test_a_call_that_says_nothing_is_ended(server, raw, never, method):
    call = raw(server.address, method, never())
    assert overdue(server, "no first message") == 1
    assert refusal(lambda: list(call))[0] is grpc.StatusCode.CANCELLED


def test_half_a_health_watch_is_ended_too(server, raw, never):
    call = raw(server.address, "/grpc.health.v1.Health/Watch", never())
    assert overdue(server, "no first message") == 1
    assert refusal(lambda: list(call))[0] is grpc.StatusCode.CANCELLED


def test_a_health_check_may_go_on(server):
    with grpc.insecure_channel(server.address) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        server.service.drain()
        server._health.stop_serving()
        assert [answer.status for answer in watching] == [health_pb2.HealthCheckResponse.NOT_SERVING]


def test_a_service_that_there_is_not_is_not_watched(server):
    with grpc.insecure_channel(server.address) as channel:
        request = health_pb2.HealthCheckRequest(service="other")
        watching = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=SECONDS)
        assert [answer.status for answer in watching] == [health_pb2.HealthCheckResponse.SERVICE_UNKNOWN]


def test_a_health_watch_takes_messages_of_its_size(server, raw):
    code, details = refusal(lambda: list(raw(server.address, HEALTH_WATCH, iter([bytes((1 << 16) + 1)]))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "this method takes at most 65536" in details


def test_a_health_watch_ends_when_it_was_idle_for_long_or_its_caller_goes(server):
    usage = server.quotas._usage(ANONYMOUS)
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        gone, idle = (stub.Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS) for _ in range(2))
        next(gone), next(idle)
        gone.cancel()
        server.deadlines._waits.come("idle stream")
        overdue(server, "idle stream", seconds=1801)
        assert refusal(lambda: next(idle))[0] is grpc.StatusCode.CANCELLED
    server.stop()  # which returns when every call has ended
    assert usage.calls == 0


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


def test_an_upload_that_stops_half_way_is_ended_and_leaves_nothing(server, connect, edge, never, tmp_path):
    sha256, content = next(iter(edge.blobs().items()))
    first = next(chunks_of(sha256, content))
    call = connect(server.address).UploadBlob.future(never(first), timeout=SECONDS)
    assert overdue(server, "no next part") == 1
    assert refusal(call.result)[0] is grpc.StatusCode.CANCELLED
    server.stop()
    assert not list((tmp_path / "state").rglob("*.part"))


def test_a_stream_on_which_nothing_comes_is_ended_later(server, connect, edge):
    stub = connect(server.address)
    stream = Stream(stub, attach(open_session(stub, edge)))
    next(stream.call)
    stream.ask(edge.forward(0))
    assert overdue(server, "idle stream", seconds=1799) == 0
    assert overdue(server, "idle stream", seconds=1801) == 1
    assert refusal(lambda: next(stream.call))[0] is grpc.StatusCode.CANCELLED


def test_a_stream_that_idles_keeps_no_message(server, connect, edge, monkeypatch):
    came, messages, answers = [], [], []
    parsed, serialized = _Admitted._parsed, _Admitted._serialized

    def parse(admitted, data):
        came.append(data)
        messages.append(parsed(admitted, data))
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


def test_answers_that_are_not_read_end_the_stream(server, connect, make_edge):
    edge = make_edge(cut=Cut("sl", 1), lengths=(128,) * 16)
    stub = connect(server.address)
    messages = [attach(open_session(stub, edge)), *(edge.evaluate(number) for number in range(3))]
    messages += [edge.forward(0, number) for number in range(30)]  # a quarter of a megabyte each
    stream = Stream(stub, *messages)
    next(stream.call)
    server.deadlines._waits.come("answers are not read", so_far=17)  # four megabytes are on their way, and no more
    assert overdue(server, "answers are not read") == 1
    assert server.sessions.entries()[0].messages.last_number < 33
    assert refusal(lambda: list(stream.call))[0] is grpc.StatusCode.CANCELLED


def test_an_answer_of_one_message_that_is_not_read_ends_its_call(server, raw):
    call = raw(server.address, "Probe", iter([pb.ProbeRequest(reply_bytes=4 << 20).SerializeToString()] * 1))
    server.deadlines._waits.come("answers are not read")
    usage = server.quotas._usage(ANONYMOUS)
    assert (usage.calls, overdue(server, "answers are not read")) == (1, 1)
    with pytest.raises(grpc.RpcError):
        list(call)
    server.stop()  # which returns when every call has ended
    assert usage.calls == 0


def test_a_good_stream_is_not_touched_when_others_are_ended(server, connect, edge, raw, never):
    stub = connect(server.address)
    stream = Stream(stub, attach(open_session(stub, edge)))
    next(stream.call)
    server.deadlines._waits.come("idle stream")  # not any more for its first answer to be read
    silent = raw(server.address, "Train", never())
    assert overdue(server, "no first message", seconds=61) == 1
    assert refusal(lambda: list(silent))[0] is grpc.StatusCode.CANCELLED
    assert stream.ask(edge.forward(0)).HasField("result")


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


def test_the_waits_are_options(start_server, connect, edge, raw, never):
    server = start_server(limits=LimitOptions(stall_timeout=Duration("100s"), idle_timeout=Duration("200s")))
    call = raw(server.address, "Train", never())
    assert overdue(server, "no first message", seconds=60) == 0
    assert overdue(server, "no first message", seconds=101) == 1
    assert refusal(lambda: list(call))[0] is grpc.StatusCode.CANCELLED
    stub = connect(server.address)
    stream = Stream(stub, attach(open_session(stub, edge)))
    next(stream.call)
    assert overdue(server, "idle stream", seconds=160) == 0
    assert overdue(server, "idle stream", seconds=201) == 1
    assert refusal(lambda: next(stream.call))[0] is grpc.StatusCode.CANCELLED
