"""What a real server does with callers that are slow, or silent."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.callers import overdue
from support.calls import SECONDS, Stream, chunks_of, open_session, refusal
from support.tiny_edge import attach

from sft.cli.durations import Duration
from sft.models import Cut
from sft.v1 import split_training_pb2 as pb
from sft_cloud.identity import ANONYMOUS
from sft_cloud.options import LimitOptions

METHODS = ("OpenSession", "UploadBlob", "Train", "DownloadWeights")


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
    asked = iter([pb.ProbeRequest(reply_bytes=4 << 20).SerializeToString()] * 1)
    no_more = [("grpc.http2.bdp_probe", 0)]  # a window that grew would let all of the answer through, read or not
    call = raw(server.address, "Probe", asked, options=no_more)
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
