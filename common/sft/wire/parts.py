"""Messages of an edge that are too large to cross in one: in parts, one after the other on the same stream.

The cloud knows how large a message is when its first part is there, and keeps no part before there is room for it.
"""

from __future__ import annotations

from typing import Iterator

from sft.v1 import split_training_pb2 as pb
from sft.wire.ledger import framed_size
from sft.wire.protocol import PART_BYTES


def parts_of(data: bytes) -> Iterator[bytes]:
    """What to send for a serialized EdgeMessage: it, or several EdgeMessages with a part of it each."""
    if len(data) <= PART_BYTES:
        yield data
        return
    for start in range(0, len(data), PART_BYTES):
        part = pb.Part(data=data[start : start + PART_BYTES], total_bytes=0 if start else len(data))
        yield pb.EdgeMessage(part=part).SerializeToString()


def sent_size(message_bytes: int) -> int:
    """Bytes on the connection for an edge's message of `message_bytes`, however it crosses."""
    if message_bytes <= PART_BYTES:
        return framed_size(message_bytes)
    sizes = [min(PART_BYTES, message_bytes - start) for start in range(0, message_bytes, PART_BYTES)]
    totals = [message_bytes] + [0] * (len(sizes) - 1)
    return sum(framed_size(_part_size(size, total)) for size, total in zip(sizes, totals))


def _part_size(data_bytes: int, total_bytes: int) -> int:
    """Of an EdgeMessage with such a part, serialized."""
    part = 1 + _varint_size(data_bytes) + data_bytes
    part += 1 + _varint_size(total_bytes) if total_bytes else 0
    return 2 + _varint_size(part) + part


def _varint_size(value: int) -> int:
    return max(1, (value.bit_length() + 6) // 7)
