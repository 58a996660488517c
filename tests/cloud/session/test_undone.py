"""A step that the device has no memory for: undone as a whole, answered so, and begun anew with the same bits."""

import pytest
import torch
from support.session_parts import gradients_of, same_bits, weights_of

from sft_cloud.session.memory import check_room_for_step
from sft_cloud.session.session import State


@pytest.fixture
def session(open_session, edge):
    return open_session(edge)


class OutOfMemory:
    """Strikes at the n-th call of a function, and counts."""

    def __init__(self, monkeypatch, place, at):
        self.calls = self.fired = 0
        self._at = at
        module, _, name = place.rpartition(".")
        holder = __import__(module, fromlist=["_"])
        self._real = getattr(holder, name)
        monkeypatch.setattr(holder, name, self)

    def __call__(self, *arguments, **values):
        self.calls += 1
        if self.calls == self._at:
            self.fired += 1
            raise torch.cuda.OutOfMemoryError("for a test")
        return self._real(*arguments, **values)


def train(session, edge, steps):
    """Micro-batches with labels and without, and commits that ride; begins a step anew that was undone."""
    undone, commit = [], None
    for step in range(steps):
        while True:
            with_labels = session.handle(edge.forward(step, 0, commit=commit))
            commit = None
            if not with_labels.HasField("step_skipped"):
                outputs = session.handle(edge.unlabelled(step, 1))
                if not outputs.HasField("step_skipped"):
                    result = session.handle(edge.backward(step, 1, torch.ones(3, 3)))
                    if not result.HasField("step_skipped"):
                        break
            assert gradients_of(session) == {}
            assert session.state is State.READY
            undone.append(step)
        commit = edge.commit_part(step)
    session.handle(edge.commit(steps - 1))
    return undone


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    "place",
    [
        "torch.autograd.backward",
        "sft_cloud.session.session.check_room_for_step",
        "sft_cloud.session.upper_half.encode_logits",
        "sft_cloud.session.upper_half.encode_tensor",
    ],
)
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_step_that_is_undone_leaves_nothing(session, open_session, edge, monkeypatch, place, at):
    quiet = open_session(edge)
    assert train(quiet, edge, 4) == []
    fault = OutOfMemory(monkeypatch, place, at)
    undone = train(session, edge, 4)
    assert fault.fired == 1
    assert len(undone) == 1
    assert session.next_step == 4
    assert same_bits(weights_of(session), weights_of(quiet))


def test_the_answer_says_so_in_a_sentence(session, edge, monkeypatch):
    OutOfMemory(monkeypatch, "sft_cloud.session.session.check_room_for_step", 1)
    answer = session.handle(edge.forward(0))
    assert answer.step_skipped.reason == "the cloud's device is out of memory; try smaller batches or another cut"
    assert (answer.step, answer.micro_batch) == (0, 0)


def test_a_commit_stands_although_what_it_rode_on_was_undone(session, open_session, edge, monkeypatch):
    session.handle(edge.forward(0))
    OutOfMemory(monkeypatch, "sft_cloud.session.session.check_room_for_step", 1)
    assert session.handle(edge.forward(1, commit=edge.commit_part(0))).HasField("step_skipped")
    assert session.next_step == 1
    apart = open_session(edge)
    apart.handle(edge.forward(0))
    apart.handle(edge.commit(0))
    assert same_bits(weights_of(session), weights_of(apart))


def test_a_commit_that_runs_out_of_memory_ends_the_session(session, edge, monkeypatch):
    session.handle(edge.forward(0))
    OutOfMemory(monkeypatch, "sft_cloud.session.commit.take_step", 1)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        session.handle(edge.commit(0))
    assert session.state is State.FAILED


def test_room_for_a_step_is_asked_for_before_it_is_promised(monkeypatch):
    asked = []
    monkeypatch.setattr("sft_cloud.session.memory.torch.empty", lambda size, **_: asked.append(size))
    trained, frozen = torch.nn.Parameter(torch.ones(10)), torch.nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.AdamW([trained, frozen])
    frozen.requires_grad_(False)
    check_room_for_step(optimizer)
    trained.grad = torch.ones(10)
    optimizer.step()
    check_room_for_step(optimizer)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(5))]})
    check_room_for_step(optimizer)
    assert asked == [3 * 40, 40, 40 + 3 * 20], "Adam's two moments once, and what the step computes with"


def test_a_device_without_room_says_so_at_once():
    parameter = torch.nn.Parameter(torch.ones(1).expand(1 << 46), requires_grad=True)
    parameter.grad = torch.ones(1).expand(1 << 46)
    with pytest.raises(RuntimeError, match="allocate memory"):
        check_room_for_step(torch.optim.SGD([parameter], lr=0.1))
