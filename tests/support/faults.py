"""Faults keyed on the side and the step where they happen, fired once, counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Sequence

from sft.errors import StreamBrokenError
from sft.v1 import split_training_pb2 as pb
from sft_edge.transport import Stream, Transport


@dataclass
class Fault:
    """The stream breaks at a training message.

    side "edge": before the message of that step reaches the cloud. side "cloud": the cloud has worked on the message,
    and its answer is lost.
    """

    side: str
    step: int
    micro_batch: int = 0
    fired: int = 0

    def strikes(self, side: str, step: int, micro_batch: int) -> bool:
        """Whether it happens here and now; counts it."""
        if self.fired or (side, step, micro_batch) != (self.side, self.step, self.micro_batch):
            return False
        self.fired += 1
        return True


class FaultyTransport(Transport):
    """Another transport with faults in its training stream."""

    def __init__(self, inner: Transport, faults: Sequence[Fault]) -> None:
        self._inner = inner
        self._faults = faults

    def open_session(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        return self._inner.open_session(request)

    def upload(self, sha256: str, total_bytes: int, chunks: Iterator[bytes]) -> None:
        self._inner.upload(sha256, total_bytes, chunks)

    def stream(self, messages: Iterator[bytes]) -> Stream:
        return _FaultyStream(self._inner, messages, self._faults)

    def download(self, session_id: str, optimizer_state: bool = False, offset: int = 0) -> Iterator[bytes]:
        return self._inner.download(session_id, optimizer_state, offset)

    def renew(self) -> None:
        self._inner.renew()

    def close(self) -> None:
        self._inner.close()


class _FaultyStream(Stream):
    def __init__(self, transport: Transport, messages: Iterator[bytes], faults: Sequence[Fault]) -> None:
        self._faults = faults
        self._inner = transport.stream(self._until_fault(messages))

    def __next__(self) -> bytes:
        data = next(self._inner)
        answer = pb.CloudMessage.FromString(data)
        if answer.HasField("result") and self._strikes("cloud", answer.step, answer.micro_batch):
            self._inner.cancel()
            raise StreamBrokenError("a fault of the test lost the answer")
        return data

    def cancel(self) -> None:
        self._inner.cancel()

    def _until_fault(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        for data in messages:
            message = pb.EdgeMessage.FromString(data)
            if message.HasField("forward") and self._strikes("edge", message.step, message.micro_batch):
                self._inner.cancel()
                return
            yield data

    def _strikes(self, side: str, step: int, micro_batch: int) -> bool:
        return any(fault.strikes(side, step, micro_batch) for fault in self._faults)
