"""The split step against a scripted cloud, whose gradient is the activation and whose loss is the step's number."""

from __future__ import annotations

from typing import Any, Iterator, List

import pytest
import torch
from support.scripted_cloud import ScriptedCloud, serving
from torch import Tensor

from sft.errors import ProtocolError
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import IN_FULL, decode_tensor, encode_tensor
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.link.link import Link, PendingReply
from sft_edge.systems.crossing import Activation, Crossing

LABELS = pb.Labels(classes=pb.Labels.Classes(ids=[0, 1]))
CPU = torch.device("cpu")
SHAPE = (3, 2)


class Rig:
    """Begins crossings, and keeps the answers in the order in which they were waited for."""

    def __init__(self, link: Link, cloud: ScriptedCloud) -> None:
        self.link, self.cloud = link, cloud
        self.waited: List[int] = []

    def begin(self, micro_batch: int, labels: Any = LABELS, trained: bool = True, scale: float = 0.5) -> Crossing:
        a_TR = torch.full(SHAPE, float(micro_batch)).requires_grad_(trained)
        activation = Activation(a_TR, [1, 2], 2)
        return Crossing(self.link, 7, micro_batch, activation, IN_FULL, labels, loss_scale=scale, wait=self._wait)

    def _wait(self, pending: PendingReply) -> pb.CloudMessage:
        message = pending.result().message
        self.waited.append(message.micro_batch)
        return message

    def forwards(self) -> List[pb.Forward]:
        return [message.forward for message in self.cloud.received if message.HasField("forward")]


@pytest.fixture
def rig() -> Iterator[Rig]:
    cloud = ScriptedCloud()
    with serving(cloud) as address, Link(GrpcTransport(address), pb.OpenSessionRequest(), {}) as link:
        link.open()
        yield Rig(link, cloud)


def filled(value: float) -> Tensor:
    return torch.full(SHAPE, value)


def test_several_are_on_their_way_and_each_is_waited_for_once(rig: Rig) -> None:
    crossings = [rig.begin(index) for index in range(3)]
    assert rig.waited == []
    for index in (2, 0, 1):
        assert crossings[index].loss() == 7.0
        gradient = crossings[index].gradient()
        assert gradient is not None
        assert gradient.equal(filled(index))
    assert rig.waited == [2, 0, 1]
    assert [forward.loss_scale for forward in rig.forwards()] == [0.5] * 3


def test_labels_that_stay_take_two_round_trips_which_may_overlap(rig: Rig) -> None:
    crossings = [rig.begin(index, labels=None) for index in range(2)]
    for index, crossing in enumerate(crossings):
        outputs = crossing.outputs()
        assert outputs is not None
        assert decode_tensor(outputs, CPU).equal(filled(index))
        crossing.go_back(encode_tensor(filled(10.0 + index)))
    assert rig.waited == [0, 1]
    for index, crossing in reversed(list(enumerate(crossings))):
        gradient = crossing.gradient()
        assert gradient is not None
        assert gradient.equal(filled(10.0 + index))
    assert rig.waited == [0, 1, 1, 0]
    assert [forward.loss_scale for forward in rig.forwards()] == [0.0, 0.0], "what it counts is in the gradient"


@pytest.mark.parametrize("labels", [LABELS, None])
def test_a_frozen_edge_wants_no_gradient(rig: Rig, labels: Any) -> None:
    crossing = rig.begin(1, labels, trained=False)
    assert crossing.gradient() is None
    crossing.wait()
    (forward,) = rig.forwards()
    assert forward.frozen_edge


def test_a_gradient_of_another_shape(rig: Rig) -> None:
    def widened(answer: pb.CloudMessage) -> pb.CloudMessage:
        if answer.HasField("result"):
            # None of its bytes: the shape is looked at before memory is taken for them.
            answer.result.packed_gradient.CopyFrom(pb.Tensor(data_type=pb.DATA_TYPE_FLOAT32, shape=[3, 5]))
        return answer

    rig.cloud.change_answer = widened
    with pytest.raises(ProtocolError, match=r"a gradient of shape \[3, 5\]"):
        rig.begin(0).gradient()


def test_a_gradient_in_another_codec(rig: Rig) -> None:
    def shortened(answer: pb.CloudMessage) -> pb.CloudMessage:
        if answer.HasField("result"):
            answer.result.packed_gradient.CopyFrom(encode_tensor(torch.zeros(SHAPE), pb.DATA_TYPE_INT4))
        return answer

    rig.cloud.change_answer = shortened
    with pytest.raises(ProtocolError, match="a gradient in int4; float32 was agreed on"):
        rig.begin(0).gradient()


def test_the_norm_after_a_weight_is_that_of_the_sum(rig: Rig) -> None:
    """|g + w h|^2 of what was there, g, and what this micro-batch brings, h."""
    g, h, weight = torch.tensor([3.0, 4.0]), torch.tensor([-1.0, 2.0]), 0.25

    def with_norms(answer: pb.CloudMessage) -> pb.CloudMessage:
        if answer.HasField("result"):
            answer.result.squared_gradient_norm = float(g @ g)
            answer.result.gradient_product = float(g @ h)
            answer.result.own_squared_norm = float(h @ h)
        return answer

    rig.cloud.change_answer = with_norms
    crossing = rig.begin(0, scale=0.0)
    assert crossing.squared_norm == 25.0
    assert crossing.weighed_squared_norm(weight, is_first=False) == pytest.approx(
        float((g + weight * h).square().sum())
    )
    assert crossing.weighed_squared_norm(weight, is_first=True) == pytest.approx(float((weight * h).square().sum()))
    crossing.weigh(weight)
    rig.link.flush()
    (weighed,) = [message.weights[0] for message in rig.cloud.received if message.weights]
    assert (weighed.micro_batch, weighed.weight) == (0, weight)
