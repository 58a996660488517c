"""Weights, scales, Backwards and states that make no sense, or come at the wrong time: refused, changing nothing."""

import math

import pytest
import torch
from support.session_parts import DROPPED, gradients_of, rides_on, same_bits, weigh, weights_of

from sft.errors import ProtocolError
from sft.v1 import split_training_pb2 as pb
from sft_cloud.errors import PreconditionError
from sft_cloud.session import micro_batches
from sft_cloud.session import upper_half as half
from sft_cloud.session.session import State


@pytest.fixture
def session(open_session, edge):
    return open_session(edge)


def of_variant(evaluation):
    evaluation.evaluate.activation.variant = 2
    return evaluation


def in_another_mode(evaluation):
    evaluation.evaluate.activation.other_mode.append("head")
    return evaluation


REFUSED = {
    "modes of modules": (lambda e: in_another_mode(e.evaluate()), "modes of single modules are for the activation of"),
    "a variant": (lambda e: of_variant(e.evaluate()), "variant 2 is for the activation of a script's module"),
    "weight of a micro-batch that never came": (lambda e: weigh(0, (9, 1.0)), "nothing of micro-batch 9 waits"),
    "weight of gradients that were added": (lambda e: weigh(0, (0, 1.0)), "nothing of micro-batch 0 waits"),
    "weight for a graph": (lambda e: weigh(0, (1, 1.0)), "came without labels"),
    "weight not a number": (lambda e: weigh(0, (2, math.nan)), "must be finite"),
    "weight infinite": (lambda e: weigh(0, (2, math.inf)), "must be finite"),
    "dropped, with a weight": (
        lambda e: pb.EdgeMessage(weights=[pb.Weight(micro_batch=2, weight=0.5, dropped=True)]),
        "cannot have weight 0.5",
    ),
    "dropped and weighed": (lambda e: weigh(0, (2, DROPPED), (2, 0.0)), "another weight before, or dropped"),
    "weight 0 for a graph": (lambda e: weigh(0, (1, 0.0)), "came without labels"),
    "two weights": (lambda e: weigh(0, (2, 1.0), (2, 2.0)), "another weight"),
    "a good weight beside a bad one": (lambda e: weigh(0, (2, 1.0), (9, 1.0)), "nothing of micro-batch 9"),
    "weights of another step": (lambda e: weigh(1, (2, 1.0)), "weights of step 1"),
    "scale not a number": (lambda e: weigh(0, gradient_scale=math.nan), "gradient_scale must be finite"),
    "scale infinite": (lambda e: weigh(0, gradient_scale=-math.inf), "gradient_scale must be finite"),
    "scale of another step": (lambda e: weigh(1, gradient_scale=0.5), "step 1 came"),
    "scale with an evaluation": (
        lambda e: pb.EdgeMessage(evaluate=e.evaluate().evaluate, gradient_scale=0.5),
        "rides on a forward",
    ),
    "an evaluation with classes": (
        lambda e: pb.EdgeMessage(evaluate=pb.Evaluate(activation=e.evaluate().evaluate.activation, labels=e.labels())),
        "labels where they are of tokens",
    ),
    "an evaluation that scores classes": (
        lambda e: pb.EdgeMessage(evaluate=pb.Evaluate(activation=e.evaluate().evaluate.activation, scored=e.labels())),
        "labels where they are of tokens",
    ),
    "an evaluation that scores nothing": (
        lambda e: pb.EdgeMessage(evaluate=pb.Evaluate(activation=e.evaluate().evaluate.activation, scored=pb.Labels())),
        "scored labels without any",
    ),
    "an evaluation that learns and scores": (
        lambda e: pb.EdgeMessage(
            evaluate=pb.Evaluate(activation=e.evaluate().evaluate.activation, scored=e.labels(), labels=e.labels())
        ),
        "has labels or scored ones, not both",
    ),
    "backward of nothing": (lambda e: e.backward(0, 9, torch.ones(3, 3)), "does not wait for a Backward"),
    "backward of a labelled one": (lambda e: e.backward(0, 0, torch.ones(3, 3)), "does not wait for a Backward"),
    "backward of one kept aside": (lambda e: e.backward(0, 2, torch.ones(3, 3)), "does not wait for a Backward"),
    "backward of another step": (lambda e: e.backward(1, 1, torch.ones(3, 3)), "step 1 came"),
    "backward of what is let go": (
        lambda e: rides_on(e.backward(0, 1, torch.ones(3, 3)), (1, DROPPED)),
        "does not wait for a Backward",
    ),
    "backward of another shape": (lambda e: e.backward(0, 1, torch.ones(3, 2)), r"shape \[3, 2\]"),
    "backward without a gradient": (lambda e: pb.EdgeMessage(micro_batch=1, backward=pb.Backward()), r"shape \[\]"),
    "a backward with a commit": (
        lambda e: pb.EdgeMessage(step=1, micro_batch=1, commit=e.commit_part(0), backward=pb.Backward()),
        "drops the micro-batch",
    ),
    "no labels, and a gap": (lambda e: e.unlabelled(0, 4), "micro-batch 3 is next"),
    "autocast of full precision": (lambda e: e.unlabelled(0, 3, autocast=pb.DATA_TYPE_FLOAT32), "autocast"),
    "autocast of an unknown type": (lambda e: e.forward(0, 3, autocast=9), "autocast"),
    "a state while two wait": (
        lambda e: pb.EdgeMessage(load_state=pb.LoadState(sha256="0" * 64)),
        "2 results of the model are waiting",
    ),
    "a state while one waits": (
        lambda e: weigh(0, (2, 1.0), load_state=pb.LoadState(sha256="0" * 64)),
        "1 results of the model are waiting",
    ),
    "nothing at all": (lambda e: pb.EdgeMessage(micro_batch=7), "neither a commit nor anything else"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_changes_nothing(session, edge, name):
    make, says = REFUSED[name]
    session.handle(edge.forward(0, 0))
    session.handle(edge.unlabelled(0, 1))
    session.handle(edge.forward(0, 2, loss_scale=0.0))
    gradients, weights = gradients_of(session), weights_of(session)
    with pytest.raises(ProtocolError, match=says):
        session.handle(make(edge))
    assert (session.next_step, session.state) == (0, State.ACCUMULATING)
    assert same_bits(gradients, gradients_of(session))
    assert same_bits(weights, weights_of(session))
    session.handle(weigh(0, (2, 1.0)))
    session.handle(edge.backward(0, 1, torch.ones(3, 3)))
    assert session.handle(edge.forward(0, 3)).HasField("result")


@pytest.mark.parametrize("fields", [{"loss_scale": 0.0}, {"labels": None}], ids=str)
def test_only_so_many_may_wait(session, edge, monkeypatch, fields):
    monkeypatch.setattr(micro_batches, "MAX_WAITING", 2)
    for m in range(2):
        session.handle(edge.forward(0, m, **fields))
    with pytest.raises(
        PreconditionError, match=r"2 results of the model are waiting for a backward\(\); use torch.no_grad\(\)"
    ):
        session.handle(edge.forward(0, 2, **fields))
    session.handle(edge.forward(0, 2))  # this one does not wait
    session.handle(rides_on(edge.forward(0, 3, **fields), (0, DROPPED)))
    session.handle(edge.forward(1, 0, commit=edge.commit_part(0), **fields))


@pytest.mark.parametrize("kind", ["unlabelled", "wanted", "evaluate"])
def test_outputs_that_no_message_could_hold_are_not_computed(session, edge, monkeypatch, kind):
    monkeypatch.setattr(half, "MAX_MESSAGE_BYTES", 35)  # three rows of three floats are 36
    monkeypatch.setattr(session._half, "outputs", None)
    makes = {"unlabelled": edge.unlabelled(0), "wanted": edge.forward(0, want_logits=True), "evaluate": edge.evaluate()}
    with pytest.raises(ProtocolError, match="take 36 bytes, a message at most 35"):
        session.handle(makes[kind])
    assert session.state is State.READY
