"""Waits that take too long are ended, once, for a reason that is counted."""

import pytest

from sft_cloud.admission.deadlines import Deadlines


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def watch(clock):
    return Deadlines(stall_seconds=60.0, idle_seconds=600.0, clock=clock)


def test_who_stalls_is_ended_when_the_time_is_over(watch, clock):
    ended = []
    with watch.stalls("no first message", lambda: ended.append("cancelled")):
        clock.now += 59.9
        watch.look()
        assert ended == []
        clock.now += 0.1
        watch.look()
        watch.look()
    assert ended == ["cancelled"]
    assert watch.ended == {"no first message": 1}


def test_who_came_in_time_is_left_alone(watch, clock):
    with watch.stalls("no next part", lambda: pytest.fail("it had not waited too long")):
        clock.now += 59
    clock.now += 1000
    watch.look()
    assert watch.ended == {}


def test_a_wait_that_fails_is_over_too(watch, clock):
    with pytest.raises(ConnectionError), watch.stalls("no next part", lambda: pytest.fail("nobody waits")):
        raise ConnectionError
    clock.now += 1000
    watch.look()


@pytest.mark.parametrize(("seconds", "parts"), [(59.0, 1), (8.4, 60)])
def test_what_comes_in_parts_has_to_keep_its_pace(watch, clock, seconds, parts):
    """A part a minute is no pace; a link of 1 Mb/s has one."""
    ended = []
    with watch.keeps_pace("too slow", lambda: ended.append(clock.now)) as came:
        for _ in range(60):
            clock.now += seconds
            watch.look()
            if ended:
                break
            came(1 << 20)
    assert ended == ([] if parts == 60 else [100.0 + (parts + 1) * seconds])
    clock.now += 10_000
    watch.look()
    assert len(ended) == (parts != 60)


def test_large_messages_have_longer(watch, clock):
    ended = []
    with watch.stalls("answers are not read", lambda: ended.append(1), size=8192 * 40):
        clock.now += 99.9
        watch.look()
        assert not ended
        clock.now += 0.1
        watch.look()
        assert ended


def test_idle_streams_have_another_limit(watch, clock):
    ended = []
    with watch.idles("idle stream", lambda: ended.append(1)):
        clock.now += 599
        watch.look()
        assert not ended
        clock.now += 1
        watch.look()
        assert ended


def test_each_wait_has_its_own_time(watch, clock):
    ended = []
    with watch.stalls("a", lambda: ended.append("a")):
        clock.now += 30
        with watch.stalls("b", lambda: ended.append("b")):
            clock.now += 30
            watch.look()
            assert ended == ["a"]
            clock.now += 30
            watch.look()
    assert ended == ["a", "b"]


def test_it_tells_who_wants_to_know(clock):
    told = []
    watch = Deadlines(60.0, 600.0, clock, on_end=told.append)
    with watch.stalls("no first message", lambda: None):
        clock.now += 60
        watch.look()
    assert told == ["no first message"]
