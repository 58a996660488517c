"""What goes up a training stream: in parts, as fast as it may, and as long as it fits."""

from __future__ import annotations

import threading
from typing import Iterator, Optional

from sft.errors import SessionLostError
from sft.wire.parts import parts_of
from sft_edge.link.meter import AT_ONCE_BYTES, Meter


class Outgoing:
    """Of one stream."""

    def __init__(self, messages: Iterator[bytes], meter: Meter) -> None:
        self.over = threading.Event()
        """The stream was broken off."""
        self.refused: Optional[SessionLostError] = None
        """Why the stream was ended before a message."""
        self._messages, self._meter = messages, meter

    def parts(self) -> Iterator[bytes]:
        """Waits for the next message."""
        for data in self._messages:
            try:
                if len(data) > AT_ONCE_BYTES:
                    self._meter.check_again(len(data), steps=1)
            except SessionLostError as error:
                self.refused = error
                return
            for part in parts_of(data):
                if not self._meter.send(len(part), self.over):
                    return
                yield part
            del data, part  # a stream that idles must not keep it
