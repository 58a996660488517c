"""What an edge sends before it has seen what became of what it sent before: taken in order, or not at all."""

import math

import pytest
import torch
from support.session_parts import same_bits, weights_of

from sft.errors import ProtocolError
from sft.optim.gradients import clip_scale
from sft.v1 import split_training_pb2 as pb
from sft_cloud.session.session import State


@pytest.fixture
def session(open_session, edge):
    return open_session(edge)


def commit(edge, step, max_grad_norm=0.5):
    part = edge.commit_part(step)
    part.max_grad_norm = max_grad_norm
    return part


def forward(edge, step, micro_batch=0, ahead=True, **values):
    message = edge.forward(step, micro_batch, frozen_edge=True, **values)
    message.ahead = ahead
    return message


def infinite(edge):
    """A micro-batch whose loss is no number."""
    activation = edge.activation(0)
    numbers = torch.full(tuple(activation.packed.shape), math.inf)
    activation.packed.data = numbers.numpy().tobytes()
    return activation


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3, 1e6])
def test_the_cloud_clips_as_an_edge_would(session, open_session, edge, max_grad_norm):
    told = open_session(edge)
    for step in range(3):
        norm = math.sqrt(told.handle(forward(edge, step)).result.squared_gradient_norm)
        told.handle(edge.commit(step, clip_scale(norm, max_grad_norm)))
        session.handle(forward(edge, step))
        session.handle(pb.EdgeMessage(step=step, commit=commit(edge, step, max_grad_norm)))
    assert session.next_step == 3
    assert same_bits(weights_of(session), weights_of(told))


def test_no_step_is_taken_with_a_loss_that_is_no_number(session, edge):
    session.handle(forward(edge, 0, 0))
    assert math.isnan(session.handle(forward(edge, 0, 1, activation=infinite(edge))).result.loss)
    before = weights_of(session)
    refused = session.handle(forward(edge, 1, commit=commit(edge, 0)))
    assert refused.step_skipped.reason == ("the loss, or the norm of the gradients, of step 0 is not a finite number")
    for late in (forward(edge, 2, commit=commit(edge, 1)), forward(edge, 2, 1), evaluation(edge)):
        assert session.handle(late).step_skipped.reason == refused.step_skipped.reason
    assert (session.next_step, session.state) == (0, State.READY)
    assert same_bits(weights_of(session), before)
    assert session.handle(forward(edge, 0, ahead=False)).HasField("result")
    session.handle(forward(edge, 1, commit=commit(edge, 0)))
    assert session.next_step == 1


def evaluation(edge):
    message = edge.evaluate()
    message.ahead = True
    return message


def test_an_edge_that_decides_itself_may_take_any_step(session, edge):
    session.handle(forward(edge, 0, activation=infinite(edge)))
    session.handle(edge.commit(0))
    assert session.next_step == 1


@pytest.mark.parametrize("undone", [0, 1])
def test_after_a_step_that_was_undone_nothing_is_done_until_it_is_begun_anew(
    session, open_session, edge, monkeypatch, undone
):
    quiet = open_session(edge)
    messages = [forward(edge, 0, 0, ahead=False), forward(edge, 0, 1)]
    for step in (1, 2):
        messages += [forward(edge, step, 0, commit=commit(edge, step - 1)), forward(edge, step, 1)]
    for message in messages:
        quiet.handle(message)
    with monkeypatch.context() as patched:
        calls = []

        def full(optimizer):
            calls.append(optimizer)
            if len(calls) == 2 * undone + 2:
                raise torch.cuda.OutOfMemoryError("for a test")

        patched.setattr("sft_cloud.session.session.check_room_for_step", full)
        answers = [session.handle(message) for message in messages]
    assert [answer.HasField("step_skipped") for answer in answers] == [i > 2 * undone for i in range(6)]
    assert session.next_step == undone
    again = [forward(edge, undone, 0, ahead=False), forward(edge, undone, 1), *messages[2 * undone + 2 :]]
    assert not any(session.handle(message).HasField("step_skipped") for message in again)
    assert session.next_step == quiet.next_step == 2
    assert same_bits(weights_of(session), weights_of(quiet))


@pytest.mark.parametrize("number", [-1.0, math.inf, math.nan])
def test_a_norm_that_is_none(session, edge, number):
    session.handle(forward(edge, 0))
    with pytest.raises(ProtocolError, match="max_grad_norm must be finite and not negative"):
        session.handle(forward(edge, 1, commit=commit(edge, 0, number)))
    assert session.next_step == 0
