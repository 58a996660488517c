"""The service over a loopback socket, spoken to with the generated stubs."""

import gc
import hashlib
import queue
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch
from safetensors.torch import load
from support.calls import SECONDS, Stream, download, open_session, refusal, wait_until_closed
from support.tiny_edge import attach

from sft.v1 import split_training_pb2 as pb
from sft.version import __version__
from sft.wire.protocol import PROTOCOL_VERSION
from sft_cloud.identity import ANONYMOUS
from sft_cloud.service.registry import SPARED_SECONDS


def messages_of_a_run(edge, steps):
    yield edge.forward(0)
    for step in range(1, steps):
        yield edge.forward(step, commit=edge.commit_part(step - 1))
    yield edge.evaluate(commit=edge.commit_part(steps - 1))


def run(stub, edge, steps=3):
    """A whole run: its answers and the weights at the end."""
    session_id = open_session(stub, edge)
    stream = Stream(stub, attach(session_id))
    assert next(stream.call).attached.next_step == 0
    answers = [stream.ask(message) for message in messages_of_a_run(edge, steps)]
    weights = load(download(stub, session_id))
    assert stream.end() == []
    assert [answer.number for answer in answers] == [1, 2, 3, 4][: len(answers)]
    for answer in answers:
        assert answer.cloud_seconds > 0
        answer.ClearField("cloud_seconds")
        answer.ClearField("number")
    return answers, weights


@pytest.fixture
def without_gc():
    """A device's memory must not wait until Python looks for cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_missing_blobs_are_uploaded_once(stub, edge, server):
    response = stub.OpenSession(edge.request())
    assert (response.session_id, set(response.missing_blobs)) == ("", set(edge.blobs()))
    assert (response.package_version, response.device) == (__version__, "cpu")
    assert len(server.sessions) == 0
    open_session(stub, edge)
    assert stub.OpenSession(edge.request()).missing_blobs == []


def test_a_run_ends_with_the_weights_of_a_session_without_a_server(stub, edge, request):
    answers, weights = run(stub, edge)
    alone = request.getfixturevalue("open_session")(edge)
    assert answers == [alone.handle(message) for message in messages_of_a_run(edge, 3)]
    expected = {tensor.name: tensor.read() for tensor in alone.stored_parameters()}
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_an_edge_may_send_ahead(stub, edge):
    messages = list(messages_of_a_run(edge, 4))
    for number, message in enumerate(messages, 1):
        message.number = number
    messages = [attach(open_session(stub, edge)), *messages, pb.EdgeMessage(close=pb.Close())]
    answers = list(stub.Train(iter(messages), timeout=SECONDS))
    assert [answer.WhichOneof("body") for answer in answers] == ["attached", *["result"] * 4, "evaluation"]
    assert [answer.step for answer in answers] == [0, 0, 1, 2, 3, 0]


def test_edges_at_once_end_with_the_bits_of_their_solo_runs(server, connect, make_edge):
    edges = [make_edge(seed=seed) for seed in range(4)]
    solo = [run(connect(server.address), edge) for edge in edges]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda edge: run(connect(server.address), edge), edges))
    for (answers, weights), (expected_answers, expected) in zip(together, solo, strict=True):
        assert answers == expected_answers
        assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_the_cloud_s_own_model_is_found(start_server, connect, edge, tiny_directory):
    stub = connect(start_server(model_dir=tiny_directory.parent).address)
    missing = stub.OpenSession(edge.request()).missing_blobs
    assert list(missing) == [edge.request().factors_sha256]
    assert run(stub, edge)[0]


def test_another_version_is_refused(stub, edge):
    code, details = refusal(lambda: stub.OpenSession(edge.request(protocol_version=99)))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "version 99" in details
    assert f"version {PROTOCOL_VERSION}" in details


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"config_json": "{}"}, "cannot be cut"),
        ({"model_name": "/etc/passwd"}, "model_name"),
        ({"cut": pb.Cut(mode=pb.MODE_SFT, split_layer=9, split_rank=1, residual=pb.RESIDUAL_NONE)}, "split_layer is 9"),
        ({"optimizer": pb.Optimizer(name="Nonsense")}, "no optimizer 'Nonsense'"),
    ],
    ids=str,
)
def test_requests_that_make_no_sense(stub, edge, server, overrides, says):
    open_session(stub, edge)
    code, details = refusal(lambda: stub.OpenSession(edge.request(**overrides)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert says in details
    assert "\n" not in details
    assert len(server.sessions) == 1


def test_a_full_server_refuses_until_a_session_ends(start_server, connect, edge):
    server = start_server(max_sessions=1)
    stub = connect(server.address)
    closed = wait_until_closed(server)
    stream = Stream(stub, attach(open_session(stub, edge)))
    next(stream.call)
    code, details = refusal(lambda: stub.OpenSession(edge.request()))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "all of its 1 sessions" in details
    stream.end()
    assert closed()
    assert open_session(stub, edge)


def test_a_session_without_a_stream_makes_room(start_server, connect, edge):
    server = start_server(max_sessions=1)
    stub = connect(server.address)
    first = open_session(stub, edge)
    server.sessions._clock = lambda: time.monotonic() + SPARED_SECONDS + 1
    garbage = edge.request(config_json="{}")
    assert refusal(lambda: stub.OpenSession(garbage))[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert stub.OpenSession(edge.request(weights_sha256="0" * 64)).missing_blobs == ["0" * 64]
    assert [entry.session_id for entry in server.sessions.entries()] == [first]  # to whom it was worth nothing
    open_session(stub, edge)
    assert refusal(lambda: list(stub.Train(iter([attach(first)]))))[0] is grpc.StatusCode.NOT_FOUND


def test_sessions_that_do_not_exist(stub):
    for call in (
        lambda: list(stub.Train(iter([attach("nobody")]))),
        lambda: list(stub.DownloadWeights(pb.DownloadWeightsRequest(session_id="nobody"))),
    ):
        code, details = refusal(call)
        assert code is grpc.StatusCode.NOT_FOUND
        assert "no such session" in details


def test_what_the_server_says_of_itself(stub, edge, server):
    session_id = open_session(stub, edge)
    stream = Stream(stub, attach(session_id))
    next(stream.call)
    stream.ask(edge.forward(0))
    stream.ask(edge.commit(0))
    status = stub.Status(pb.StatusRequest(), timeout=SECONDS)
    assert (status.package_version, status.protocol_version, status.device) == (__version__, PROTOCOL_VERSION, "cpu")
    assert (status.caller, status.max_sessions, status.open_sessions) == ("anonymous", 4, 1)
    assert abs(status.unix_seconds - time.time()) < SECONDS
    (session,) = status.sessions
    assert (session.label, session.next_step, session.attached) == (session_id[:8], 1, True)
    assert session.bytes_received > session.bytes_sent > 0
    stream.end()
    assert not stub.Status(pb.StatusRequest(), timeout=SECONDS).sessions


def test_a_probe_moves_bytes_both_ways(stub):
    answer = stub.Probe(pb.ProbeRequest(data=bytes(1000), reply_bytes=3000), timeout=SECONDS)
    assert answer.data == bytes(3000)
    for request in (pb.ProbeRequest(reply_bytes=(4 << 20) + 1), pb.ProbeRequest(data=bytes((4 << 20) + 1))):
        code, details = refusal(lambda request=request: stub.Probe(request, timeout=SECONDS))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "at most 4194304 bytes" in details


@pytest.mark.parametrize("messages", [[], [pb.EdgeMessage()], [pb.EdgeMessage(evaluate=pb.Evaluate())]], ids=len)
def test_a_stream_starts_with_attach(stub, messages):
    code, details = refusal(lambda: list(stub.Train(iter(messages))))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "attach" in details


@pytest.mark.parametrize("kind", ["nonsense", "out of order"])
def test_a_message_that_breaks_the_rules_ends_the_stream(stub, edge, server, kind):
    stream = Stream(stub, attach(open_session(stub, edge)))
    next(stream.call)
    message = edge.forward(5)
    if kind == "nonsense":
        message = edge.forward(0)
        message.forward.labels.classes.ids[0] = 77
    code, details = refusal(lambda: stream.ask(message))
    if kind == "nonsense":
        assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "labels must be from 0 to 2, or -100")
    else:
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "step 0 is next" in details
    assert len(server.sessions) == 0


def test_an_unexpected_error_stays_in_the_log(stub, make_edge, server, caplog):
    edge = make_edge()
    session_id = open_session(stub, edge)
    stream = Stream(stub, attach(session_id))
    next(stream.call)
    (entry,) = server.sessions.entries()
    server.engine._find(entry.session_id).session._half = None  # as a bug would
    assert refusal(lambda: stream.ask(edge.forward(0))) == (
        grpc.StatusCode.INTERNAL,
        "internal error, see the server's log",
    )
    assert "AttributeError" in caplog.text
    assert len(server.sessions) == 0
    assert run(stub, make_edge())[0]


@pytest.mark.parametrize("end", ["close", "break a rule", "stay away"])
def test_an_edge_that_goes_frees_its_session(stub, edge, server, connect, without_gc, end):
    closed = wait_until_closed(server)
    session_id = open_session(stub, edge)
    net_2 = weakref.ref(server.engine._find(session_id).session._half.net_2)
    stream = Stream(stub, attach(session_id))
    next(stream.call)
    stream.ask(edge.forward(0))
    if end == "stay away":
        server.sessions.session_timeout_seconds = 0.0
        stream.call.cancel()
    elif end == "close":
        stream.end()
    else:
        refusal(lambda: stream.ask(edge.commit(5)))
    assert closed()
    assert run(connect(server.address), edge)[0]  # and goes on serving
    server.stop()  # every thread that worked for it has ended
    assert net_2() is None


@pytest.mark.parametrize(
    ("first", "says"),
    [
        ({"sha256": hashlib.sha256(b"other").hexdigest(), "total_bytes": 4}, "upload them again"),
        ({"sha256": hashlib.sha256(b"blob").hexdigest(), "total_bytes": 3}, "more bytes"),
        ({"sha256": hashlib.sha256(b"blob").hexdigest(), "total_bytes": 5}, "fewer bytes"),
        ({"sha256": "../../outside", "total_bytes": 4}, "is not a SHA-256"),
        ({"total_bytes": 4}, "is not a SHA-256"),
        ({"sha256": hashlib.sha256(b"blob").hexdigest(), "total_bytes": 1 << 60}, "too large"),
    ],
    ids=str,
)
def test_uploads_that_do_not_match(stub, tmp_path, first, says):
    code, details = refusal(lambda: stub.UploadBlob(iter([pb.UploadBlobRequest(data=b"blob", **first)])))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert says in details
    assert list((tmp_path / "state" / "blobs" / "anonymous").iterdir()) == []


def test_an_upload_without_a_chunk(stub):
    code, details = refusal(lambda: stub.UploadBlob(iter([])))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "first one names the blob" in details


def test_an_upload_that_breaks_off_leaves_nothing(stub, server, tmp_path):
    blobs = tmp_path / "state" / "blobs" / "anonymous"
    content = b"x" * 1000
    begun = threading.Event()
    store = server.service._store.of(ANONYMOUS)
    add = store.add

    def announcing(chunks):
        yield next(chunks)
        begun.set()
        yield from chunks

    store.add = lambda sha256, total_bytes, chunks: add(sha256, total_bytes, announcing(chunks))
    outgoing = queue.SimpleQueue()
    outgoing.put(pb.UploadBlobRequest(sha256=hashlib.sha256(content).hexdigest(), total_bytes=1000, data=b"x"))
    call = stub.UploadBlob.future(iter(outgoing.get, None))
    assert begun.wait(SECONDS)
    assert [path.suffix for path in blobs.iterdir()] == [".part"]
    call.cancel()
    outgoing.put(None)
    server.stop()  # which returns when every call has ended
    assert list(blobs.iterdir()) == []


def test_a_server_that_stops_answers_what_it_works_on(stub, edge, server):
    stream = Stream(stub, attach(open_session(stub, edge)))
    next(stream.call)
    held, go_on, waits = threading.Event(), threading.Event(), threading.Event()
    worker = server.engine._worker
    submit = worker.submit
    submit(lambda: (held.set(), go_on.wait(SECONDS)))
    assert held.wait(SECONDS)
    worker.submit = lambda work: (submit(work), waits.set())[0]
    stream.send(edge.forward(0))
    assert waits.wait(SECONDS)
    server.service.drain()
    go_on.set()
    assert next(stream.call).HasField("result")
    assert refusal(lambda: next(stream.call)) == (grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
    assert refusal(lambda: stub.OpenSession(edge.request()))[0] is grpc.StatusCode.UNAVAILABLE


def test_a_server_that_stops_does_not_wait_for_idle_edges(stub, edge, server):
    stream = Stream(stub, attach(open_session(stub, edge)))
    next(stream.call)
    stream.ask(edge.forward(0))
    server.stop(grace_seconds=10 * SECONDS)
    assert refusal(lambda: next(stream.call))[0] in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
