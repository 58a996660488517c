"""Places for sessions."""

import pytest

from sft.errors import ServerFullError, SessionLostError
from sft_cloud.errors import PreconditionError
from sft_cloud.registry import ATTACH_SECONDS, Registry


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def closed():
    return []


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def registry(clock, closed):
    return Registry(2, lambda entry, reason: closed.append((entry.session_id, reason)), clock)


def add(registry):
    with registry.place() as put:
        return put(object())


def test_sessions_by_id(registry, closed):
    entry = add(registry)
    assert registry.get(entry.session_id) is entry
    registry.attach(entry.session_id)
    registry.close(entry.session_id, "done")
    registry.close(entry.session_id, "again")
    assert closed == [(entry.session_id, "done")]
    for find in (registry.get, registry.attach):
        with pytest.raises(SessionLostError, match="no such session"):
            find(entry.session_id)


def test_ids_cannot_be_guessed_and_are_not_shown(registry):
    first, second = add(registry), add(registry)
    assert first.session_id != second.session_id
    assert len(first.session_id) >= 32
    assert first.session_id not in repr(first)
    assert first.session_id not in first.label


def test_one_stream_a_session(registry):
    entry = add(registry)
    registry.attach(entry.session_id)
    with pytest.raises(PreconditionError, match="another stream"):
        registry.attach(entry.session_id)


def test_places_are_counted_with_those_being_opened(registry):
    add(registry)
    with registry.place(), pytest.raises(ServerFullError, match="all of its 2 sessions"), registry.place():
        pass
    entry = add(registry)  # the place that was not taken is free again
    with pytest.raises(ServerFullError), registry.place():
        pass
    registry.close(entry.session_id, "done")
    add(registry)


def test_a_session_that_could_not_be_made_takes_no_place(registry):
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), registry.place():
            raise ZeroDivisionError
    assert len(registry) == 0
    add(registry), add(registry)


def test_a_session_without_a_stream_makes_room_when_its_time_is_over(registry, clock, closed):
    waiting, attached = add(registry), add(registry)
    registry.attach(attached.session_id)
    clock.now = ATTACH_SECONDS
    with pytest.raises(ServerFullError), registry.place():
        pass
    clock.now += 1
    assert registry.age(waiting) == ATTACH_SECONDS + 1
    add(registry)
    assert closed == [(waiting.session_id, "no stream attached in time")]
    assert registry.get(attached.session_id) is attached
