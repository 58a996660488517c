"""A message that comes in parts: put together here, where each part is charged before it is kept."""

from __future__ import annotations

from sft.errors import ProtocolError
from sft.printable import format_bytes
from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import MAX_MESSAGE_BYTES, PART_BYTES
from sft_cloud.errors import TooLargeError
from sft_cloud.memory import Charge

COPIES = 2
"""Of a message, while its parts are joined, and again while it is parsed."""


class Assembly:
    """One message. Not for several threads at once."""

    def __init__(self, first: pb.Part, charge: Charge, most_bytes: int) -> None:
        """`charge`: of nothing yet; `most_bytes`: that the server could ever have for it. Raises ProtocolError,
        TooLargeError."""
        self._total = first.total_bytes
        self._charge = charge
        self._parts: list[bytes] = []
        self._bytes = 0
        if not PART_BYTES < self._total <= MAX_MESSAGE_BYTES:
            raise ProtocolError(
                f"a message in parts is said to have {self._total} bytes; it has more than {PART_BYTES} and at most "
                f"{MAX_MESSAGE_BYTES}"
            )
        if COPIES * self._total > most_bytes:
            raise TooLargeError(
                f"a message of {format_bytes(self._total)} takes twice as much of the server's memory, of which one "
                f"may take {format_bytes(most_bytes)}: send smaller batches"
            )
        self._add(first)

    @property
    def is_whole(self) -> bool:
        """Whether all parts are here."""
        return self._bytes == self._total

    def add(self, message: pb.EdgeMessage) -> None:
        """The next part. Raises ProtocolError for what is none, ServerFullError where there is no room for it."""
        if not message.HasField("part") or message.part.total_bytes:
            raise ProtocolError(f"the message before this one has {self._bytes} of its {self._total} bytes")
        self._add(message.part)

    def joined(self) -> bytes:
        """The whole. Raises ServerFullError where there is no room for it."""
        self._charge.resize(COPIES * self._total)
        data = b"".join(self._parts)
        self._parts.clear()
        return data

    def _add(self, part: pb.Part) -> None:
        size, left = len(part.data), self._total - self._bytes
        # All but the last are full: small ones would each take more than their bytes, and would be waited for one by
        # one.
        if size != min(PART_BYTES, left):
            raise ProtocolError(
                f"a part of {size} bytes came, where a message has {left} left: each part but the last has {PART_BYTES}"
            )
        self._charge.resize(self._bytes + size)
        self._parts.append(part.data)
        self._bytes += size
