"""A session whose edge has left goes on, and whoever comes back gets every answer, over a loopback socket."""

import threading

import grpc
import pytest
from support.calls import SECONDS, Stream, download, open_session, refusal, wait_until_closed
from support.tiny_edge import attach

from sft.v1 import split_training_pb2 as pb
from sft_cloud.access import Access
from sft_cloud.admission.wire_check import MAX_FIELDS
from sft_cloud.errors import NoMemoryError
from sft_cloud.identity import Identity, Limits
from sft_cloud.options import ServeOptions

STEPS = 4


def left_by(edge, number, steps=STEPS):
    """What is left to do by an edge whose message of this number it is in: some steps, and an evaluation."""
    messages = []
    for step in range(1, steps + 1):
        commit = edge.commit_part(step - 1)
        commit.max_grad_norm = 1.0
        messages.append(edge.forward(step, commit=commit, frozen_edge=True))
    messages.append(edge.evaluate())
    for place, message in enumerate(messages):
        message.number, message.ahead, message.answered = number + 1 + place, True, number - 1
    return messages


def detach(messages):
    return pb.EdgeMessage(detach=pb.Detach(messages=[message.SerializeToString() for message in messages]))


def begin(stub, edge, **overrides):
    """A stream of a session that has had one message."""
    session_id = open_session(stub, edge, **overrides)
    stream = Stream(stub, attach(session_id))
    next(stream.call)
    stream.ask(edge.forward(0, frozen_edge=True))
    return session_id, stream


def come_back(stub, session_id, answered=2):
    message = attach(session_id)
    message.answered = answered
    return Stream(stub, message)


def said(answers):
    for answer in answers:
        answer.cloud_seconds = 0.0
    return answers


@pytest.fixture
def handled(server):
    """Numbers of the messages that the engine was asked to handle, and an event when it has done the one at `until`."""
    return Handled(server.engine)


class Handled:
    def __init__(self, engine):
        self.numbers, self.until, self.done = [], 0, threading.Event()
        self.holds, self.held, self.released = 0, threading.Event(), threading.Event()
        self._right, engine.handle = engine.handle, self.handle

    def handle(self, session_id, message, remembered_bytes):
        if message.number == self.holds:
            self.held.set()
            assert self.released.wait(SECONDS)
        answer = self._right(session_id, message, remembered_bytes)
        self.numbers.append(message.number)
        if message.number == self.until:
            self.done.set()
        return answer


def test_it_goes_on_and_has_every_answer(stub, edge, handled):
    stayed_id, stayed = begin(stub, edge)
    expected = []
    for message in left_by(edge, 1):
        expected.append(stayed.ask(message))
    handled.until, handled.numbers = 7, []
    session_id, stream = begin(stub, edge)
    assert stream.ask(detach(left_by(edge, 2))).detached.error == ""
    assert handled.numbers == [1], "nothing before the stream ends"
    stream.outgoing.put(None)
    assert list(stream.call) == []
    assert handled.done.wait(SECONDS)
    back = come_back(stub, session_id)
    assert next(back.call).attached == pb.Attached(next_step=STEPS, last_number=7)
    answers = [next(back.call) for _ in range(STEPS + 1)]
    assert [answer.number for answer in answers] == [3, 4, 5, 6, 7]
    for answer, other in zip(said(answers), said(expected), strict=True):
        other.number += 1
        assert answer == other
    assert handled.numbers == [1, 3, 4, 5, 6, 7]
    message = pb.EdgeMessage(step=STEPS, commit=edge.commit_part(STEPS), number=8, answered=7)
    assert back.ask(message).committed.next_step == STEPS + 1
    assert download(stub, session_id) != download(stub, stayed_id)
    stayed.ask(pb.EdgeMessage(step=STEPS, commit=edge.commit_part(STEPS), number=7, answered=6))
    assert download(stub, session_id) == download(stub, stayed_id)


@pytest.mark.parametrize("at", [3, 5, 7])
def test_an_edge_that_comes_back_before_all_is_done(stub, edge, handled, at):
    session_id, stream = begin(stub, edge)
    stream.ask(detach(left_by(edge, 2)))
    handled.holds = at
    stream.outgoing.put(None)
    assert handled.held.wait(SECONDS)
    back = come_back(stub, session_id)
    handled.released.set()
    attached = next(back.call).attached
    assert attached.last_number >= at, "the worker was let go before it is asked"
    assert [next(back.call).number for _ in range(STEPS + 1)] == [3, 4, 5, 6, 7]
    assert handled.numbers == [1, 3, 4, 5, 6, 7], "each once"


def test_an_edge_that_comes_back_and_goes_again(stub, edge, handled):
    session_id, stream = begin(stub, edge)
    assert stream.ask(detach(left_by(edge, 2))).HasField("detached")
    handled.holds, handled.until = 4, 7
    stream.outgoing.put(None)
    assert handled.held.wait(SECONDS)
    back = come_back(stub, session_id)
    back.call.cancel()
    handled.released.set()
    assert handled.done.wait(SECONDS)
    again = come_back(stub, session_id)
    next(again.call)
    assert [next(again.call).number for _ in range(STEPS + 1)] == [3, 4, 5, 6, 7]
    assert handled.numbers == [1, 3, 4, 5, 6, 7]


def test_a_link_that_broke_before_the_answer(stub, edge, handled):
    session_id, stream = begin(stub, edge)
    message = detach(left_by(edge, 2))
    first = stream.ask(message)
    handled.holds = 3
    stream.call.cancel()
    assert handled.held.wait(SECONDS), "it may have been the answer that said so"
    back = come_back(stub, session_id, answered=1)
    handled.released.set()
    assert next(back.call).attached.last_number >= 3, "the worker was let go before it is asked"
    assert next(back.call) == first


def change(messages, what):
    if what == "a gap":
        del messages[1]
    elif what == "not ahead":
        messages[2].ahead = False
    elif what == "labels that stay":
        messages[0].forward.ClearField("labels")
    elif what == "a weight to come":
        messages[0].forward.loss_scale = 0.0
    elif what == "a checkpoint":
        messages[3] = pb.EdgeMessage(number=6, ahead=True, save_checkpoint=pb.SaveCheckpoint())
    elif what == "one in another":
        messages[0] = pb.EdgeMessage(number=3, ahead=True, detach=pb.Detach(messages=[b""]))
    elif what == "nothing":
        messages.clear()
    return detach(messages)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("a gap", "holds message 5 where 4 is next"),
        ("not ahead", "message 5, which is not ahead"),
        ("labels that stay", "a forward without labels"),
        ("a weight to come", "a forward without labels, or without their weight"),
        ("a checkpoint", "holds a save_checkpoint, which needs its edge"),
        ("one in another", "holds a detach"),
        ("nothing", "leaves nothing to do"),
    ],
)
def test_what_cannot_be_left(stub, edge, server, what, reason):
    session_id, stream = begin(stub, edge)
    code, details = refusal(lambda: stream.ask(change(left_by(edge, 2), what)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert reason in details
    assert all(entry.left is None for entry in server.sessions.entries())
    del session_id


def test_what_is_no_message(stub, edge):
    _, stream = begin(stub, edge)
    code, details = refusal(lambda: stream.ask(pb.EdgeMessage(detach=pb.Detach(messages=[b"\xff"]))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "what a detach holds as message 3 is none" in details


def test_no_room_for_it(stub, edge, monkeypatch):
    _, stream = begin(stub, edge)
    monkeypatch.setattr("sft_cloud.service.absent.Mailbox", refuses)
    assert stream.ask(detach(left_by(edge, 2))).detached.error == "there is none"
    assert stream.ask(pb.EdgeMessage(step=0, gradient_scale=1.0)).committed.next_step == 0


def refuses(*arguments):
    raise NoMemoryError("there is none")


def test_it_waits_longer_than_one_whose_link_broke(start_server, connect, edge):
    server = start_server(max_sessions=1)
    handled = Handled(server.engine)
    handled.until = 7
    stub = connect(server.address)
    closed = wait_until_closed(server)
    session_id, stream = begin(stub, edge)
    stream.ask(detach(left_by(edge, 2)))
    stream.outgoing.put(None)
    assert list(stream.call) == []
    assert handled.done.wait(SECONDS)
    server.sessions.session_timeout_seconds = -1.0
    server.sessions.reap()
    assert len(server.sessions) == 1
    assert stub.Status(pb.StatusRequest(), timeout=SECONDS).sessions[0].detached
    code, details = refusal(lambda: open_session(stub, edge, run_id="b" * 32))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    server.sessions.detached_timeout_seconds = -1.0
    assert closed()
    assert refusal(lambda: list(stub.Train(iter([attach(session_id)]))))[0] is grpc.StatusCode.NOT_FOUND
    del details


@pytest.mark.parametrize("is_back", [False, True])
def test_it_stops_where_a_step_was_undone(stub, edge, server, handled, is_back):
    """What comes after it would be answered so, too: the edge is to begin it anew."""
    session_id, stream = begin(stub, edge)
    stream.ask(detach(left_by(edge, 2)))
    stopped = threading.Event()
    detaches = server.sessions.detach

    def detached(entry, its):
        detaches(entry, its)
        if handled.numbers[-1] == 5:
            stopped.set()

    server.sessions.detach = detached
    right, skipped = handled._right, []

    def undone(session, message, remembered):
        if message.number != 5:
            return right(session, message, remembered)
        skipped.append(message.number)
        answer = pb.CloudMessage(step=message.step, step_skipped=pb.StepSkipped(reason="for a test"))
        return right(session, edge.evaluate(1), remembered)._replace(answer=answer)

    handled._right = undone
    handled.holds = 4 if is_back else 0
    stream.outgoing.put(None)
    if is_back:
        assert handled.held.wait(SECONDS)
        back = come_back(stub, session_id)
        handled.released.set()
    else:
        assert stopped.wait(SECONDS)
        back = come_back(stub, session_id)
    next(back.call)
    assert [next(back.call).WhichOneof("body") for _ in range(3)] == ["result", "result", "step_skipped"]
    assert back.end() == []
    assert handled.numbers == [1, 3, 4, 5]
    assert skipped == [5]
    assert len(server.sessions) == 0


def test_what_is_left_is_looked_at_before_it_is_parsed(stub, edge, server, monkeypatch):
    server.quotas._sleep = lambda seconds: None  # after a long look
    _, stream = begin(stub, edge)
    messages = left_by(edge, 2)
    messages[0].weights.extend([pb.Weight()] * (MAX_FIELDS + 1))
    monkeypatch.setattr("sft_cloud.service.mailbox._parsed", None)
    code, details = refusal(lambda: stream.ask(detach(messages)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert f"more than {MAX_FIELDS} fields" in details
    assert len(server.sessions) == 0


def test_what_is_left_is_done_as_fast_as_its_owner_may(start_server, connect, edge):
    few = Identity("few", Limits(steps_per_second=1.0))
    server = start_server(access=Access(identify=lambda context: few))
    server.quotas._clock = lambda: 0.0  # so that three may come at once, and no more
    waits = []
    server.service._absent._wait = lambda over, seconds: waits.append(seconds)
    handled = Handled(server.engine)
    handled.until = 7
    stub = connect(server.address)
    _, stream = begin(stub, edge)
    stream.ask(detach(left_by(edge, 2)))
    stream.outgoing.put(None)
    assert handled.done.wait(SECONDS)
    assert waits == [1.0]


def test_whoever_is_not_let_in_any_more_has_nothing_done(start_server, connect, edge):
    asked = []
    server = start_server(access=Access(still_valid=lambda identity: asked.append(identity.name)))
    stub, closed = connect(server.address), wait_until_closed(server)
    session_id, stream = begin(stub, edge)
    stream.ask(detach(left_by(edge, 2)))
    stream.outgoing.put(None)
    assert closed()
    assert asked == ["anonymous"]
    assert refusal(lambda: list(stub.Train(iter([attach(session_id)]))))[0] is grpc.StatusCode.NOT_FOUND


def test_who_has_left_saves_nothing_when_the_server_stops(stub, edge, server, handled):
    _, stream = begin(stub, edge, run_id="a" * 32)
    stream.ask(detach(left_by(edge, 2)))
    handled.holds = 4
    stream.outgoing.put(None)
    assert handled.held.wait(SECONDS)
    status = stub.Status(pb.StatusRequest(), timeout=SECONDS).sessions[0]
    assert (status.attached, status.detached) == (False, True)

    class Hurry(threading.Event):
        def wait(self, timeout=None):
            raise AssertionError("it waits for an edge that is not there")

    server.wait_for_checkpoints(SECONDS, Hurry())
    handled.released.set()


def test_all_of_them_find_a_place_beside_the_calls(start_server):
    server = start_server(max_sessions=3)
    calls = ServeOptions(max_sessions=3).max_calls
    assert server.engine._worker._queue.maxsize == calls + 3
