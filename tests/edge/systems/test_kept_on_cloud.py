"""Which rows of a batch cross, under which numbers, where the cloud keeps them; and what a checkpoint has of it."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Dict, List, Optional, Tuple

import pytest
import torch
from torch import Tensor, nn

from sft.batch import Batch
from sft.errors import CheckpointError
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import IN_FULL, encode_tensor
from sft.wire.protocol import MAX_KEPT_SEQUENCES
from sft_edge.systems.kept_on_cloud import KeptOnCloud, key_of

WIDTH, FLOAT32, KEY = 2, pb.DATA_TYPE_FLOAT32, bytes(range(32))


class Net(nn.Module):
    """Its activation tells the token, and how many rows and columns the batch had that it was computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: List[Tuple[int, int]] = []

    def forward(self, inputs: Dict[str, Tensor], lengths: List[int]) -> Tensor:
        ids_BS = inputs["input_ids"]
        self.shapes.append((ids_BS.shape[0], ids_BS.shape[1]))
        return torch.stack([ids_BS.float(), torch.full(ids_BS.shape, 100.0 * len(lengths))], dim=-1)


class Rig:
    def __init__(self, kept: int = 0) -> None:
        self.net: Any = Net()
        self.limit: Optional[int] = None
        self.told: List[str] = []
        self.kept = KeptOnCloud(KEY, kept, WIDTH, IN_FULL, lambda: self.limit, self.told.append)

    def send(self, *sequences: Tuple[int, ...]) -> pb.Activation:
        return self.kept.activation(self.net, batch(*sequences)).encoded(IN_FULL)


def batch(*sequences: Tuple[int, ...]) -> Batch:
    longest = max(map(len, sequences))
    ids = [[*ids, *[0] * (longest - len(ids))] for ids in sequences]
    return Batch({"input_ids": torch.tensor(ids)}, [len(ids) for ids in sequences], {})


def rows(of: int, *sequences: Tuple[int, ...]) -> pb.Tensor:
    """Of sequences that were computed in a batch `of` so many."""
    return encode_tensor(
        torch.tensor([[float(token), 100.0 * of] for ids in sequences for token in ids]).reshape(-1, 2)
    )


A, B, C, D = (1, 2, 3), (4,), (5, 6), (7, 8, 9, 9)


def test_each_sequence_crosses_once() -> None:
    rig = Rig()
    first = rig.send(A, B)
    assert first == pb.Activation(packed=rows(2, A, B), lengths=[3, 1], padded_length=3, keep=[1, 2])
    again = rig.send(B, A)
    assert again == pb.Activation(
        packed=pb.Tensor(data_type=FLOAT32, shape=[0, 2]), lengths=[1, 3], padded_length=3, kept=[2, 1]
    )
    assert rig.net.shapes == [(2, 3)]
    assert not rig.net.training


def test_what_is_new_in_a_batch_is_computed_together_and_padded_as_it_is() -> None:
    rig = Rig()
    rig.send(A, B)
    mixed = rig.send(C, A, D, B)
    assert mixed == pb.Activation(
        packed=rows(2, C, D), lengths=[2, 3, 4, 1], padded_length=4, keep=[3, 0, 4, 0], kept=[0, 1, 0, 2]
    )
    assert rig.net.shapes == [(2, 3), (2, 4)]


def test_a_sequence_that_is_twice_in_a_batch_is_computed_and_kept_once() -> None:
    rig = Rig()
    twice = rig.send(A, B, A, A)
    assert twice == pb.Activation(packed=rows(2, A, B, A, A), lengths=[3, 1, 3, 3], padded_length=3, keep=[1, 2, 0, 0])
    assert list(rig.send(A, C, A, C).kept) == [1, 0, 1, 0]


def test_sequences_of_evaluation_are_others() -> None:
    """Computed in a batch of training, one would have other bits for having been evaluated before or not."""
    rig = Rig()
    first = rig.kept.activation(rig.net, batch(A, B), is_evaluation=True).encoded(IN_FULL)
    assert list(first.keep) == [1, 2]
    assert rig.send(B, C) == pb.Activation(packed=rows(2, B, C), lengths=[1, 2], padded_length=2, keep=[3, 4])
    again = rig.kept.activation(rig.net, batch(B, C, A), is_evaluation=True).encoded(IN_FULL)
    assert (list(again.kept), list(again.keep)) == ([2, 0, 1], [0, 5, 0])


def test_more_sequences_than_the_cloud_looks_up_are_sent_without() -> None:
    rig = Rig()
    rig.send(B)
    many = [B, C] * (MAX_KEPT_SEQUENCES // 2)
    assert any(rig.send(*many).kept)
    for _ in range(2):
        sent = rig.send(A, *many)
        assert not any([*sent.keep, *sent.kept])
        assert sent.packed.shape[0] == 3 + 3 * len(many) // 2
    assert list(rig.send(A, B, C).keep) == [3, 0, 0]


def test_when_the_cloud_keeps_no_more() -> None:
    """It is heard with the next batch, whatever was sent meanwhile, and said once."""
    rig = Rig()
    rig.send(A, B)
    rig.send(C)
    rig.limit = 2
    late = rig.send(A, C, D)
    assert late == pb.Activation(packed=rows(2, C, D), lengths=[3, 2, 4], padded_length=4, kept=[1, 0, 0])
    assert rig.send(D) == pb.Activation(packed=rows(1, D), lengths=[4], padded_length=4)
    assert rig.told == [
        "the cloud has no room for more activations than those of 2 sequences: others are sent again in every epoch"
    ]


def test_when_the_cloud_loses_what_it_kept() -> None:
    """Also of a run that went on with less than all."""
    rig = Rig()
    rig.send(A, B)
    rig.limit = 2
    rig.send(C)
    rig.limit = 1
    assert list(rig.send(A, B, C).kept) == [1, 0, 0]
    assert [line.partition(" of ")[2].split()[0] for line in rig.told] == ["2", "1"]


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_run_that_goes_on_knows_the_numbers(kept: int) -> None:
    rig = Rig()
    rig.send(A, B)
    rig.send(C)
    state = rig.kept.saved_state()
    assert key_of(state) == KEY
    on = Rig(kept)
    on.kept.load_state(state)
    sent = on.send(A, B, C, D)
    assert list(sent.kept or [0] * 4) == [number if number <= kept else 0 for number in (1, 2, 3, 4)]
    assert list(sent.keep) == [0] * kept + list(range(kept + 1, 5))


def test_a_run_that_goes_on_without_room() -> None:
    """It does not ask again: the bits would be others."""
    rig = Rig()
    rig.send(A, B)
    rig.limit = 1
    state = rig.kept.saved_state()
    on = Rig(1)
    on.kept.load_state(state)
    assert on.send(A, B) == pb.Activation(packed=rows(1, B), lengths=[3, 1], padded_length=3, kept=[1, 0])
    assert on.told == []
    nothing = Rig()
    nothing.kept.load_state(Rig().kept.saved_state())
    assert list(nothing.send(A).keep) == [1]


def test_a_cloud_that_holds_more_than_it_was_sent() -> None:
    rig = Rig()
    rig.send(A)
    with pytest.raises(CheckpointError, match="the cloud holds 2 sequences of this run, where 1 were sent"):
        Rig(2).kept.load_state(rig.kept.saved_state())


def test_the_rows_are_those_of_the_sequences() -> None:
    """Cut apart where they should be, for many lengths."""
    rig = Rig()
    sequences = [tuple(range(10 * size, 11 * size)) for size in range(1, 9)]
    data = rig.send(*sequences).packed.data
    ends = list(accumulate(8 * len(ids) for ids in sequences))
    other = Rig()
    for index, (begin, end) in enumerate(zip([0, *ends], ends)):
        expected = rows(1, sequences[index]).data
        assert other.send(sequences[index]).packed.data == expected
        assert len(expected) == end - begin
        assert data[begin : begin + 4] == expected[:4]
