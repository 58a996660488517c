"""The one place that memory goes through: what fits, what is refused, what comes back."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sft.errors import UsageError
from sft_cloud.engine import make_budget
from sft_cloud.errors import NoMemoryError
from sft_cloud.memory import Kind, MemoryBudget, MemoryShare, process_bytes
from sft_cloud.options import LimitOptions

MiB = 1 << 20


def test_a_block_holds_what_it_charges():
    budget = MemoryBudget(1000)
    with budget.charge(Kind.MESSAGES, 600) as charge:
        assert budget.held()[Kind.MESSAGES] == charge.size == 600
        with pytest.raises(NoMemoryError, match=r"this message would take 401 B, but 400 B of the server's memory"):
            budget.charge(Kind.MESSAGES, 401)
        budget.charge(Kind.ANSWERS, 400).release()
    assert budget.held_bytes == 0
    assert budget.refused() == {**dict.fromkeys(Kind, 0), Kind.MESSAGES: 1}


def test_what_is_said_to_be_left_is_what_the_process_has_left():
    budget = MemoryBudget(800 * MiB, 100 * MiB, lambda: 850 * MiB)
    with pytest.raises(NoMemoryError, match=r"would take 62\.9 MB, but 52\.4 MB of the server's memory are left"):
        budget.charge(Kind.MESSAGES, 60 * MiB)


def test_an_owner_may_be_found_gone_on_a_thread_that_has_the_budget_in_hand():
    class Owner:
        pass

    budget, owner = MemoryBudget(1000), Owner()
    MemoryShare(budget, 100).release_with(owner)
    budget.charge(Kind.MESSAGES, 200).release_with(owner)
    with budget._lock:  # where a collection of garbage begins
        del owner
    assert budget.held_bytes == 0


def test_what_comes_in_parts_is_charged_in_parts_and_given_back_once():
    budget = MemoryBudget(1000)
    charge = budget.charge(Kind.MESSAGES, 100)
    charge.resize(900)
    with pytest.raises(NoMemoryError):
        charge.resize(1001)
    assert budget.held_bytes == 900
    charge.resize(50)
    charge.release()
    charge.release()
    charge.resize(500)  # by a thread that has not heard that it is over
    assert budget.held_bytes == 0


def test_what_could_never_fit_is_told_so():
    with pytest.raises(NoMemoryError, match=r"the answer would take 1 kB .* make it smaller"):
        MemoryBudget(1000).charge(Kind.ANSWERS, 1001)


def test_a_charge_ends_with_its_owner():
    class Owner:
        pass

    budget, owner = MemoryBudget(1000), Owner()
    budget.charge(Kind.ANSWERS, 700).release_with(owner)
    gc.collect()
    assert budget.held_bytes == 700
    del owner
    gc.collect()
    assert budget.held_bytes == 0


def test_large_holdings_leave_room_for_small_ones():
    budget = MemoryBudget(80 * MiB)
    with pytest.raises(NoMemoryError):
        budget.charge(Kind.DOWNLOADS, 71 * MiB)
    budget.charge(Kind.DOWNLOADS, 35 * MiB)
    MemoryShare(budget, 35 * MiB)
    with pytest.raises(NoMemoryError):
        budget.charge(Kind.MESSAGES, 2 * MiB)
    for _ in range(10):
        budget.charge(Kind.MESSAGES, MiB)
    with pytest.raises(NoMemoryError):
        budget.charge(Kind.MESSAGES, MiB)


def test_who_can_wait_gets_what_others_give_back():
    budget = MemoryBudget(1000)
    other = budget.charge(Kind.DOWNLOADS, 900)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(lambda: budget.charge(Kind.DOWNLOADS, 200, wait_seconds=60))
        other.release()
        assert waiting.result(30).size == budget.held_bytes == 200
    with pytest.raises(NoMemoryError, match="800 B of the server's memory are left"):
        budget.charge(Kind.DOWNLOADS, 900, wait_seconds=0.01)
    with pytest.raises(NoMemoryError, match="make it smaller"):
        budget.charge(Kind.DOWNLOADS, 1001, wait_seconds=60)
    assert budget.refused()[Kind.DOWNLOADS] == 2


def test_what_is_in_no_book_counts_too():
    taken = [0]
    budget = MemoryBudget(80 * MiB, 100 * MiB, measure=lambda: taken[0])
    taken[0] = 150 * MiB
    with pytest.raises(NoMemoryError):
        budget.charge(Kind.MESSAGES, 31 * MiB)
    budget.charge(Kind.MESSAGES, 30 * MiB).release()


def test_a_device_of_its_own_leaves_messages_to_the_machine():
    budget = MemoryBudget(1000, host=MemoryBudget(100))
    with pytest.raises(NoMemoryError):
        budget.charge(Kind.MESSAGES, 101)
    budget.charge(Kind.MESSAGES, 100)
    MemoryShare(budget, 1000)
    assert budget.held() == {**dict.fromkeys(Kind, 0), Kind.MESSAGES: 100, Kind.SESSIONS: 1000}
    assert budget.refused()[Kind.MESSAGES] == 1


def test_a_limit_that_the_process_takes_by_itself_is_no_limit():
    with pytest.raises(UsageError, match=r"--memory-limit is of the whole process, which takes .* give it at least"):
        make_budget(LimitOptions(memory_limit=64 * MiB), torch.device("cpu"))


def test_what_the_process_takes_is_told():
    before = process_bytes()
    held = bytearray(64 * MiB)
    assert process_bytes() - before > 60 * MiB
    del held
