"""Places for sessions, and who has them."""

import secrets

import pytest

from sft.errors import ServerFullError, ServerUnavailableError, SessionLostError
from sft.v1 import split_training_pb2 as pb
from sft_cloud.errors import PreconditionError, QuotaError
from sft_cloud.identity import Identity, Limits
from sft_cloud.service.mailbox import Mailbox
from sft_cloud.service.registry import SPARED_SECONDS, Registry, StreamHandle

ANN, BOB, CAT = Identity("ann"), Identity("bob"), Identity("cat")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Stream(StreamHandle):
    def __init__(self):
        super().__init__(self._cancel)
        self.cancelled = 0

    def _cancel(self):
        self.cancelled += 1


@pytest.fixture
def closed():
    return []


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def registry(clock, closed):
    return Registry(2, 600.0, lambda entry, reason: closed.append((entry.session_id, reason)), clock)


def request(**fields):
    return pb.OpenSessionRequest(**fields)


def add(registry, owner=ANN, **fields):
    with registry.place(request(**fields), owner) as put:
        return put(secrets.token_hex(), 0)


def test_a_caller_has_so_many_sessions(registry, clock):
    few = Identity("few", Limits(max_sessions=1))
    entry = add(registry, few)
    with pytest.raises(QuotaError, match="all of your 1 sessions are in use"):
        add(registry, few)
    with registry.place(request(), BOB) as put:  # one that is being opened counts, too
        with pytest.raises(ServerFullError, match="all of its 2 sessions"):
            add(registry, ANN)
        put("b", 0)
    registry.close(entry.session_id, "done")
    with registry.place(request(), few), pytest.raises(QuotaError), registry.place(request(), few):
        pass


def test_a_caller_s_session_without_a_stream_makes_room_for_its_next(registry, clock, closed):
    few = Identity("few", Limits(max_sessions=1))
    entry = add(registry, few)
    clock.now = SPARED_SECONDS + 1
    add(registry, few)
    assert closed == [(entry.session_id, "it had no stream, and its place was needed")]


def test_sessions_by_id(registry, closed):
    entry = add(registry)
    assert registry.get(entry.session_id, ANN) is entry
    stream = Stream()
    assert registry.attach(entry.session_id, ANN, stream) is entry
    registry.close(entry.session_id, "done")
    registry.close(entry.session_id, "again")
    assert closed == [(entry.session_id, "done")]
    assert stream.cancelled == 1
    for find in (registry.get, lambda *who: registry.attach(*who, Stream())):
        with pytest.raises(SessionLostError, match="no such session"):
            find(entry.session_id, ANN)


def test_a_session_is_its_owner_s_alone(registry):
    entry = add(registry)
    for find in (registry.get, lambda *who: registry.attach(*who, Stream())):
        with pytest.raises(SessionLostError) as other:
            find(entry.session_id, BOB)
        with pytest.raises(SessionLostError) as nobody:
            find("guessed", BOB)
        assert str(other.value) == str(nobody.value), "nothing tells that the session is there"
    assert entry.stream is None


def test_ids_cannot_be_guessed_and_are_not_shown(registry):
    first, second = add(registry), add(registry)
    assert first.session_id != second.session_id
    assert len(first.session_id) >= 32
    assert first.session_id not in repr(first)
    assert first.session_id not in first.label


def test_a_new_stream_takes_the_session_over(registry):
    entry, first, second = add(registry), Stream(), Stream()
    registry.attach(entry.session_id, ANN, first)
    registry.attach(entry.session_id, ANN, second)
    assert (first.cancelled, second.cancelled) == (1, 0)
    registry.detach(entry, first)
    assert entry.stream is second
    registry.detach(entry, second)
    assert entry.stream is None


def test_places_are_counted_with_those_being_opened(registry):
    add(registry)
    with registry.place(request(), ANN), pytest.raises(ServerFullError, match="all of its 2"), registry.place(
        request(), ANN
    ):
        pass
    entry = add(registry)  # the place that was not taken is free again
    with pytest.raises(ServerFullError), registry.place(request(), ANN):
        pass
    registry.close(entry.session_id, "done")
    add(registry)


def test_a_session_that_could_not_be_made_takes_no_place(registry):
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), registry.place(request(), ANN):
            raise ZeroDivisionError
    assert len(registry) == 0
    add(registry), add(registry)


def test_a_session_waits_so_long_for_its_edge_to_come_back(registry, clock, closed):
    entry, other, stream = add(registry), add(registry), Stream()
    registry.attach(entry.session_id, ANN, stream)
    registry.attach(other.session_id, ANN, Stream())
    clock.now = 10_000.0
    registry.reap()
    assert closed == [], "a session with a stream has no time-out of this kind"
    registry.detach(entry, stream)
    clock.now += 600
    registry.reap()
    assert registry.idle(entry) == 600
    assert closed == []
    clock.now += 1
    registry.reap()
    assert closed == [(entry.session_id, "no stream for 600 s")]


def test_who_has_been_away_makes_room_where_there_is_no_other(registry, clock, closed):
    waiting, attached = add(registry), add(registry)
    registry.attach(attached.session_id, ANN, Stream())
    clock.now = SPARED_SECONDS
    with pytest.raises(ServerFullError), registry.place(request(), BOB):
        pass
    clock.now += 1
    add(registry, BOB)
    assert closed == [(waiting.session_id, "it had no stream, and its place was needed")]
    assert registry.get(attached.session_id, ANN) is attached


def leave(registry, entry, done):
    """Its edge has left one message to do, and it is `done` or not."""
    inner = pb.EdgeMessage(number=2, ahead=True, gradient_scale=1.0).SerializeToString()
    entry.left = Mailbox(pb.EdgeMessage(number=1, detach=pb.Detach(messages=[inner])))
    entry.messages.last_number = 2 if done else 1
    assert entry.is_done is done


def test_what_is_done_while_its_edge_is_away_makes_room_for_its_owner_alone(registry, clock, closed):
    first, second = add(registry), add(registry)
    clock.now = 1.0
    registry.touch(first)
    leave(registry, first, done=True)
    leave(registry, second, done=False)
    clock.now = SPARED_SECONDS + 1
    with pytest.raises(ServerFullError):  # it has waited for a while, and not for more
        add(registry)
    clock.now += 1
    with pytest.raises(ServerFullError):
        add(registry, BOB)
    assert not closed
    third = add(registry)
    assert [session_id for session_id, _ in closed] == [first.session_id]
    leave(registry, second, done=True)
    clock.now += SPARED_SECONDS + 1
    add(registry)  # one that waits for its edge goes first, however short its wait
    add(registry)
    assert [session_id for session_id, _ in closed] == [first.session_id, third.session_id, second.session_id]


def test_who_ends_its_session_ends_none_that_another_stream_has(registry, closed):
    entry, first, second = add(registry), Stream(), Stream()
    registry.attach(entry.session_id, ANN, first)
    registry.attach(entry.session_id, ANN, second)
    registry.end(entry.session_id, first, "in vain")
    assert not closed
    registry.end(entry.session_id, second, "done")
    registry.end(entry.session_id, second, "again")
    assert closed == [(entry.session_id, "done")]
    assert second.cancelled == 0, "whose call goes on to its end"


def test_who_works_for_an_edge_is_none(registry):
    entry = add(registry)
    leave(registry, entry, done=False)
    assert registry.attach_absent(entry.session_id, ANN, StreamHandle(is_absent=True))
    assert not entry.has_edge
    registry.attach(entry.session_id, ANN, Stream())
    assert entry.has_edge


def test_a_request_that_comes_again_finds_its_session(registry):
    entry = add(registry, request_id="r" * 16)
    assert registry.opened(request(request_id="r" * 16), ANN) is entry
    assert registry.opened(request(request_id="r" * 16), BOB) is None
    assert registry.opened(request(request_id="q" * 16), ANN) is None
    assert registry.opened(request(), ANN) is None


def test_a_request_that_comes_again_too_soon_is_told_so(registry):
    again = request(request_id="r" * 16)
    with registry.place(again, ANN), pytest.raises(ServerUnavailableError, match="is being opened"):
        registry.opened(again, ANN)
    assert registry.opened(again, ANN) is None
    with registry.place(again, ANN), pytest.raises(ServerUnavailableError), registry.place(again, ANN):
        pass
    with registry.place(request(), ANN), registry.place(request(), ANN):
        pass


def test_a_request_s_id_stands_for_one_request(registry):
    add(registry, request_id="r", model_name="one")
    assert registry.opened(request(request_id="r", model_name="one"), ANN) is not None
    with pytest.raises(PreconditionError, match="that of another request"):
        registry.opened(request(request_id="r", model_name="other"), ANN)
    assert registry.opened(request(request_id="r", model_name="other"), BOB) is None


def test_no_more_sessions_end_than_have_to(registry, clock, closed):
    first = add(registry, ANN)
    clock.now = 1.0
    second = add(registry, BOB)
    clock.now = SPARED_SECONDS + 2
    assert registry.ends_others(request(), CAT)
    assert not closed
    add(registry, CAT)
    assert [session_id for session_id, _ in closed] == [first.session_id]
    add(registry, BOB)  # its own goes, and not that of another
    assert [session_id for session_id, _ in closed] == [first.session_id, second.session_id]


def test_who_has_used_up_its_own_ends_nobody_s(registry, clock, closed):
    few = Identity("few", Limits(max_sessions=1))
    entry = add(registry, few)
    registry.attach(entry.session_id, few, Stream())
    add(registry, ANN)
    clock.now = SPARED_SECONDS + 1
    with pytest.raises(QuotaError):
        registry.ends_others(request(), few)
    with pytest.raises(QuotaError):
        add(registry, few)
    assert not closed
    assert len(registry) == 2


def test_a_run_that_begins_anew_ends_its_older_session(registry, closed):
    first, other = add(registry, run_id="1" * 32), add(registry, BOB, run_id="1" * 32)
    second = add(registry, run_id="1" * 32)
    assert closed == [(first.session_id, "its run goes on in another session")]
    assert registry.get(other.session_id, BOB) is other
    assert registry.get(second.session_id, ANN) is second


def test_a_session_that_cannot_be_told_of_gives_its_place_back(clock):
    told, streams = [], [Stream(), Stream()]

    def fails(entry, reason):
        told.append(reason)
        raise ValueError("told in vain")

    registry = Registry(2, 600.0, fails, clock)
    entries = [add(registry, run_id="r") if number else add(registry, run_id="q") for number in range(2)]
    for entry, stream in zip(entries, streams, strict=True):
        registry.attach(entry.session_id, ANN, stream)
    registry.close(entries[0].session_id, "done")
    add(registry, run_id="r")  # a run that begins anew
    assert [len(told), *(stream.cancelled for stream in streams)] == [2, 1, 1]
    for entry in registry.entries():
        registry.detach(entry, entry.stream)
    clock.now += 601
    registry.reap()
    assert len(registry) == 0
    add(registry)
