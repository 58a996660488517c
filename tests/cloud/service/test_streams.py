"""Streams that break, and the sessions that outlive them, over a loopback socket."""

import threading

import grpc
from support.calls import SECONDS, Stream, open_session, refusal, wait_until_closed
from support.tiny_edge import attach


def test_a_session_outlives_a_stream_that_only_ends(stub, edge):
    session_id = open_session(stub, edge)
    stream = Stream(stub, attach(session_id))
    next(stream.call)
    first = stream.ask(edge.forward(0))
    stream.outgoing.put(None)
    assert list(stream.call) == []
    again = Stream(stub, attach(session_id))
    attached = next(again.call).attached
    assert (attached.next_step, attached.last_number) == (0, 1)
    assert next(again.call) == first, "whose arrival the edge has not told of"
    message = edge.forward(0)
    message.number = 1
    assert again.ask(message) == first
    message = edge.commit(0)
    message.number = 2
    assert again.ask(message).committed.next_step == 1


def test_a_session_ends_when_its_edge_says_so(stub, edge):
    session_id = open_session(stub, edge)
    stream = Stream(stub, attach(session_id))
    next(stream.call)
    assert stream.end() == []
    assert refusal(lambda: list(stub.Train(iter([attach(session_id)]))))[0] is grpc.StatusCode.NOT_FOUND


def test_a_session_ends_when_its_edge_stays_away(start_server, connect, edge):
    server = start_server()
    stub = connect(server.address)
    closed = wait_until_closed(server)
    session_id = open_session(stub, edge)
    assert len(list(stub.Train(iter([attach(session_id)]), timeout=SECONDS))) == 1
    server.sessions.session_timeout_seconds = 0.0
    assert closed(), "the server looks by itself"
    assert refusal(lambda: list(stub.Train(iter([attach(session_id)]))))[0] is grpc.StatusCode.NOT_FOUND


def test_a_second_stream_takes_over_and_the_first_ends(stub, edge):
    session_id = open_session(stub, edge)
    first = Stream(stub, attach(session_id))
    next(first.call)
    first.ask(edge.forward(0))
    second = Stream(stub, attach(session_id))
    assert next(second.call).attached.last_number == 1
    assert refusal(lambda: next(first.call))[0] is grpc.StatusCode.CANCELLED
    assert next(second.call).HasField("result")
    message = edge.commit(0)
    message.number = 2
    assert second.ask(message).committed.next_step == 1


def test_a_request_that_comes_again_opens_no_second_session(stub, edge, server):
    open_session(stub, edge)
    request = edge.request(request_id="as the edge has drawn it")
    assert stub.OpenSession(request) == stub.OpenSession(request)
    for other in ({"config_json": "{}"}, {"seed": 99}):
        changed = edge.request(request_id=request.request_id, **other)
        assert refusal(lambda changed=changed: stub.OpenSession(changed))[0] is grpc.StatusCode.FAILED_PRECONDITION
    assert len(server.sessions) == 2


def test_a_gap_ends_the_stream_and_leaves_the_session(stub, edge, server):
    session_id = open_session(stub, edge)
    stream = Stream(stub, attach(session_id))
    next(stream.call)
    message = edge.forward(0)
    message.number = 2
    code, details = refusal(lambda: stream.ask(message))
    assert code is grpc.StatusCode.ABORTED
    assert "1 is next" in details
    assert next(Stream(stub, attach(session_id)).call).attached.last_number == 0


def test_an_edge_that_comes_back_while_its_message_waits(server, connect, edge):
    """The worker is held, so the message is still in its queue when the stream breaks: it is worked on once."""
    stub = connect(server.address)
    session_id = open_session(stub, edge)
    stream = Stream(stub, attach(session_id))
    next(stream.call)
    held, go_on = threading.Event(), threading.Event()
    worker = server.engine._worker
    submit, waits = worker.submit, threading.Event()
    submit(lambda: (held.set(), go_on.wait(SECONDS)))
    assert held.wait(SECONDS)
    worker.submit = lambda work: (submit(work), waits.set())[0]
    stream.send(edge.forward(0))
    assert waits.wait(SECONDS)
    stream.call.cancel()
    again = Stream(stub, attach(session_id))
    go_on.set()
    assert next(again.call).attached.last_number == 1, "the new stream waits until the message is done"
    assert next(again.call).HasField("result")
    message = edge.commit(0)
    message.number = 2
    assert again.ask(message).committed.next_step == 1
