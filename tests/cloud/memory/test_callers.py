"""No caller takes the memory from others: what one may hold, however it goes about it."""

import re

import pytest

from sft_cloud.errors import NoMemoryError
from sft_cloud.identity import Identity, Limits
from sft_cloud.memory import Kind, MemoryBudget, MemoryShare

TOTAL = 1 << 30
PIECE = 5 << 20
ALICE, BOB = Identity("alice"), Identity("bob")


def make_budget(is_shared=True):
    budget = MemoryBudget(TOTAL)
    budget.shared_if(lambda: is_shared)
    return budget


def charges(kind):
    def take(budget, caller):
        return budget.charge(kind, PIECE, caller)

    return take


def grows(**what):
    """A share that is asked for more and more, of one thing."""
    shares = {}

    def take(budget, caller):
        if (budget, caller) not in shares:
            shares[budget, caller] = MemoryShare(budget, PIECE, caller), dict.fromkeys(what, 0)
        share, sizes = shares[budget, caller]
        sizes.update({name: sizes[name] + PIECE for name in what})
        share.hold(sizes.get("size", 0), sizes.get("answers", 0), sizes.get("batch", 0))
        return share

    return take


WAYS = {
    "half-sent messages": charges(Kind.MESSAGES),
    "answers": charges(Kind.ANSWERS),
    "downloads": charges(Kind.DOWNLOADS),
    "builds": charges(Kind.BUILDS),
    "sessions": lambda budget, caller: MemoryShare(budget, PIECE, caller),
    "one session's batch": grows(batch=1),
    "what waits in one session": grows(size=1),
    "answers of one session": grows(answers=1),
    "a bit of all": grows(size=1, answers=1, batch=1),
}


def hoard(budget, caller, *ways):
    """Takes all that it gets, in these ways one after the other; what was taken, and why there was no more."""
    held, reason = [], ""
    for way in ways:
        for _ in range(TOTAL // PIECE + 1):
            try:
                held.append(WAYS[way](budget, caller))
            except NoMemoryError as error:
                reason = str(error)
                break
    return held, reason


@pytest.mark.parametrize("then", ["half-sent messages", "sessions", "what waits in one session"])
@pytest.mark.parametrize("way", WAYS)
def test_beside_one_that_hoards_another_opens_and_trains(way, then):
    budget = make_budget()
    held, reason = hoard(budget, ALICE, way, then)
    assert held
    assert "kept for others: end something of yours" in reason or "of which one may take 537 MB" in reason
    session = MemoryShare(budget, TOTAL // 4, BOB)
    session.hold(PIECE, PIECE, PIECE)
    with budget.charge(Kind.MESSAGES, PIECE, BOB), budget.charge(Kind.DOWNLOADS, 8 << 20, BOB):
        pass


@pytest.mark.parametrize("way", WAYS)
def test_who_is_alone_may_take_all_there_is(way):
    budget = make_budget(is_shared=False)
    hoard(budget, ALICE, way)
    assert budget.held_bytes > 7 / 8 * TOTAL - 4 * PIECE


def test_one_who_has_taken_much_goes_on_when_others_have_come():
    budget = make_budget()
    large = MemoryShare(budget, TOTAL // 2 - PIECE, ALICE)
    MemoryShare(budget, TOTAL * 5 // 16, BOB)
    with budget.charge(Kind.MESSAGES, PIECE, ALICE):
        large.hold(0, PIECE)
    with pytest.raises(NoMemoryError, match="kept for others"):
        MemoryShare(budget, PIECE, ALICE)
    MemoryShare(budget, PIECE, BOB)


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_token_s_own_limit_takes_the_place_of_the_rule(is_shared):
    budget, names = make_budget(is_shared), r"105 MB of the server's memory \(--max-memory\)"
    limited = Identity("alice", Limits(max_memory=100 << 20))
    with pytest.raises(NoMemoryError, match=f"this session would take .* {names}: choose a smaller model"):
        MemoryShare(budget, 101 << 20, limited)
    share = MemoryShare(budget, 60 << 20, limited)
    assert not share.too_large(40 << 20)
    assert re.search(f"{names}: send smaller batches", share.too_large(41 << 20))
    budget.charge(Kind.MESSAGES, 40 << 20, limited)
    with pytest.raises(NoMemoryError, match=f"this download would take 1.05 MB beside .* {names}: end something"):
        budget.charge(Kind.DOWNLOADS, 1 << 20, limited)
    budget.charge(Kind.MESSAGES, 64 << 10, limited)
    MemoryShare(budget, TOTAL * 3 // 4, Identity("bob", Limits(max_memory=TOTAL)))


def test_what_is_given_back_is_nobody_s():
    budget = make_budget()
    for name in ("alice", "bob", "carol"):
        caller = Identity(name)
        held, _ = hoard(budget, caller, "a bit of all", "sessions", "downloads")
        for one in held:
            one.release()
    assert budget.held_bytes == 0
    assert not budget._books._parts
