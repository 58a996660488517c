"""Heads and cuts there and back, and numbers that an older or a hostile side may send."""

from typing import Dict

import pytest

from sft.errors import ProtocolError
from sft.models import HEADS, Cut
from sft.v1 import split_training_pb2 as pb
from sft.wire.cut import (
    cut_from_proto,
    cut_to_proto,
    head_from_proto,
    head_to_proto,
    layer_cut_to_proto,
    mode_name,
    residual_name,
)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_crosses(head: str) -> None:
    assert head_from_proto(head_to_proto(head)) == head


def test_heads_differ_on_the_wire() -> None:
    assert len({head_to_proto(head) for head in HEADS}) == len(HEADS)


@pytest.mark.parametrize("cut", [Cut("sft", 2, 8), Cut("sft", 11, 16, "low-rank"), Cut("sl", 3)])
def test_every_cut_crosses(cut: Cut) -> None:
    message = pb.Cut.FromString(cut_to_proto(cut).SerializeToString())
    assert cut_from_proto(message) == cut
    assert (mode_name(message.mode), residual_name(message.residual)) == (cut.mode, cut.residual)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"mode": 0, "residual": 1}, "unknown mode 0 of the cut"),
        ({"mode": 99, "residual": 1}, "unknown mode 99 of the cut"),
        ({"mode": 1, "residual": 0}, "unknown residual 0 of the cut"),
        ({"mode": 1, "residual": -1}, "unknown residual -1 of the cut"),
    ],
)
def test_cuts_that_there_are_not(fields: Dict[str, int], match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        cut_from_proto(pb.Cut(split_layer=1, **fields))


@pytest.mark.parametrize("head", [0, 99, -1])
def test_heads_that_there_are_not(head: int) -> None:
    with pytest.raises(ProtocolError, match=f"unknown head {head}"):
        head_from_proto(pb.OpenSessionRequest(head=head).head)


def test_a_named_layer() -> None:
    message = layer_cut_to_proto("blocks.5.mlp.fc2", 4)
    assert (message.layer_name, message.split_rank, mode_name(message.mode)) == ("blocks.5.mlp.fc2", 4, "sft")


def test_numbers_without_a_name_are_told_as_they_are() -> None:
    assert (mode_name(99), residual_name(0)) == ("99", "0")
