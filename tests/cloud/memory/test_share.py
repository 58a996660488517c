"""What a session may take beside others."""

import gc

import pytest

from sft.errors import ServerFullError
from sft_cloud.errors import NoMemoryError
from sft_cloud.memory import MemoryBudget, MemoryShare


class Owner:
    pass


def test_sessions_share_what_there_is():
    budget = MemoryBudget(1000)
    first = MemoryShare(budget, 400)
    MemoryShare(budget, 500)
    with pytest.raises(ServerFullError, match="try again when another session has ended"):
        MemoryShare(budget, 200)
    first.hold(100, 0)
    with pytest.raises(NoMemoryError):
        first.hold(101, 0)
    first.hold(50, 0)
    assert budget.held_bytes == 950
    MemoryShare(budget, 50)


def test_a_session_that_could_never_fit_is_told_so():
    with pytest.raises(ServerFullError, match="smaller model"):
        MemoryShare(MemoryBudget(1000), 1001)


def test_a_batch_that_could_never_fit_is_told_so():
    share = MemoryShare(MemoryBudget(1000), 400)
    assert not share.too_large(600)
    assert "send smaller batches" in share.too_large(601)


def test_everything_comes_back_with_its_owner():
    budget, owner = MemoryBudget(1000), Owner()
    share = MemoryShare(budget, 400)
    share.release_with(owner)
    share.hold(300, 0)
    assert budget.held_bytes == 700
    del owner, share
    gc.collect()
    assert budget.held_bytes == 0


def test_what_shrinks_fits_even_where_too_much_is_held():
    budget = MemoryBudget(1000)
    share = MemoryShare(budget, 500)
    share.hold(500, 0)
    budget.total_bytes = 800
    share.hold(400, 0)
    assert budget.held_bytes == 900


def test_one_room_is_for_the_batches_of_all():
    budget = MemoryBudget(1000)
    first, second = MemoryShare(budget, 100), MemoryShare(budget, 100)
    first.hold(0, batch=300)
    second.hold(0, batch=200)
    assert budget.held_bytes == 500
    others = MemoryShare(budget, 500)
    first.hold(0, batch=300)
    second.hold(0, batch=300)
    with pytest.raises(NoMemoryError):
        second.hold(0, batch=301)
    others.release()
    second.hold(0, batch=301)
    second.release()
    assert budget.held_bytes == 400
    first.release()
    assert budget.held_bytes == 0


def test_without_a_budget_everything_fits():
    share = MemoryShare()
    assert not share.too_large(1 << 60)
    share.hold(1 << 60, 0)
    share.release_with(Owner())
