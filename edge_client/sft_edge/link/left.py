"""What an edge that leaves its session writes down of it."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from sft.v1 import split_training_pb2 as pb

_OF_THE_SENDING = ("answered", "ahead", "trace_parent")


class Left(NamedTuple):
    """How an edge has left a session."""

    session_id: str
    number: int
    """Of the message with which it left; it is answered."""
    last: int
    """Of the last message that it left to do."""
    sha256: str
    """Of what it left to do, but activations: who makes it again has to make the same."""


class Digest:
    """Of messages, one after the other."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, message: pb.EdgeMessage) -> None:
        """What it asks for; but activations, whose last bits may differ, and what is of its sending."""
        told = pb.EdgeMessage()
        told.CopyFrom(message)
        for name in _OF_THE_SENDING:
            told.ClearField(name)
        if told.HasField("forward"):
            told.forward.activation.packed.ClearField("data")
        if told.HasField("evaluate"):
            told.evaluate.activation.packed.ClearField("data")
        self._hash.update(told.SerializeToString(deterministic=True))

    def hexdigest(self) -> str:
        """SHA-256."""
        return self._hash.hexdigest()
