"""A schedule-free optimizer on the cloud: what a message may ask of it."""

import pytest
import torch

from sft.errors import ProtocolError
from sft.optim.spec import groups_to_proto
from sft.v1 import split_training_pb2 as pb
from sft_cloud.engine.build import build, make_session
from sft_cloud.engine.request import check_request
from sft_cloud.errors import PreconditionError
from sft_cloud.session.load_state import Blob, StateLoader
from sft_cloud.session.session import State

CPU = torch.device("cpu")


def open_session(edge, name):
    optimizer = edge.request().optimizer
    optimizer.name = name
    for group in optimizer.groups:
        for argument in set(group.arguments) - {"lr"}:
            del group.arguments[argument]
    spec = check_request(edge.request(optimizer=optimizer))
    return make_session(spec, build(spec, CPU), [*edge.weights, *edge.factors], CPU)


@pytest.fixture
def session(edge):
    pytest.importorskip("schedulefree")
    return open_session(edge, "schedulefree.AdamWScheduleFree")


def switch(session, averaged, micro_batch=0):
    message = pb.EdgeMessage(step=session.next_step, micro_batch=micro_batch, averaged=averaged)
    return session.handle(message)


def train(session, edge, step):
    session.handle(edge.forward(step, activation=edge.activation(step)))
    session.handle(edge.commit(step))


def test_weights_go_to_the_average_and_back(session, edge):
    switch(session, averaged=False)
    for step in range(2):
        train(session, edge, step)
    points, versions = [], []
    for averaged in (False, True, True, False):
        assert switch(session, averaged).HasField("committed")
        points.append(session.stored_parameters()[0].read().clone())
        versions.append(session.version)
    assert points[2].equal(points[1])
    assert not points[1].allclose(points[0], atol=1e-9)
    torch.testing.assert_close(points[3], points[0])
    assert len(set(versions)) == 4  # a download that began before does not go on
    assert session.state is State.READY


def test_no_step_at_the_average(session, edge):
    session.handle(edge.forward(0))
    with pytest.raises(PreconditionError, match="in eval mode, and takes no step"):
        session.handle(edge.commit(0))
    assert session.state is State.ACCUMULATING


@pytest.mark.parametrize("counts", [{"train_mode": False}, {"k": 7}, {"lr_max": 1.0}, {"weight_sum": 0.0}], ids=str)
def test_a_commit_changes_no_counts(session, edge, counts):
    switch(session, averaged=False)
    session.handle(edge.forward(0))
    message = edge.commit(0)
    message.commit.group_arguments.extend(groups_to_proto([counts for _ in session.optimizer.param_groups]))
    with pytest.raises(ProtocolError, match=r"the optimizer counts .* itself"):
        session.handle(message)
    assert session.state is State.ACCUMULATING


@pytest.mark.parametrize("body", ["evaluate", "load_state"])
def test_no_switch_with_what_is_beside_the_steps(session, edge, body):
    message = pb.EdgeMessage(averaged=False)
    getattr(message, body).SetInParent()
    with pytest.raises(ProtocolError, match="averaged rides on a forward"):
        session.handle(message)
    assert session.state is State.READY


def test_not_for_an_optimizer_without_an_average(edge):
    session = open_session(edge, "SGD")
    with pytest.raises(ProtocolError, match="SGD has no average"):
        switch(session, averaged=True)
    assert session.state is State.READY


def test_not_while_a_micro_batch_waits(session, edge):
    switch(session, averaged=False)
    waits = edge.forward(0)
    waits.forward.ClearField("labels")
    session.handle(waits)
    with pytest.raises(PreconditionError, match="wait"):
        switch(session, averaged=True)


@pytest.mark.parametrize(
    "change",
    [{"k": "x"}, {"weight_sum": float("nan")}, {"train_mode": 1}, {"lr": 1.0}, {"eps": 1.0}, {"params": 1}, None],
    ids=str,
)
def test_counts_that_make_no_sense(session, edge, change):
    counts = {"k": 1, "lr_max": 0.1, "train_mode": True, "weight_sum": 0.1}
    groups = [{**counts, **change} if change else {} for _ in session.optimizer.param_groups]
    blob = Blob("0", {tensor.name: tensor.read() for tensor in session.stored_optimizer_state()})
    loader = StateLoader(session.half, session.optimizer, lambda sha256: None)
    message = pb.LoadState(optimizer_state=True, group_arguments=groups_to_proto(groups))
    with pytest.raises(ProtocolError):
        loader.check(message, blob)
    message = pb.LoadState(optimizer_state=True, group_arguments=groups_to_proto([counts for _ in groups]))
    loader.check(message, blob)
