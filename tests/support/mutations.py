"""Messages that are almost sound: what a fuzzer sends. Of one seed they are always the same."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any, Callable, List, Sequence

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_INTEGERS = (
    0,
    1,
    -1,
    2,
    7,
    63,
    64,
    65,
    127,
    128,
    1000,
    65_536,
    2**31 - 1,
    -(2**31),
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
)
_NUMBERS = (0.0, -0.0, 1.0, -1.0, 1e-300, 1e300, 5e-324, float("inf"), float("-inf"), float("nan"))
_TEXTS = (
    "",
    "x",
    "../../../etc/passwd",
    "/etc/passwd",
    "..",
    "a/../../b",
    "%s%n{0}{{}}",
    "\x00",
    "\n\r\x1b[2J",
    "\u202e\u2028",
    "NaN",
    "null",
    "{}",
    "[" * 500,
    '{"a":' * 500,
    "9" * 5000,
    "é" * 1000,
    "f" * 64,
    "f" * 64 + "\n",
)
_BYTES = (b"", b"\x00", b"\xff" * 7, b"\x00" * 64, b"\x80\x04\x95", b"\x00\x00\xc0\x7f" * 60)


class Mutator:
    """Changes messages at random, by their structure or as bytes."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def mutated(self, message: Message, others: Sequence[Message] = ()) -> bytes:
        """Another message of the type, or bytes that are hardly one. Parts may be taken from `others` of the type."""
        if self.draw.random() < 0.3 or not message.DESCRIPTOR.fields:
            return self.mutated_bytes(message.SerializeToString())
        copy = type(message)()
        copy.CopyFrom(message)
        for _ in range(self.draw.choice((1, 1, 1, 2, 2, 3, 5))):
            self._change(copy, others)
        data = copy.SerializeToString()
        return self.mutated_bytes(data) if self.draw.random() < 0.1 else data

    def mutated_bytes(self, data: bytes) -> bytes:
        """Flips, cuts, repeats and inserts."""
        changed = bytearray(data)
        for _ in range(self.draw.choice((1, 1, 2, 4, 16))):
            at = self.draw.randrange(len(changed) + 1)
            size = self.draw.choice((1, 1, 1, 2, 4, 8, 32))
            way = self.draw.randrange(6)
            if way == 0:
                changed[at : at + size] = bytes(self.draw.randrange(256) for _ in range(size))
            elif way == 1:
                del changed[at : at + size]
            elif way == 2:
                changed[at:at] = bytes(self.draw.randrange(256) for _ in range(size))
            elif way == 3 and at < len(changed):
                changed[at] ^= 1 << self.draw.randrange(8)
            elif way == 4:
                changed[at:at] = changed[at : at + size] * self.draw.choice((1, 2, 50))
            elif self.draw.random() < 0.2:
                del changed[at:]
        return bytes(changed)

    def _change(self, message: Message, others: Sequence[Message]) -> None:
        field = self.draw.choice(message.DESCRIPTOR.fields)
        if self.draw.random() < 0.6:  # deeper, where there is something
            present = [one for one, _ in message.ListFields() if one.type == FieldDescriptor.TYPE_MESSAGE]
            if present:
                field = self.draw.choice(present)
        others = [other for other in others if type(other) is type(message)]
        if field.is_repeated if hasattr(field, "is_repeated") else field.label == FieldDescriptor.LABEL_REPEATED:
            self._change_list(message, field, others)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            child = getattr(message, field.name)
            way = self.draw.random()
            if way < 0.1:
                message.ClearField(field.name)
            elif way < 0.2 and others:
                child.CopyFrom(getattr(self.draw.choice(others), field.name))
            elif child.DESCRIPTOR.fields:
                child.SetInParent()
                self._change(child, [getattr(other, field.name) for other in others])
            else:
                child.SetInParent()
        elif self.draw.random() < 0.1:
            message.ClearField(field.name)
        else:
            self._set(lambda value: setattr(message, field.name, value), field)

    def _change_list(self, message: Message, field: FieldDescriptor, others: Sequence[Message]) -> None:
        values: Any = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key = self.draw.choice([*values, *_TEXTS])
            try:
                self._change(values[key], [])
            except (UnicodeEncodeError, ValueError):
                values.clear()
            return
        way = self.draw.randrange(5)
        if way == 0 or not len(values):
            for _ in range(self.draw.choice((1, 1, 2, 70, 3000))):
                if field.type == FieldDescriptor.TYPE_MESSAGE:
                    values.add()
                else:
                    self._set(values.append, field)
        elif way == 1:
            del values[self.draw.randrange(len(values)) :]
        elif way == 2:
            values.extend(list(values)[: self.draw.choice((1, 5, 200))])
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            self._change(self.draw.choice(list(values)), [])
        else:
            at = self.draw.randrange(len(values))
            self._set(lambda value: values.__setitem__(at, value), field)

    def _set(self, put: Callable[[Any], None], field: FieldDescriptor) -> None:
        kind = field.cpp_type
        if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
            choices: List[Any] = [*_NUMBERS, self.draw.uniform(-10, 10)]
        elif kind == FieldDescriptor.CPPTYPE_BOOL:
            choices = [True, False]
        elif field.type == FieldDescriptor.TYPE_BYTES:
            choices = [*_BYTES, bytes(self.draw.randrange(256) for _ in range(self.draw.randrange(300)))]
        elif kind == FieldDescriptor.CPPTYPE_STRING:
            choices = list(_TEXTS)
        elif kind == FieldDescriptor.CPPTYPE_ENUM:
            choices = [*range(-1, 6), 2**31 - 1]
        else:
            choices = [*_INTEGERS, self.draw.randrange(100)]
        with suppress(ValueError, TypeError, OverflowError):  # out of the field's range: it stays
            put(self.draw.choice(choices))
