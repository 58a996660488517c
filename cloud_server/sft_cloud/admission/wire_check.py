"""How much memory a message would take once it is parsed, found before it is parsed.

A few bytes of protobuf can stand for much more: an empty message in a list takes two bytes on the wire and some fifty
in memory, a number in a packed list one byte and eight. Tensors and file contents, in fields of type `bytes`, take what
they take on the wire. So those are let through, and what may grow is bounded.
"""

from __future__ import annotations

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from sft.errors import ProtocolError

MAX_FIELDS = 1 << 17
"""In one message with all that it holds. The most have requests to open a session: a name for each parameter."""

MAX_PACKED_BYTES = 8 << 20
"""Of numbers in lists, in one message: labels of a quarter of a million tokens take a tenth of it."""

UNCHECKED_BYTES = 1 << 16
"""Messages up to this size are not looked at: the worst of them takes a few megabytes."""

_MAX_DEPTH = 20
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_TRUNCATED = "the message is cut short, or is no message at all"


def check_wire(data: bytes, descriptor: Descriptor) -> None:
    """Raises ProtocolError for a message of this type that would take much more memory than its bytes."""
    if len(data) > UNCHECKED_BYTES:
        _Scan(data).message(0, len(data), descriptor, 0)


class _Scan:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._fields = 0
        self._packed = 0

    def message(self, at: int, end: int, descriptor: Descriptor | None, depth: int) -> None:
        fields = descriptor.fields_by_number if descriptor is not None else {}
        while at < end:
            self._count_field()
            tag, at = self._varint(at, end)
            wire_type = tag & 7
            if wire_type == _VARINT:
                _, at = self._varint(at, end)
            elif wire_type in (_FIXED64, _FIXED32):
                at += 8 if wire_type == _FIXED64 else 4
            elif wire_type == _LENGTH:
                size, at = self._varint(at, end)
                if size > end - at:
                    raise ProtocolError(_TRUNCATED)
                self._inside(fields.get(tag >> 3), at, at + size, depth)
                at += size
            else:  # groups, which no message of ours has
                raise ProtocolError("the message holds a group, which none of ours does")
        if at > end:
            raise ProtocolError(_TRUNCATED)

    def _inside(self, field: FieldDescriptor | None, at: int, end: int, depth: int) -> None:
        if field is None or field.type in (FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_STRING):
            return  # what is unknown is kept as it came
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            if depth >= _MAX_DEPTH:
                raise ProtocolError(f"the message is nested more than {_MAX_DEPTH} deep")
            self.message(at, end, field.message_type, depth + 1)
            return
        self._packed += end - at
        if self._packed > MAX_PACKED_BYTES:
            raise ProtocolError(f"the message holds lists of numbers of more than {MAX_PACKED_BYTES} bytes")

    def _count_field(self) -> None:
        self._fields += 1
        if self._fields > MAX_FIELDS:
            raise ProtocolError(f"the message has more than {MAX_FIELDS} fields")

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 70:
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
        raise ProtocolError(_TRUNCATED)
