"""Faults of a link, keyed on the direction and the step where they happen; each happens once, and is counted.

No fault needs time: where an edge would wait in vain, its stream ends at once, as it would after the reply time-out.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass
from typing import Counter as CounterType
from typing import Deque, Iterator, List, Optional, Sequence

from sft.errors import StreamBrokenError
from sft.v1 import split_training_pb2 as pb
from sft_edge.link.transport import Stream, Transport

KINDS = ("lose", "twice", "swap", "late")


@dataclass
class Fault:
    """What happens to a training message on its way `up`, or to its answer on the way `down`.

    lose    it does not arrive
    twice   it arrives twice
    swap    the one after it, which has to be on its way already, arrives first
    late    the stream breaks, and the message (up only) arrives when the next stream has begun
    """

    kind: str
    direction: str
    step: int
    micro_batch: int = 0
    fired: int = 0


class FaultyTransport(Transport):
    """Another transport with faults in its training streams."""

    def __init__(self, inner: Transport, faults: Sequence[Fault] = (), cuts: Sequence[int] = ()) -> None:
        """`cuts`: the stream breaks whenever so many bytes, both ways and in all, have passed; in any order."""
        self.late: Deque[bytes] = deque()
        self.fired: CounterType[str] = Counter()
        """By kind and direction; cuts under `cut`."""
        self._inner = inner
        self._faults = {(fault.direction, fault.step, fault.micro_batch): fault for fault in faults}
        assert len(self._faults) == len(faults), "two faults at one place"
        self._cuts = sorted(cuts)
        self._passed = 0

    def open_session(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        return self._inner.open_session(request)

    def upload(self, sha256: str, total_bytes: int, chunks: Iterator[bytes]) -> None:
        self._inner.upload(sha256, total_bytes, chunks)

    def stream(self, messages: Iterator[bytes]) -> Stream:
        return _FaultyStream(self, self._inner, messages)

    def download(self, session_id: str, optimizer_state: bool = False, offset: int = 0) -> Iterator[bytes]:
        return self._inner.download(session_id, optimizer_state, offset)

    def renew(self) -> None:
        self._inner.renew()

    def close(self) -> None:
        self._inner.close()

    def strikes(self, direction: str, step: int, micro_batch: int) -> Optional[str]:
        """The kind of fault that happens here and now; counts it."""
        fault = self._faults.get((direction, step, micro_batch))
        if fault is None or fault.fired:
            return None
        fault.fired += 1
        self.fired[f"{fault.kind} {direction}"] += 1
        return fault.kind

    def is_cut(self, data: bytes) -> bool:
        """Whether the stream breaks while these bytes pass."""
        self._passed += len(data)
        if not self._cuts or self._passed < self._cuts[0]:
            return False
        while self._cuts and self._passed >= self._cuts[0]:
            self._cuts.pop(0)
            self.fired["cut"] += 1
        return True


class _FaultyStream(Stream):
    def __init__(self, faulty: FaultyTransport, inner: Transport, messages: Iterator[bytes]) -> None:
        self._faulty = faulty
        self._down: Deque[bytes] = deque()
        self._inner = inner.stream(self._up(messages))

    def __next__(self) -> bytes:
        if self._down:
            return self._down.popleft()
        data = next(self._inner)
        answer = pb.CloudMessage.FromString(data)
        if self._faulty.is_cut(data):
            raise self._broken("cut the link")
        kind = self._faulty.strikes("down", answer.step, answer.micro_batch) if answer.HasField("result") else None
        if kind == "lose":
            raise self._broken("lost an answer")
        if kind == "twice":
            self._down.append(data)
        if kind == "swap":
            self._down.append(data)
            return next(self._inner)
        return data

    def cancel(self) -> None:
        self._inner.cancel()

    def _up(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        for data in messages:
            message = pb.EdgeMessage.FromString(data)
            if self._faulty.is_cut(data):
                return
            kind = None
            if message.HasField("forward"):
                kind = self._faulty.strikes("up", message.step, message.micro_batch)
            if kind == "late":
                self._faulty.late.append(data)
                return
            if kind == "lose":
                return
            if kind == "swap":
                yield next(messages)
            if kind == "twice":
                yield data
            yield data
            if message.HasField("attach"):
                while self._faulty.late:
                    yield self._faulty.late.popleft()

    def _broken(self, what: str) -> StreamBrokenError:
        self._inner.cancel()
        return StreamBrokenError(f"a fault of the test {what}")


def random_faults(steps: int, micro_batches: int, lost: float, twice: float, seed: int) -> List[Fault]:
    """So many of the messages, and of the answers, are lost or come twice; a few more are swapped or late.

    `lost` and `twice` are shares, of each direction.
    """
    draw = random.Random(seed)
    faults = []
    for direction in ("up", "down"):
        for step in range(steps):
            for micro_batch in range(micro_batches):
                others = ["late"] if direction == "up" else []
                if micro_batch + 1 < micro_batches:
                    others.append("swap")
                roll = draw.random()
                if roll < lost:
                    faults.append(Fault("lose", direction, step, micro_batch))
                elif roll < lost + twice:
                    faults.append(Fault("twice", direction, step, micro_batch))
                elif others and roll < lost + twice + 0.01:
                    faults.append(Fault(draw.choice(others), direction, step, micro_batch))
    return faults
