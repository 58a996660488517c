"""What an edge has left is done, or is not: what stops it, what only delays it, and what ends its session."""

import logging
import threading

import pytest

from sft.errors import ProtocolError, ServerFullError
from sft.v1 import split_training_pb2 as pb
from sft_cloud.errors import FullOfAnswersError, NoMemoryError, StreamTakenError, TooLargeError
from sft_cloud.identity import Identity
from sft_cloud.memory import Kind, MemoryBudget
from sft_cloud.service.absent import PAUSE_SECONDS, Absent, Checks
from sft_cloud.service.registry import Registry, StreamHandle

ANN = Identity("ann")
STEPS = 3


class Left:
    """A session whose edge has left some commits to do, numbered from 2, and everything that happens to it."""

    def __init__(self):
        self.closed, self.waits, self.done = [], [], []
        self.seconds, self.is_valid = 0.0, True
        self.meanwhile = {}
        """By the number of a message: what happens once when it is to be done."""
        self.skips = 0
        self.registry = Registry(1, 600.0, lambda entry, reason: self.closed.append(reason))
        with self.registry.place(pb.OpenSessionRequest(), ANN) as put:
            self.entry = put("s" * 32, 0)
        self.budget = MemoryBudget(1 << 20)
        checks = Checks(lambda owner, data: None, lambda owner: self.seconds, lambda owner: self.is_valid)
        self.absent = Absent(self.registry, self.answer, self.budget, checks, self.wait)
        messages = [
            pb.EdgeMessage(number=2 + step, step=step, ahead=True, commit=pb.Commit(step=step)) for step in range(STEPS)
        ]
        detach = pb.Detach(messages=[message.SerializeToString() for message in messages])
        self.entry.messages.last_number = 1
        self.absent.leave(self.entry, pb.EdgeMessage(number=1, detach=detach))

    def wait(self, event, seconds):
        assert isinstance(event, threading.Event)
        self.waits.append(seconds)
        return event.is_set()

    def answer(self, session_id, owner, stream, message):
        with self.entry.lock:
            if self.entry.stream is not stream:
                raise StreamTakenError("taken")
            return self.entry.messages.apply(message, lambda: self.work(message), is_left=True)[0]

    def work(self, message):
        self.meanwhile.pop(message.number, lambda: None)()
        self.done.append(message.number)
        if message.number == self.skips:
            return pb.CloudMessage(step_skipped=pb.StepSkipped(reason="for a test"))
        return pb.CloudMessage(committed=pb.Committed(next_step=message.step + 1))

    def go_on(self):
        """In this thread."""
        stream = StreamHandle(is_absent=True)
        assert self.registry.attach_absent(self.entry.session_id, ANN, stream)
        self.absent._run(self.entry.session_id, ANN, stream)

    def attached(self):
        stream = StreamHandle()
        self.registry.attach(self.entry.session_id, ANN, stream)
        return stream, self.absent.answers(self.entry.session_id, ANN, stream)


@pytest.fixture
def left():
    return Left()


def raises(error):
    def fails():
        raise error

    return fails


@pytest.mark.parametrize("kind", [ServerFullError, NoMemoryError])
def test_what_has_no_room_now_is_tried_again(left, caplog, kind):
    def twice():
        left.meanwhile[3] = raises(kind("none, still"))
        raise kind("there is none")

    left.meanwhile[3] = twice
    left.go_on()
    assert left.done == [2, 3, 4]
    assert left.waits == [PAUSE_SECONDS] * 2
    assert [record.fields["reason"] for record in caplog.records] == ["there is none"], "said once"
    assert not left.closed


@pytest.mark.parametrize("kind", [FullOfAnswersError, TooLargeError])
def test_what_will_not_pass_stops_it_and_the_session_waits(left, caplog, kind):
    left.meanwhile[3] = raises(kind("too much"))
    left.go_on()
    assert left.done == [2]
    assert not left.waits
    assert [(record.fields["reason"], bool(record.exc_info)) for record in caplog.records] == [("too much", False)]
    assert (left.closed, left.entry.stream, left.entry.is_done) == ([], None, False)


@pytest.mark.parametrize(
    ("error", "reason"), [(ProtocolError("no sense"), "no sense"), (KeyError("a secret"), "internal error")]
)
def test_what_ends_a_session(left, caplog, error, reason):
    left.meanwhile[3] = raises(error)
    left.go_on()
    assert left.closed == [reason]
    assert [record.fields["reason"] for record in caplog.records] == [reason]
    assert bool(caplog.records[0].exc_info) is isinstance(error, KeyError), "of what nobody foresaw, where it was"


def test_one_whose_edge_is_back_ends_no_session(left):
    def comes_back():
        left.registry.attach(left.entry.session_id, ANN, StreamHandle())
        raise ProtocolError("no sense")

    left.meanwhile[3] = comes_back
    left.go_on()
    assert left.done == [2]
    assert not left.closed
    assert left.entry.has_edge


def test_whoever_is_not_let_in_any_more_has_nothing_done(left, caplog):
    left.meanwhile[3] = lambda: setattr(left, "is_valid", False)
    left.go_on()
    assert left.done == [2, 3]
    assert left.closed == ["the token or the certificate that it was left with is no longer good"]
    assert [record.fields["reason"] for record in caplog.records] == left.closed


def test_steps_come_as_fast_as_they_may(left):
    left.seconds = 0.5
    left.go_on()
    assert left.done == [2, 3, 4]
    assert left.waits == [0.5] * STEPS


def test_steps_come_as_fast_as_they_may_when_the_edge_is_back(left):
    left.seconds = 0.5
    _, answers = left.attached()
    assert [answer.committed.next_step for answer in answers] == [1, 2, 3]
    assert left.waits == [0.5] * STEPS


@pytest.mark.parametrize("ends", ["another stream", "the server"])
def test_who_waits_is_woken(left, ends):
    left.absent._wait = threading.Event.wait
    stream, answers = left.attached()
    next(answers)
    left.seconds = 1_000_000.0
    thread = threading.Thread(target=lambda: left.waits.extend(answers), daemon=True)
    thread.start()
    if ends == "another stream":
        left.attached()
    else:
        left.absent.stop()
    thread.join(30)
    assert not thread.is_alive()
    assert stream.over.is_set()
    assert (left.done, left.waits) == ([2], [])


def test_nothing_begins_when_the_server_stops(left):
    left.absent.stop()
    _, answers = left.attached()
    assert list(answers) == []
    assert not left.done


def test_nothing_is_left_of_a_step_that_was_undone(left, caplog):
    caplog.set_level(logging.INFO)
    left.skips = 3
    held = left.budget.held()[Kind.MESSAGES]
    _, answers = left.attached()
    assert [answer.WhichOneof("body") for answer in answers] == ["committed", "step_skipped"]
    assert left.done == [2, 3]
    assert [record.fields["reason"] for record in caplog.records] == ["for a test"]
    assert held > 0
    assert left.budget.held()[Kind.MESSAGES] == 0
    assert left.entry.is_done
