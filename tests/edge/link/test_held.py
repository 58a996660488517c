"""What a link holds back and lets ride on its next message: weights, commits, gradient scales; and states."""

from __future__ import annotations

import hashlib
import signal
from typing import Callable, Iterator

import pytest
from support.scripted_cloud import OPTIMIZER_STATE, WEIGHTS, ScriptedCloud, serving

from sft.errors import ProtocolError
from sft.v1 import split_training_pb2 as pb
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.link.link import Blob, Link

LABELS = pb.Labels(classes=pb.Labels.Classes(ids=[0, 1]))


def activation() -> pb.Activation:
    packed = pb.Tensor(data_type=pb.DATA_TYPE_FLOAT32, shape=[3, 2], data=bytes(24))
    return pb.Activation(packed=packed, lengths=[1, 2], padded_length=2)


@pytest.fixture
def cloud() -> ScriptedCloud:
    return ScriptedCloud()


@pytest.fixture
def link(cloud: ScriptedCloud) -> Iterator[Link]:
    with serving(cloud) as address, Link(GrpcTransport(address), pb.OpenSessionRequest(), {}) as link:
        link.open()
        yield link


def rides(cloud: ScriptedCloud) -> list:
    """Of every message after the attach: its weights, its commit's step, its scale, its body's kind and step."""
    return [
        (
            [(weight.micro_batch, weight.weight) for weight in message.weights],
            message.commit.step if message.HasField("commit") else None,
            message.gradient_scale if message.HasField("gradient_scale") else None,
            message.WhichOneof("body"),
            message.step,
        )
        for message in cloud.received[1:]
    ]


def test_weights_commit_and_scale_ride_with_the_next_forward(link: Link, cloud: ScriptedCloud) -> None:
    for index in range(2):
        link.forward(0, index, activation(), LABELS, 0.0).result()
        link.weigh(index, 0.5 + index)
    link.commit(0, [0.1], 0.75, [pb.GroupArguments()])
    link.scale_gradients(0.5)
    link.scale_gradients(0.25)
    link.forward(1, 0, activation(), LABELS, 0.0).result()
    assert rides(cloud) == [
        ([], None, None, "forward", 0),
        ([(0, 0.5)], None, None, "forward", 0),
        ([(1, 1.5)], 0, 0.125, "forward", 1),
    ]
    commit = cloud.received[-1].commit
    assert (commit.clip_scale, len(commit.group_arguments), commit.keep_gradients) == (0.75, 1, False)


def test_they_ride_with_a_backward(link: Link, cloud: ScriptedCloud) -> None:
    link.forward(0, 0, activation(), LABELS, 0.0).result()
    link.forward(0, 1, activation(), None, 0.0).result()
    link.weigh(0, 2.0)
    link.backward(0, 1, pb.Tensor()).result()
    assert rides(cloud)[-1] == ([(0, 2.0)], None, None, "backward", 0)


def test_what_is_dropped_is_held_like_a_weight(link: Link, cloud: ScriptedCloud) -> None:
    for index in range(2):
        link.forward(0, index, activation(), LABELS, 0.0).result()
    link.drop(0)
    link.weigh(1, 0.0)
    link.commit(0, [0.1], 1)
    link.drop(0)  # of the next step
    link.flush()
    dropped = [[(one.micro_batch, one.dropped) for one in message.weights] for message in cloud.received[3:]]
    assert dropped == [[(0, True), (1, False)], [(0, True)]]


def test_an_evaluation_says_its_precision(link: Link, cloud: ScriptedCloud) -> None:
    link.evaluate(0, 0, activation()).result()
    link.evaluate(0, 1, activation(), pb.DATA_TYPE_BFLOAT16).result()
    assert [message.evaluate.autocast for message in cloud.received[1:]] == [0, pb.DATA_TYPE_BFLOAT16]


def test_what_would_be_done_in_another_order_is_sent_before(link: Link, cloud: ScriptedCloud) -> None:
    link.forward(0, 0, activation(), LABELS, 0.0).result()
    link.scale_gradients(0.5)
    link.weigh(0, 1.0)  # after the scale
    link.scale_gradients(0.25)
    link.commit(0, [0.1], 1)  # after the scale
    link.weigh(0, 3.0)  # of the next step
    link.commit(1, [0.1], 1)
    link.commit(2, [0.1], 1)
    link.flush()
    assert rides(cloud)[1:] == [
        ([], None, 0.5, None, 0),
        ([(0, 1.0)], None, 0.25, None, 0),
        ([], 0, None, None, 0),
        ([(0, 3.0)], 1, None, None, 1),
        ([], 2, None, None, 2),
    ]


def test_messages_without_a_body_are_told_apart(link: Link, cloud: ScriptedCloud) -> None:
    """A repeated one must not be taken for another: each has a number of its own within its step."""
    link.forward(0, 0, activation(), LABELS, 0.0).result()
    for _ in range(3):
        link.scale_gradients(0.5)
        link.flush()
    link.commit(0, [0.1], 1)
    link.flush()
    link.scale_gradients(0.5)
    link.flush()
    alone = [(m.step, m.micro_batch) for m in cloud.received if m.WhichOneof("body") is None]
    assert alone[:3] == [(0, 0), (0, 1), (0, 2)]
    assert alone[-1][0] == 1
    assert len(set(alone)) == len(alone)


def test_a_commit_can_keep_the_gradients(link: Link, cloud: ScriptedCloud) -> None:
    with pytest.raises(ProtocolError, match="no commit is held"):
        link.keep_gradients()
    link.commit(0, [0.1], 1)
    link.keep_gradients()
    link.flush()
    assert cloud.received[-1].commit.keep_gradients
    with pytest.raises(ProtocolError, match="no commit is held"):
        link.keep_gradients()


def test_an_evaluation_leaves_weights_held(link: Link, cloud: ScriptedCloud) -> None:
    """It does not depend on them."""
    link.forward(0, 0, activation(), LABELS, 0.0).result()
    link.weigh(0, 1.0)
    link.evaluate(0, 0, activation()).result()
    link.commit(0, [0.1], 1)
    link.evaluate(1, 0, activation()).result()
    assert rides(cloud)[1:] == [
        ([], None, None, "evaluate", 0),
        ([(0, 1.0)], 0, None, None, 0),
        ([], None, None, "evaluate", 1),
    ]


@pytest.mark.parametrize("hold", [lambda link: link.weigh(0, 1.0), lambda link: link.scale_gradients(0.5)])
def test_what_is_held_survives_ctrl_c(
    link: Link, cloud: ScriptedCloud, monkeypatch: pytest.MonkeyPatch, hold: Callable[[Link], None]
) -> None:
    link.forward(0, 0, activation(), LABELS, 0.0).result()
    hold(link)
    with monkeypatch.context() as patch:
        patch.setattr(link._stream, "make_room", lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            link.forward(0, 1, activation(), LABELS, 0.0)
    link.forward(0, 1, activation(), LABELS, 0.0).result()
    last = cloud.received[-1]
    assert len(last.weights) + last.HasField("gradient_scale") == 1
    assert link.flush() is None


# States.


def test_the_optimizer_state_is_another_download(link: Link, cloud: ScriptedCloud) -> None:
    assert list(link.weights()) == WEIGHTS
    assert list(link.weights(optimizer_state=True)) == OPTIMIZER_STATE


@pytest.mark.parametrize("optimizer_state", [True, False])
def test_a_state_is_uploaded_and_loaded(link: Link, cloud: ScriptedCloud, optimizer_state: bool) -> None:
    link.forward(0, 0, activation(), LABELS, 1).result()
    link.commit(0, [0.1], 1)
    data = b"what was learned"
    sha256 = hashlib.sha256(data).hexdigest()
    link.load_state(Blob(len(data), lambda: iter([data])), sha256, optimizer_state)
    assert cloud.blobs == {sha256: data}
    assert [(one[1], one[3]) for one in rides(cloud)[-2:]] == [(0, None), (None, "load_state")], "after the commit"
    loaded = cloud.received[-1]
    assert (loaded.step, loaded.load_state.sha256, loaded.load_state.optimizer_state) == (1, sha256, optimizer_state)
    link.load_state(Blob(len(data), lambda: iter([data])), sha256, optimizer_state)
    assert cloud.received[-1].micro_batch != loaded.micro_batch
