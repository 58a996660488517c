"""Messages that are too large to cross in one."""

import pytest

from sft.v1 import split_training_pb2 as pb
from sft.wire.ledger import framed_size
from sft.wire.parts import parts_of, sent_size
from sft.wire.protocol import PART_BYTES


@pytest.mark.parametrize("size", [0, 1, PART_BYTES])
def test_an_ordinary_message_crosses_as_it_is(size):
    data = bytes(size)
    assert list(parts_of(data)) == [data]
    assert sent_size(size) == framed_size(size)


@pytest.mark.parametrize("more", [1, 100, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES])
def test_a_larger_one_crosses_in_parts_which_are_counted_as_they_are(more):
    data = bytes(range(256)) * (PART_BYTES // 256) + bytes(more)
    sent = list(parts_of(data))
    parts = [pb.EdgeMessage.FromString(one).part for one in sent]
    assert b"".join(part.data for part in parts) == data
    assert [part.total_bytes for part in parts] == [len(data)] + [0] * (len(parts) - 1)
    assert max(len(part.data) for part in parts) == PART_BYTES
    assert sent_size(len(data)) == sum(framed_size(len(one)) for one in sent)
