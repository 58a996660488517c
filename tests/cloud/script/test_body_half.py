"""What a script's cloud makes of messages about a module around a transformers model."""

from __future__ import annotations

import pytest
import torch
from support.bodies import LENGTHS, C, Mean, S, Tagger, batches, made
from torch import Tensor

from sft.errors import CutError, ProtocolError, UsageError
from sft.models import Cut
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import encode_tensor
from sft.wire.cut import body_cut_to_proto
from sft_cloud.script.body_host import BodyHalf, BodyHost

R = 4
CUT = Cut("sft", 2, R)


def half_of(host: BodyHost) -> BodyHalf:
    request = pb.OpenSessionRequest(cut=body_cut_to_proto(host.layer_name, CUT), wire_data_type=pb.DATA_TYPE_FLOAT32)
    half = host.make_half(request)
    assert isinstance(half, BodyHalf)
    return half


@pytest.fixture
def half() -> BodyHalf:
    half = half_of(BodyHost(made(Mean), CUT, None))
    half.train(False)
    return half


def activation(
    lengths: tuple[int, ...] = LENGTHS, width: int = R, padded_length: int = S, variant: int = 0
) -> pb.Activation:
    packed = encode_tensor(torch.rand(sum(lengths), width, generator=torch.Generator().manual_seed(0)))
    return pb.Activation(packed=packed, lengths=lengths, padded_length=padded_length, variant=variant)


def test_outputs_and_gradients(half: BodyHalf) -> None:
    given = half.decode(activation())
    given.a.requires_grad_(True)
    outputs = half.outputs(given)
    assert outputs.shape == (len(LENGTHS), C)
    outputs.sum().backward()
    assert given.a.grad is not None
    assert list(half.encode_gradient(given.a.grad, given).shape) == [sum(LENGTHS), R]
    assert half.training_bytes(activation()) > 8 * R * sum(LENGTHS), "known once one has run"


def test_the_head_follows_the_mode_and_so_do_the_blocks(half: BodyHalf) -> None:
    blocks, norm = half._net_2, half._cut.model.norm
    for mode in (True, False):
        half.train(mode)
        assert (blocks.training, norm.training) == (mode, mode)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (activation(width=3), r"shape \[21, 3\], the lengths say \[21, 4\]"),
        (activation(padded_length=6), "lengths must be from 1 to the padded length 6"),
        (activation(padded_length=200), "padded length 200 is more than the model's 128 positions"),
        (activation(variant=7), "has no variant 7 of its arguments; run the same script on both sides"),
        (pb.Activation(lengths=[1] * 70_000, padded_length=128), "padded tokens is too large"),
        (pb.Activation(), "lengths must be from 1"),
    ],
)
def test_activations_that_are_none(half: BodyHalf, message: pb.Activation, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        half.decode(message)


def test_labels_stay(half: BodyHalf) -> None:
    with pytest.raises(ProtocolError, match="stay on the edge; leave them out"):
        half.decode(activation(), pb.Labels(classes=pb.Labels.Classes(ids=[1])))


def test_whether_padding_is_read_is_looked_at_once_and_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    host = BodyHost(made(Mean), CUT, None)
    host._around.model.drop.p = 0.5
    half = half_of(host)
    half.train(True)
    before = torch.get_rng_state()
    statistics = host._around.model.norm.running_mean.clone()
    outputs: list[Tensor] = []
    for _ in range(2):
        torch.set_rng_state(before)
        host._around.model.norm.running_mean.copy_(statistics)
        outputs.append(half.outputs(half.decode(activation())).detach())
    assert outputs[0].equal(outputs[1]), "the first has looked, the second not"
    assert half._looked_at == {0: min(LENGTHS)}


def test_a_row_for_each_token(half: BodyHalf) -> None:
    half = half_of(BodyHost(made(Tagger), CUT, None))
    given = half.decode(activation())
    outputs = half.outputs(given)
    assert outputs.shape == (len(LENGTHS), S, C)
    outputs[1, 2].sum().backward(retain_graph=True)
    with pytest.raises(ProtocolError, match="depends on those of padding"):
        outputs[1, 3].sum().backward()  # the fourth of three tokens
    with pytest.raises(ProtocolError, match=r"the model's forward raised RuntimeError: .*cannot be multiplied"):
        half.outputs(given._replace(a=torch.rand(4, S, R + 1)))


def test_what_is_no_such_model() -> None:
    with pytest.raises(CutError, match="split_layer is for transformers models"):
        BodyHost(torch.nn.Linear(2, 2), CUT, None)
    model = made(Mean)
    with pytest.raises(CutError, match="blocks 1 to 3"):
        BodyHost(model, Cut("sft", 4, R), None)
    assert model(*next(iter(batches(1)))[:2]).shape == (len(LENGTHS), C), "it is as it was"
    BodyHost(model, CUT, None)
    with pytest.raises(UsageError, match="is cut already"):
        BodyHost(model, CUT, None)
