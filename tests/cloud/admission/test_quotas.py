"""What one caller may take, by clocks that stand until they are moved."""

import threading
import time
from contextlib import suppress

import pytest

from sft.errors import AccessError
from sft_cloud.admission.quotas import CHECK_REST, LONG_CHECK_SECONDS, SPARE_CALLS, Quotas
from sft_cloud.errors import QuotaError
from sft_cloud.identity import Identity, Limits

DAY = 86_400.0


class Clock:
    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock(50.0)


@pytest.fixture
def wall_clock():
    return Clock(20_000 * DAY)


@pytest.fixture
def quotas(clock, wall_clock):
    return Quotas(max_sessions=4, opens_per_minute=3, max_calls=40, clock=clock, wall_clock=wall_clock)


def caller(name="alice", **limits):
    return Identity(name, Limits(**limits))


def test_calls_at_a_time_are_counted_by_caller(quotas):
    few, other = caller(max_sessions=1), caller("bob", max_sessions=1)
    held = [quotas.call(few) for _ in range(1 + SPARE_CALLS)]
    with pytest.raises(QuotaError, match=f"{1 + SPARE_CALLS} calls of yours are running"):
        quotas.call(few)
    quotas.call(other)
    held[0]()
    quotas.call(few)


def test_however_many_take_all_they_can_another_finds_a_place(quotas):
    def take_all(name):
        held = []
        with suppress(QuotaError):
            while True:
                held.append(quotas.call(caller(name)))
        return held

    held = [take_all(name) for name in ("alice", "bob", "carol", "dave", "erin")]
    assert [len(one) for one in held] == [8, 8, 8, 8, 4]  # of 40
    with pytest.raises(QuotaError, match="4 more can run on this server, which are kept for others"):
        quotas.call(caller("erin"))
    quotas.call(caller("frank"))()
    for one in held:
        for over in one:
            over()
    assert len(take_all("frank")) == 4 + SPARE_CALLS


def test_requests_to_open_come_back_with_time(quotas, clock):
    for _ in range(3):
        quotas.count_open(caller())
    with pytest.raises(QuotaError, match="more than 3 requests to open a session in a minute; try again in 20 seconds"):
        quotas.count_open(caller())
    quotas.count_open(caller("bob"))
    clock.now += 19.9
    with pytest.raises(QuotaError):
        quotas.count_open(caller())
    clock.now += 0.2
    quotas.count_open(caller())
    clock.now += 1e6
    for _ in range(3):
        quotas.count_open(caller())
    with pytest.raises(QuotaError):
        quotas.count_open(caller())


def test_the_bytes_of_a_day(quotas, wall_clock):
    alice = caller(max_bytes_per_day=100)
    quotas.count_bytes(alice, 60)
    quotas.count_bytes(alice, 40)
    with pytest.raises(QuotaError, match="the 100 bytes that are yours for a day"):
        quotas.count_bytes(alice, 1)
    quotas.count_bytes(alice, 1, refuses=False)
    quotas.count_bytes(caller("bob", max_bytes_per_day=100), 100)
    wall_clock.now += DAY - 1
    with pytest.raises(QuotaError):
        quotas.count_bytes(alice, 0)
    wall_clock.now += 1
    quotas.count_bytes(alice, 100)


def test_who_has_no_limit_is_not_counted_out(quotas):
    quotas.count_bytes(caller(), 1 << 60)
    assert [quotas.seconds_to_wait(caller()) for _ in range(1000)] == [0.0] * 1000


def test_steps_are_slowed_down_to_the_rate(quotas, clock):
    alice = caller(steps_per_second=2.0)
    assert [quotas.seconds_to_wait(alice) for _ in range(6)] == [0.0] * 6  # three seconds' worth
    for _ in range(100):
        wait = quotas.seconds_to_wait(alice)
        assert wait == pytest.approx(0.5)
        clock.now += wait
    assert quotas.seconds_to_wait(caller("bob", steps_per_second=2.0)) == 0.0
    clock.now += 1000
    assert [quotas.seconds_to_wait(alice) for _ in range(6)] == [0.0] * 6
    assert quotas.seconds_to_wait(alice) > 0


def test_a_slow_rate_lets_one_step_through(quotas):
    alice = caller(steps_per_second=0.01)
    assert quotas.seconds_to_wait(alice) == 0.0
    assert quotas.seconds_to_wait(alice) == pytest.approx(100)


def test_a_rate_that_changes_counts_from_then_on(quotas, clock):
    for _ in range(5):
        quotas.seconds_to_wait(caller(steps_per_second=0.01))  # four too many
    assert quotas.seconds_to_wait(caller(steps_per_second=100.0)) == pytest.approx(0.05)
    clock.now += 1
    assert quotas.seconds_to_wait(caller(steps_per_second=100.0)) == 0.0


def test_who_alternates_between_two_tokens_takes_no_more_steps(quotas):
    slow, other = caller(steps_per_second=1.0), caller(steps_per_second=1.1)
    waits = [quotas.seconds_to_wait(one) for _ in range(10) for one in (slow, other)]
    assert waits[:3] == [0.0] * 3  # three seconds' worth
    assert all(wait > 0 for wait in waits[3:])
    assert waits[-1] == pytest.approx(17 / 1.1)


def test_callers_that_are_long_gone_are_forgotten(quotas, clock):
    for number in range(100):
        quotas.count_bytes(caller(f"caller {number}"), 1)
    quotas.call(caller("stays"))
    clock.now += 3 * DAY
    quotas.count_bytes(caller("new"), 1)
    assert quotas._usages.keys() == {"stays", "new"}


@pytest.mark.parametrize(("own", "server", "both"), [(None, 4, 4), (2, 4, 2), (9, 4, 4)])
def test_sessions_at_a_time(own, server, both):
    assert Limits(max_sessions=own).sessions_of(server) == both


def test_models_are_named_by_patterns():
    limits = Limits(models=("bert-*", "meta/*"))
    for name in ("bert-base", "meta/llama"):
        limits.check_model_name(name)
    with pytest.raises(AccessError, match=r"models named bert-\*, meta/\*, and yours was not named: .* --model-name"):
        limits.check_model_name("")
    for name in ("Bert-base", "gpt2", "a/bert-base"):
        with pytest.raises(AccessError, match=r"not among those that your token is for: bert-\*, meta/\*"):
            limits.check_model_name(name)
    Limits().check_model_name("anything")


def test_the_width_of_what_crosses():
    limits = Limits(max_split_rank=8)
    limits.check_rank(8)
    with pytest.raises(AccessError, match="9 wide; your token is for at most 8"):
        limits.check_rank(9)
    Limits().check_rank(10**6)


def test_a_long_look_at_a_message_is_paid_for_by_its_caller_alone():
    rests, resting = [], threading.Event()

    def sleep(seconds):
        rests.append(seconds)
        with quotas.check_of_form(caller("bob")):  # others are looked at meanwhile
            resting.set()

    quotas = Quotas(max_sessions=4, opens_per_minute=3, max_calls=40, sleep=sleep)
    with quotas.check_of_form(caller()):
        pass
    assert not rests
    with suppress(ValueError), quotas.check_of_form(caller()):
        began = time.thread_time()
        while time.thread_time() - began < LONG_CHECK_SECONDS:
            pass
        raise ValueError
    assert resting.is_set()
    assert rests[0] >= CHECK_REST * LONG_CHECK_SECONDS
