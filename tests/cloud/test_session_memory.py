"""Messages that are repeated: answered from memory, or refused once that is not remembered; never done again."""

import pytest
import torch
from support.session_parts import DROPPED, gradients_of, rides_on, same_bits, weigh, weights_of

from sft.errors import ProtocolError
from sft_cloud import answers
from sft_cloud.errors import PreconditionError
from sft_cloud.session import State


@pytest.fixture
def session(open_session, edge):
    return open_session(edge)


def remembered(session):
    return list(session._answers._answers)


def test_a_repeated_forward_is_answered_from_memory(session, open_session, edge):
    first = session.handle(edge.forward(0, 0))
    second = session.handle(edge.forward(0, 1))
    assert session.handle(edge.forward(0, 0)) == first
    assert session.handle(edge.forward(0, 1)) == second
    session.handle(edge.commit(0))

    once = open_session(edge)
    for message in (edge.forward(0, 0), edge.forward(0, 1), edge.commit(0)):
        once.handle(message)
    assert same_bits(weights_of(once), weights_of(session))


def test_a_repeated_commit_is_applied_once(session, edge):
    session.handle(edge.forward(0))
    session.handle(edge.commit(0))
    before = weights_of(session)
    assert session.handle(edge.commit(0)).committed.next_step == 1
    session.handle(edge.forward(1))
    assert session.handle(edge.commit(0)).committed.next_step == 1
    assert session.state is State.ACCUMULATING
    assert same_bits(before, weights_of(session))
    assert session.handle(edge.commit(1)).committed.next_step == 2


def test_everything_of_a_step_is_answered_from_memory(session, open_session, edge):
    gradient = torch.ones(3, 3)
    messages = [
        edge.forward(0, 0),
        edge.unlabelled(0, 1),
        edge.forward(0, 2, loss_scale=0.0),
        edge.backward(0, 1, gradient),
        weigh(0, (2, 0.5)),
        edge.forward(0, 3, loss_scale=0.0),
        weigh(0, (3, 0.25), micro_batch=1, gradient_scale=0.5),
    ]
    for message in messages:
        answer = session.handle(message).SerializeToString()
        assert session.handle(message).SerializeToString() == answer
    # What a weight or a Backward came for is over.
    assert remembered(session) == [("forward", 0), ("backward", 1), ("", 0), ("", 1)]
    once = open_session(edge)
    for message in messages:
        once.handle(message)
    assert same_bits(gradients_of(session), gradients_of(once))


@pytest.mark.parametrize("way", ["weighed", "dropped", "gone backward through"])
def test_a_forward_that_is_over_is_not_done_again(session, edge, way):
    backward = way == "gone backward through"
    forward = edge.unlabelled(0, 0) if backward else edge.forward(0, 0, loss_scale=0.0)
    session.handle(forward)
    weight = 0.5 if way == "weighed" else DROPPED
    session.handle(edge.backward(0, 0, torch.ones(3, 3)) if backward else weigh(0, (0, weight)))
    gradients = gradients_of(session)
    with pytest.raises(
        PreconditionError, match="forward 0 of this step was answered, and the answer is not remembered"
    ):
        session.handle(forward)
    assert session.state is State.ACCUMULATING
    assert same_bits(gradients, gradients_of(session))


def test_of_many_answers_the_oldest_are_forgotten(session, open_session, edge, monkeypatch):
    monkeypatch.setattr(answers, "MAX_ANSWERS", 3)
    gradient = torch.ones(3, 3)
    messages = [
        edge.unlabelled(0, 0),
        edge.forward(0, 1),
        edge.backward(0, 0, gradient),
        weigh(0, gradient_scale=0.5),
        edge.forward(0, 2),
        weigh(0, gradient_scale=0.5, micro_batch=1),
        edge.forward(0, 3),
    ]
    for message in messages:
        session.handle(message)
    assert remembered(session) == [("forward", 2), ("", 1), ("forward", 3)]
    gradients = gradients_of(session)
    for message in messages[:4]:
        with pytest.raises(PreconditionError, match=r"not remembered|does not wait for a Backward"):
            session.handle(message)
    for message in messages[4:]:
        session.handle(message)
    assert same_bits(gradients, gradients_of(session))
    session.handle(edge.commit(0))
    assert remembered(session) == []
    session.handle(edge.forward(1, 0))  # numbers begin anew


def test_large_answers_are_forgotten_sooner(session, edge, monkeypatch):
    size = session.handle(edge.forward(0, 0, want_logits=True)).ByteSize()
    monkeypatch.setattr(answers, "MAX_BYTES", 2 * size + size // 2)
    for m in range(1, 4):
        session.handle(edge.forward(0, m, want_logits=True))
    assert remembered(session) == [("forward", 2), ("forward", 3)]
    monkeypatch.setattr(answers, "MAX_BYTES", 1)
    message = edge.forward(0, 4, want_logits=True)
    answer = session.handle(message)
    assert remembered(session) == [("forward", 4)], "the newest is remembered in any case"
    assert session.handle(message) == answer


def test_two_hundred_forwards_that_are_dropped_leave_nothing(session, edge):
    message = edge.forward(0, 0, loss_scale=0.0, want_logits=True)
    for m in range(200):
        message.micro_batch = m
        del message.weights[:]
        session.handle(rides_on(message, *[(m - 1, DROPPED)] * bool(m)))
    assert remembered(session) == [("forward", 199)]


def test_a_weight_that_came_before_does_no_harm(session, edge):
    session.handle(edge.forward(0, 0, loss_scale=0.0))
    session.handle(weigh(0, (0, 0.5)))
    gradients = gradients_of(session)
    session.handle(weigh(0, (0, 0.5), (0, 0.5), micro_batch=1))
    assert same_bits(gradients, gradients_of(session))
    with pytest.raises(ProtocolError, match="another weight"):
        session.handle(weigh(0, (0, 1.0), micro_batch=2))
