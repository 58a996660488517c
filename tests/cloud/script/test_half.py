"""What the upper half of a script's module takes from the wire, and what it gives."""

from __future__ import annotations

import pytest
import torch
from support.own_models import Gpt, V
from torch import nn

from sft.errors import ProtocolError
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import decode_tensor, encode_tensor
from sft_cloud.script.graph_host import GraphHost
from sft_cloud.session.upper_half import UpperHalf

CPU = torch.device("cpu")
B, S, R = 2, 3, 4


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 5))


@pytest.fixture
def half(model: nn.Module) -> UpperHalf:
    return make_half(GraphHost(model, "1", R, "none"))


def make_half(host: GraphHost, data_type: pb.DataType = pb.DATA_TYPE_FLOAT32) -> UpperHalf:
    cut = pb.Cut(mode=pb.MODE_SFT, layer_name="1", split_rank=R, residual=pb.RESIDUAL_NONE)
    return host.make_half(pb.OpenSessionRequest(cut=cut, wire_data_type=data_type))


def activation(*shape: int) -> pb.Activation:
    return pb.Activation(packed=encode_tensor(torch.randn(shape)))


@pytest.mark.parametrize("shape", [(B, R), (B, S, R), (1, B, S, R)])
def test_activations_of_any_shape(model: nn.Module, half: UpperHalf, shape: tuple[int, ...]) -> None:
    message = activation(*shape)
    half.train(False)
    given = half.decode(message)
    assert given.lengths == []
    assert given.a.equal(decode_tensor(message.packed, CPU))
    outputs = half.outputs(given)
    assert outputs.shape == (*shape[:-1], 5)
    assert outputs.equal(model(given.a)), "the script's model computes the same"
    assert decode_tensor(half.encode_outputs(outputs, given), CPU).equal(outputs)
    gradient = encode_tensor(torch.ones_like(outputs))
    assert half.decode_output_gradient(gradient, outputs, given).equal(torch.ones_like(outputs))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (activation(B, S, R + 1), r"has shape \[2, 3, 5\]; its last dimension must be the rank, 4"),
        (activation(R), r"has shape \[4\]"),
        (activation(0, R), r"has shape \[0, 4\]"),
        (pb.Activation(packed=encode_tensor(torch.ones(B, R)), lengths=[1, 1], padded_length=1), "has no lengths"),
        (pb.Activation(packed=pb.Tensor(data_type=1, shape=[B, R], data=b"1234")), "needs 32 bytes, 4 came"),
    ],
)
def test_activations_that_make_no_sense(half: UpperHalf, message: pb.Activation, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        half.decode(message)


def test_gradients_and_labels_that_make_no_sense(half: UpperHalf) -> None:
    given = half.decode(activation(B, R))
    outputs = half.outputs(given)
    with pytest.raises(ProtocolError, match=r"the gradient has shape \[2, 4\], the output \[2, 5\]"):
        half.decode_output_gradient(encode_tensor(torch.ones(B, R)), outputs, given)
    with pytest.raises(ProtocolError, match="stay on the edge"):
        half.decode_labels(pb.Labels(classes=pb.Labels.Classes(ids=[1, 2])), given)
    with pytest.raises(ProtocolError, match="computed on the edge"):
        half.loss(outputs, {}, given)


def test_variants_of_a_models_arguments() -> None:
    model = Gpt()
    host = GraphHost(model, "body.layers.1.feed.down", R, "none")
    cut = pb.Cut(mode=pb.MODE_SFT, layer_name="body.layers.1.feed.down", split_rank=R, residual=pb.RESIDUAL_NONE)
    half = host.make_half(pb.OpenSessionRequest(cut=cut, wire_data_type=pb.DATA_TYPE_FLOAT32))
    message = activation(B, S, R)
    assert half.outputs(half.decode(message)).shape == (B, 1, V), "without targets, as an older edge calls it"
    small = half.training_bytes(message)
    message.variant = 1
    assert half.training_bytes(message) == 8 * B * S * R, "nothing is known of it yet"
    assert half.outputs(half.decode(message)).shape == (B, S, V)
    assert half.training_bytes(message) > small
    message.variant = 2
    with pytest.raises(ProtocolError, match=r"has no variant 2 of its arguments; run the same script on both sides"):
        half.decode(message)


def test_a_module_in_another_mode(half: UpperHalf) -> None:
    message = activation(B, R)
    message.other_mode.append("2")
    for training in (True, False):
        half.train(training)
        given = half.decode(message)
        assert half.outputs(given).equal(half.outputs(given)) is training
    half.train(True)
    given = half.decode(activation(B, R))
    assert not half.outputs(given).equal(half.outputs(given)), "that was for those alone"
    for name in ("0", "9", ""):
        del message.other_mode[:]
        message.other_mode.append(name)
        with pytest.raises(ProtocolError, match=f"has no module '{name}' above the cut; run the same script"):
            half.decode(message)


def test_dropout_follows_the_mode(half: UpperHalf) -> None:
    given = half.decode(activation(B, R))
    half.train(True)
    assert not half.outputs(given).equal(half.outputs(given))
    half.train(False)
    assert half.outputs(given).equal(half.outputs(given))


def test_gradients_travel_in_the_type_of_the_wire(model: nn.Module) -> None:
    half = make_half(GraphHost(model, "1", R, "none"), pb.DATA_TYPE_BFLOAT16)
    given = half.decode(activation(B, R))
    assert half.encode_gradient(torch.ones(B, R), given).data_type == pb.DATA_TYPE_BFLOAT16
    assert half.encode_outputs(half.outputs(given), given).data_type == pb.DATA_TYPE_FLOAT32


def test_what_a_batch_takes_is_known_once_one_has_run(half: UpperHalf) -> None:
    small, large = activation(B, R), activation(100 * B, R)
    assert half.training_bytes(large) == 200 * R * 8, "itself and its gradient"
    given = half.decode(small)
    with torch.no_grad():
        half.outputs(given)
    assert half.training_bytes(large) == 200 * R * 8, "nothing is kept of an evaluation"
    half.train(True)
    half.outputs(given)
    kept = 4 * B * (8 + 8 + 8 + 5)  # FFN-3's, the dropout's and its mask's, the last layer's
    assert kept <= half.training_bytes(small) <= 3.5 * kept
    assert half.training_bytes(large) == 100 * half.training_bytes(small)


def test_copies_of_weights_do_not_grow_with_the_batch() -> None:
    half = make_half(GraphHost(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 512), nn.Linear(512, 5)), "1", R, "none"))
    half.train(True)
    with torch.autocast("cpu", torch.bfloat16):
        half.outputs(half.decode(activation(1, R)))
    assert half.training_bytes(activation(1, R)) < half.cast_bytes() / 2


def test_an_output_that_is_too_large(monkeypatch: pytest.MonkeyPatch, half: UpperHalf) -> None:
    monkeypatch.setattr("sft_cloud.script.graph_host.MAX_MESSAGE_BYTES", 4 * B * 5 - 1)
    with pytest.raises(ProtocolError, match=r"the output of shape \[2, 5\] is too large"):
        half.outputs(half.decode(activation(B, R)))


def test_frozen_parameters_and_names(model: nn.Module) -> None:
    model[1].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    host = GraphHost(model, "1", R, "none")
    trained = {name for name, parameter in host.parameters.items() if parameter.requires_grad}
    assert trained == {"1.ffn3.bias", "3.weight"}
    assert {tensor.name for tensor in make_half(host).stored_parameters()} == host.parameters.keys()
