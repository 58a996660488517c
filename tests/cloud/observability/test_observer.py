"""Calls are counted when they are refused, and become parts of the edge's trace, whoever handles them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from support.calls import SECONDS, refusal
from support.recorded_spans import RecordedSpans
from support.scripted_cloud import ScriptedCloud

from sft.errors import AccessError, ServerFullError
from sft.tracing import NO_TRACER, Span
from sft.v1 import split_training_pb2 as pb
from sft.v1.split_training_pb2_grpc import SplitTrainingStub, add_SplitTrainingServicer_to_server
from sft.wire.protocol import CLIENT_OPTIONS
from sft_cloud.identity import Identity
from sft_cloud.observability.interceptor import CallObserver
from sft_cloud.observability.metrics import Metrics
from sft_cloud.observability.observer import Observer
from sft_cloud.rpc.call import CallInterceptor
from sft_edge.link.tracing import traced


class Told(Metrics):
    """Remembers what it is told."""

    def __init__(self):
        self.refusals = []
        self.work = []
        self.answers = []
        self.changed = threading.Event()

    def refused(self, *labels):
        self.refusals.append(labels)
        self.changed.set()

    def worked(self, *figures):
        self.work.append(figures)

    def answered(self, tenant, message, answer, sizes, steps=0, repeated=False):
        self.answers.append((tenant, steps, repeated))


class Refusing(ScriptedCloud):
    """A cloud whose methods end with an error of ours."""

    error = ServerFullError("no room")

    def OpenSession(self, request, context):
        raise self.error

    def DownloadWeights(self, request, context):
        yield pb.DownloadWeightsResponse(data=b"a part")
        raise self.error


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def start(told):
    """`start(cloud)` serves it behind an observer, and gives a channel to it."""
    servers, channels = [], []

    def make(cloud, tracer=NO_TRACER, identify=lambda context: Identity("anna"), gates=()):
        pool = ThreadPoolExecutor(4)
        server = grpc.server(pool, interceptors=[CallInterceptor(identify), CallObserver(told, tracer), *gates])
        add_SplitTrainingServicer_to_server(cloud, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append((server, pool))
        channels.append(grpc.insecure_channel(f"127.0.0.1:{port}", options=CLIENT_OPTIONS))
        return channels[-1]

    yield make
    for channel in channels:
        channel.close()
    for server, pool in servers:
        server.stop(0).wait(SECONDS)
        pool.shutdown()


def test_a_call_that_is_refused_counts_with_its_reason(start, told):
    stub = SplitTrainingStub(start(Refusing()))
    assert refusal(lambda: stub.OpenSession(pb.OpenSessionRequest(), timeout=SECONDS)) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "no room",
    )
    assert told.changed.wait(SECONDS)
    assert told.refusals == [("anna", "OpenSession", "RESOURCE_EXHAUSTED", "ServerFullError")]


def test_a_stream_that_breaks_off_counts_too(start, told):
    stub = SplitTrainingStub(start(Refusing()))
    call = stub.DownloadWeights(pb.DownloadWeightsRequest(), timeout=SECONDS)
    assert next(call).data == b"a part"
    assert refusal(lambda: next(call))[1] == "no room"
    assert told.changed.wait(SECONDS)
    assert told.refusals == [("anna", "DownloadWeights", "RESOURCE_EXHAUSTED", "ServerFullError")]


def test_calls_that_succeed_do_not_count(start, told):
    stub = SplitTrainingStub(start(ScriptedCloud()))
    assert stub.OpenSession(pb.OpenSessionRequest(), timeout=SECONDS).session_id == "s1"
    assert len(list(stub.DownloadWeights(pb.DownloadWeightsRequest(), timeout=SECONDS))) == 2
    assert told.refusals == []


class Closed(grpc.ServerInterceptor):
    """Refuses every method, those that there are not included, as a gate does."""

    def intercept_service(self, continuation, details):
        return grpc.stream_stream_rpc_method_handler(
            lambda _, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")
        )


def test_strangers_have_no_name_and_make_no_label_up(start, told):
    def identify(context):
        raise AccessError("not known")

    channel = start(ScriptedCloud(), identify=identify, gates=[Closed()])
    assert refusal(lambda: channel.unary_unary("/made.up/Method-4711")(b"", timeout=SECONDS))[1] == "who are you?"
    assert told.changed.wait(SECONDS)
    assert told.refusals == [("unknown", "none such", "UNAUTHENTICATED", "UNAUTHENTICATED")]


def test_a_method_of_the_same_name_elsewhere_is_not_ours(start, told):
    channel = start(ScriptedCloud(), gates=[Closed()])
    refusal(lambda: channel.unary_unary("/made.up/OpenSession")(b"", timeout=SECONDS))
    assert told.changed.wait(SECONDS)
    assert told.refusals == [("anna", "none such", "UNAUTHENTICATED", "UNAUTHENTICATED")]


def test_a_call_is_part_of_the_edge_s_trace(start):
    spans = RecordedSpans()
    cloud = ScriptedCloud()
    stub = SplitTrainingStub(traced(start(cloud, spans.tracer), spans.tracer))
    assert stub.OpenSession(pb.OpenSessionRequest(), timeout=SECONDS).session_id == "s1"
    data = b"blob"
    sha256 = "fa2c8cc4f28176bbeed4b736df569a34c79cd3723e9ec42f9674b4d46ac6b8b8"
    call = stub.UploadBlob.future(iter([pb.UploadBlobRequest(sha256=sha256, total_bytes=4, data=data)]))
    assert call.result(SECONDS) == pb.UploadBlobResponse()
    assert b"".join(part.data for part in stub.DownloadWeights(pb.DownloadWeightsRequest(), timeout=SECONDS))
    for method in ("OpenSession", "UploadBlob", "DownloadWeights"):
        kinds = {span.kind.name: span for span in spans.named(method)}
        assert kinds["SERVER"].parent.span_id == kinds["CLIENT"].context.span_id
        assert kinds["CLIENT"].status.status_code.name == "UNSET"


def test_a_call_that_fails_ends_both_spans_with_the_reason(start):
    spans = RecordedSpans()
    stub = SplitTrainingStub(traced(start(Refusing(), spans.tracer), spans.tracer))
    refusal(lambda: stub.OpenSession(pb.OpenSessionRequest(), timeout=SECONDS))
    client = next(span for span in spans.named("OpenSession") if span.kind.name == "CLIENT")
    assert client.status.description == "RESOURCE_EXHAUSTED"


def test_strangers_make_no_span(start, told):
    def identify(context):
        raise AccessError("not known")

    spans = RecordedSpans()
    stub = SplitTrainingStub(traced(start(ScriptedCloud(), spans.tracer, identify, [Closed()]), spans.tracer))
    assert refusal(lambda: stub.OpenSession(pb.OpenSessionRequest(), timeout=SECONDS))[1] == "who are you?"
    assert told.changed.wait(SECONDS)
    assert [span.kind.name for span in spans.named("OpenSession")] == ["CLIENT"]


def test_an_edge_that_does_not_trace_leaves_no_span(start):
    spans = RecordedSpans()
    stub = SplitTrainingStub(start(ScriptedCloud(), spans.tracer))
    stub.OpenSession(pb.OpenSessionRequest(), timeout=SECONDS)
    assert spans.all() == []


def test_work_on_a_message_is_timed_and_traced(told):
    spans = RecordedSpans()
    observer = Observer(told, spans.tracer)
    with spans.tracer.span("forward", asks=True) as asked:
        message = pb.EdgeMessage(step=3, micro_batch=1, forward=pb.Forward(), trace_parent=asked.parent)
        with observer.message("anna", "Xy12", message) as watch:
            watch.worked(0.25, 0.5, None)
            watch.answered(pb.CloudMessage(), (1, 1), steps=1, repeated=False)
    assert told.work == [("anna", 0.25, 0.5)]
    assert told.answers == [("anna", 1, False)]
    assert spans.edges() == [
        ("forward", "wait for the device"),
        ("forward", "work on the device"),
        ("forward", "forward"),
    ]
    server = next(span for span in spans.named("forward") if span.kind.name == "SERVER")
    assert server.attributes == {"sft.tenant": "anna", "sft.session": "Xy12", "sft.step": 3, "sft.micro_batch": 1}


def test_work_that_failed_is_a_span_that_failed():
    spans = RecordedSpans()
    with spans.tracer.span("forward", asks=True) as asked:
        message = pb.EdgeMessage(forward=pb.Forward(), trace_parent=asked.parent)
        with Observer(None, spans.tracer).message("anna", "Xy12", message) as watch:
            watch.worked(0.25, 0.5, AccessError("not for you"))
    (work,) = spans.named("work on the device")
    assert work.status.description == "AccessError"
    assert work.end_time - work.start_time == 500_000_000
    (waiting,) = spans.named("wait for the device")
    assert waiting.status.is_unset


def test_without_a_tracer_a_message_makes_no_span():
    message = pb.EdgeMessage(trace_parent="00-" + "1" * 32 + "-" + "1" * 16 + "-01")
    watch = Observer().message("anna", "Xy12", message)
    assert type(watch._span) is Span
