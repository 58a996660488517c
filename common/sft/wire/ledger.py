"""Bytes and seconds of every step, by direction and phase.

Payload is what the method itself must move: the elements of activations, logits and gradients. Framing is all the rest
of a message on the wire: shapes, lengths, labels and step numbers, and what gRPC and HTTP/2 wrap around them.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, fields
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional

PHASES = ("edge_forward", "uplink_wait", "cloud", "edge_backward")
"""The phases of a step, in the order they happen. `uplink_wait` is waiting for the cloud's answer less the time the
cloud says it worked, so it is the link's share in both directions."""

_FLOAT32_BYTES = 4
_LENGTH_PREFIX_BYTES = 5
_FRAME_HEADER_BYTES = 9
_FRAME_PAYLOAD_BYTES = 16_384


def framed_size(message_bytes: int) -> int:
    """Bytes on the connection for a gRPC message of `message_bytes`, serialized.

    A message goes out behind a five-byte prefix (gRPC over HTTP/2, "Length-Prefixed-Message"), in DATA frames of at
    most 16,384 bytes with headers of nine (RFC 9113, sections 4.1 and 6.5.2). Outside of the count: the headers that
    open the stream, once a session, and window updates, at most some 30 bytes a message. gRPC may agree on larger
    frames on a fast link, which makes the count up to 0.06% too high.
    """
    length = message_bytes + _LENGTH_PREFIX_BYTES
    return length + _FRAME_HEADER_BYTES * math.ceil(length / _FRAME_PAYLOAD_BYTES)


def plain_split_bytes(batch_size: int, padded_length: int, model_width: int) -> int:
    """Bytes that plain split learning moves for a micro-batch: activation and gradient, B * S * D float32 each.

    That is the paper's tensor a of shape (B, M, N), padding included; nothing is packed away.
    """
    return 2 * batch_size * padded_length * model_width * _FLOAT32_BYTES


@dataclass(frozen=True)
class Traffic:
    """Bytes that crossed the wire, as the edge sees the directions. They add up with `+`."""

    payload_bytes_sent: int = 0
    """elements of activations; of gradients of logits where labels stay on the edge"""

    payload_bytes_received: int = 0
    """elements of gradients; of logits in evaluation and where labels stay on the edge"""

    bytes_sent: int = 0
    """whole messages with their framing"""

    bytes_received: int = 0
    """whole messages with their framing"""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in _TRAFFIC_COLUMNS))


_TRAFFIC_COLUMNS = tuple(field.name for field in fields(Traffic))


NO_TRAFFIC = Traffic()
"""What training in one process moves."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, all its micro-batches added."""

    step: int
    """counted from 0"""

    samples: int
    """sequences in the step"""

    traffic: Traffic = NO_TRAFFIC
    """what the step moved"""

    plain_bytes: int = 0
    """`plain_split_bytes` of the same micro-batches; 0 in one process"""

    edge_forward: float = 0.0
    """seconds in net_1's forward, encoding included; in one process the whole forward"""

    uplink_wait: float = 0.0
    """seconds of waiting for the cloud's answers that the cloud did not work"""

    cloud: float = 0.0
    """seconds that the cloud worked, its queue included"""

    edge_backward: float = 0.0
    """seconds in net_1's backward and update; in one process the whole backward and update"""


class PhaseRow(NamedTuple):
    """Seconds of one phase over all steps."""

    name: str
    total: float
    share: float
    """of the seconds of all phases; 0 when there are none"""

    mean: float
    p50: float
    p95: float


class Ledger:
    """The records of a run's training steps, and what evaluation moved. A step takes about 90 bytes of memory."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        """of all training steps"""
        self.evaluation = Traffic()
        """of all evaluation batches"""
        self.evaluation_samples = 0
        self.plain_bytes = 0
        self.samples = 0
        self._counts = {name: array("q") for name in ("step", "samples", "plain_bytes", *_TRAFFIC_COLUMNS)}
        self._seconds = {name: array("d") for name in PHASES}

    def add(self, record: StepRecord) -> None:
        """Adds a training step."""
        self.traffic = self.traffic + record.traffic
        self.plain_bytes += record.plain_bytes
        self.samples += record.samples
        for name in ("step", "samples", "plain_bytes"):
            self._counts[name].append(getattr(record, name))
        for name in _TRAFFIC_COLUMNS:
            self._counts[name].append(getattr(record.traffic, name))
        for name, column in self._seconds.items():
            column.append(getattr(record, name))

    def add_evaluation(self, traffic: Traffic, samples: int) -> None:
        """Adds an evaluation batch, which no figure of training counts."""
        self.evaluation = self.evaluation + traffic
        self.evaluation_samples += samples

    def columns(self) -> Dict[str, array[Any]]:
        """What is known of every step, whole numbers as `q` and seconds as `d`: for `load`."""
        return {**self._counts, **self._seconds}

    def load(self, columns: Mapping[str, array[Any]], evaluation: Traffic, evaluation_samples: int) -> None:
        """Takes on what `columns` gave and what evaluation moved, in the place of what is here."""
        self._counts = {name: columns[name] for name in self._counts}
        self._seconds = {name: columns[name] for name in self._seconds}
        self.traffic = Traffic(*(sum(columns[name]) for name in _TRAFFIC_COLUMNS))
        self.plain_bytes, self.samples = sum(columns["plain_bytes"]), sum(columns["samples"])
        self.evaluation, self.evaluation_samples = evaluation, evaluation_samples

    def __len__(self) -> int:
        """Number of training steps."""
        return len(self._counts["step"])

    def __iter__(self) -> Iterator[StepRecord]:
        """The training steps as they were added."""
        for index in range(len(self)):
            traffic = Traffic(*(self._counts[name][index] for name in _TRAFFIC_COLUMNS))
            step, samples, plain_bytes = (self._counts[name][index] for name in ("step", "samples", "plain_bytes"))
            yield StepRecord(step, samples, traffic, plain_bytes, *(self._seconds[name][index] for name in PHASES))

    def wire_reduction(self) -> Optional[float]:
        """Bytes of plain split learning, both ways, over the payload of ours; None where nothing crossed a wire."""
        payload = self.traffic.payload_bytes_sent + self.traffic.payload_bytes_received
        return self.plain_bytes / payload if payload else None

    def seconds(self) -> Dict[str, float]:
        """Total of each phase."""
        return {name: math.fsum(column) for name, column in self._seconds.items()}

    def phases(self) -> List[PhaseRow]:
        """A row for each phase, in order."""
        totals, steps = self.seconds(), max(len(self), 1)
        everything = math.fsum(totals.values()) or 1.0
        rows = []
        for name, column in self._seconds.items():
            ordered, total = sorted(column), totals[name]
            p50, p95 = _percentile(ordered, 0.50), _percentile(ordered, 0.95)
            rows.append(PhaseRow(name, total, total / everything, total / steps, p50, p95))
        return rows


def _percentile(ordered: List[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed; 0 without values."""
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1] if ordered else 0.0
