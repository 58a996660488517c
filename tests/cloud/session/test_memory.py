"""What sessions may take together, and what a batch will take, before anything is taken."""

import gc
import weakref

import pytest
import torch
from torch import nn

from sft.errors import ProtocolError, ServerFullError
from sft.models import Cut
from sft_cloud.engine.build import build, make_session
from sft_cloud.engine.request import check_request
from sft_cloud.session import memory
from sft_cloud.session.memory import (
    BatchMemory,
    MemoryBudget,
    MemoryShare,
    default_budget,
    measure,
    memory_bytes,
    session_bytes,
)

CPU = torch.device("cpu")


class Owner:
    pass


def test_sessions_share_what_there_is():
    budget = MemoryBudget(1000)
    first = budget.open(400)
    budget.open(500)
    with pytest.raises(ServerFullError, match="try again when another session has ended"):
        budget.open(200)
    first.hold(100)
    with pytest.raises(MemoryError):
        first.hold(101)
    first.hold(50)
    assert budget.held_bytes == 950
    budget.open(50)


def test_a_session_that_could_never_fit_is_told_so():
    with pytest.raises(ServerFullError, match="smaller model"):
        MemoryBudget(1000).open(1001)


def test_a_batch_that_could_never_fit_is_told_so():
    share = MemoryBudget(1000).open(400)
    share.check(600)
    with pytest.raises(ProtocolError, match="send smaller batches"):
        share.check(601)


def test_everything_comes_back_with_its_owner():
    budget, owner = MemoryBudget(1000), Owner()
    share = budget.open(400)
    share.release_with(owner)
    share.hold(300)
    assert budget.held_bytes == 700
    del owner, share
    gc.collect()
    assert budget.held_bytes == 0


def test_what_shrinks_fits_even_where_too_much_is_held():
    budget = MemoryBudget(1000)
    share = budget.open(500)
    share.hold(500)
    budget.total_bytes = 800
    share.hold(400)
    assert budget.held_bytes == 900


def test_without_a_budget_everything_fits():
    share = MemoryShare()
    share.check(1 << 60)
    share.hold(1 << 60)
    share.release_with(Owner())


def test_what_a_session_begins_with():
    assert session_bytes(110, 10, "AdamW") == 4 * 110 + 3 * 4 * 10
    assert session_bytes(110, 10, "SGD") == 4 * 110 + 2 * 4 * 10


def test_the_limit_of_a_container_counts(monkeypatch):
    machine = memory_bytes(CPU)
    assert machine > 1 << 20
    monkeypatch.setattr(memory.Path, "read_text", lambda path: "1048576\n")
    assert memory_bytes(CPU) == 1 << 20
    assert default_budget(CPU) == int(0.8 * (1 << 20))
    monkeypatch.setattr(memory.Path, "read_text", lambda path: "max\n")
    assert memory_bytes(CPU) >= machine


@pytest.mark.parametrize("cut", [Cut("sft", 1, 4), Cut("sft", 3, 4), Cut("sl", 1)])
@pytest.mark.parametrize(("sequences", "padded_length"), [(1, 100), (7, 30), (3, 128)])
def test_a_batch_takes_what_three_small_ones_say(make_edge, cut, sequences, padded_length):
    edge = make_edge(cut=cut)
    spec = check_request(edge.request())
    half = make_session(spec, build(spec, CPU), [*edge.weights, *edge.factors], CPU)._half
    parameters = list(half.parameters())

    def run(B, S):
        return half.net_2.train()(torch.zeros(B, S, half.net_2.width, requires_grad=True), [S] * B, {}).logits

    estimate = measure(lambda S: run(1, S), parameters, 128).of(sequences, padded_length)
    taken = memory._saved(lambda: run(sequences, padded_length), parameters)
    assert taken <= estimate <= 2 * taken


def test_a_model_that_takes_short_sequences_only():
    linear = nn.Linear(4, 4)
    known = measure(lambda S: linear(torch.zeros(1, S, 4, requires_grad=True)).exp(), list(linear.parameters()), 5)
    assert known.linear == known.square == 0
    assert known.of(10, 5) >= 10 * 5 * 4 * 4
    assert BatchMemory(1.0, 2.0, 3.0).of(2, 10) == int(1.5 * 2 * (1 + 20 + 300))


def test_nothing_of_what_was_measured_stays():
    linear = nn.Linear(4, 4)
    made = []

    def run(length):
        softmax = linear(torch.zeros(1, length, 4, requires_grad=True)).softmax(-1)  # which is saved as it comes out
        made.append(weakref.ref(softmax))
        return softmax

    measure(run, list(linear.parameters()), 128)
    assert len(made) == 3
    assert [one() for one in made] == [None] * 3
