"""A link that is held to a rate and to an amount: over real gRPC, with a clock of the test's own."""

from __future__ import annotations

import hashlib
import threading
from contextlib import contextmanager
from typing import Iterator

import grpc
import pytest
from support.scripted_cloud import TIMEOUT_SECONDS, ScriptedCloud, serving
from support.waits import LABELS, Waits

from sft.errors import SessionLostError, UsageError
from sft.v1 import split_training_pb2 as pb
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.link.link import Blob, Link
from sft_edge.link.meter import Meter, on_link
from sft_edge.link.pace import RECEIVED, SENT, Pace

MBIT = 8.0
RATE = 1e6  # bytes a second
BURST = 1.0  # second's worth that a pause saves up


class Clock:
    """Passes only where somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def pace(self, mbit: float = MBIT) -> Pace:
        return Pace(mbit, lambda: self.now, self.wait)

    def wait(self, over: threading.Event, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@contextmanager
def opened(cloud: ScriptedCloud, meter: Meter, reply_timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[Link]:
    with serving(cloud) as address:
        policy = Waits().policy(reply_timeout_seconds=reply_timeout_seconds)
        with Link(GrpcTransport(address, meter=meter), pb.OpenSessionRequest(), {}, policy) as link:
            link.open()
            yield link


def forward(link: Link, step: int, size: int) -> None:
    packed = pb.Tensor(data_type=pb.DATA_TYPE_FLOAT32, shape=[2, size // 8], data=bytes(size))
    link.forward(step, 0, pb.Activation(packed=packed), LABELS, 1).result()
    link.commit(step, [0.1], 1)


def test_a_rate_is_kept_in_the_mean(clock: Clock) -> None:
    pace, never = clock.pace(), threading.Event()
    waits = []
    for _ in range(5):
        assert pace.wait_turn((SENT,), never, lambda: waits.append(clock.now))
        pace.took(SENT, 2_000_000)
    assert clock.now == 4 * 2.0 - BURST, "what goes after a pause of a second has a second's worth free"
    assert len(waits) == 7, "whoever watches hears at least once a second that it lasts"
    assert pace.wait_turn((RECEIVED,), never, lambda: None)
    assert clock.now == 7.0, "the other direction owes nothing"


def test_who_ends_waits_no_longer(clock: Clock) -> None:
    pace, over = clock.pace(), threading.Event()
    pace.took(SENT, 100_000_000)
    assert not pace.wait_turn((SENT,), over, over.set)
    assert clock.now == 1.0


def test_messages_of_a_stream_and_their_answers_are_paced(clock: Clock) -> None:
    """The answers are as large as the messages here; both directions are paid for at a time."""
    steps, size = 6, 900_000
    with opened(ScriptedCloud(), Meter(None, clock.pace())) as link:
        for step in range(steps):
            forward(link, step, size)
    least = (steps - 1) * size / RATE - BURST
    assert least <= clock.now < 1.2 * least + 1, "the last is paid for by nobody"


def test_a_rate_does_not_look_like_a_dead_link(clock: Clock) -> None:
    """The answer is late, as the message waits for its turn: the stream stays."""
    waits, asked = threading.Event(), threading.Event()

    class Waiting(Meter):
        def has_held(self, seconds: float) -> bool:
            assert waits.wait(TIMEOUT_SECONDS)
            asked.set()
            return super().has_held(1000)  # of the test's clock

    def wait(over: threading.Event, seconds: float) -> None:
        waits.set()
        assert asked.wait(TIMEOUT_SECONDS)
        clock.now += seconds

    pace = Pace(MBIT, lambda: clock.now, wait)
    with opened(ScriptedCloud(), Waiting(None, pace), reply_timeout_seconds=0.1) as link:
        pace.took(SENT, 5_000_000)
        forward(link, 0, 900_000)
        assert asked.is_set()
        assert clock.now >= 4
        assert link.counts.reconnects == 0


def test_uploads_and_downloads_are_paced(clock: Clock) -> None:
    data = bytes(3_000_000)
    cloud, blobs = ScriptedCloud(), {hashlib.sha256(data).hexdigest(): Blob(len(data), lambda: iter([data]))}
    cloud.wanted, cloud.weights = list(blobs), [bytes(1_000_000)] * 5
    meter = Meter(None, clock.pace())
    with serving(cloud) as address, Link(GrpcTransport(address, meter=meter), pb.OpenSessionRequest(), blobs) as link:
        link.open()
        assert 1.0 < clock.now < 3.5
        began = clock.now
        assert sum(map(len, link.weights())) == 5_000_000
        assert 4.0 < clock.now - began < 6.5
    assert cloud.blobs[next(iter(blobs))] == data
    assert 3_000_000 < meter.sent < 3_002_000
    assert 5_000_000 < meter.received < 5_010_000


def test_an_upload_that_leaves_no_room_for_the_result_is_not_begun() -> None:
    data = bytes(1_000_000)
    cloud, blobs = ScriptedCloud(), {hashlib.sha256(data).hexdigest(): Blob(len(data), lambda: iter([data]))}
    cloud.wanted = list(blobs)
    meter = Meter(2_000_000)
    meter.expect(1_500_000)
    with serving(cloud) as address:
        link = Link(GrpcTransport(address, meter=meter), pb.OpenSessionRequest(), blobs)
        with pytest.raises(UsageError, match=r"--data-cap 2 MB is too little: the cloud lacks 1 MB of the model.*give"):
            link.open()
    assert not cloud.blobs
    assert meter.sent < 1000


def test_a_result_that_alone_is_too_much() -> None:
    with pytest.raises(UsageError, match=r"--data-cap 1 MB is too little: bringing the result home takes 1\.6"):
        Meter(1_000_000).expect(1_500_000)


def test_a_link_that_breaks_near_the_end_does_not_pass_the_cap() -> None:
    """One step more may be sent again; the fourth time it would take what is kept for the result."""
    cloud, size, cuts = ScriptedCloud(), 900_000, 3
    once = on_link(size, 2)
    meter = Meter(int(on_link(1_000_000, 1) + 6 * once + 100_000))
    meter.expect(1_000_000)
    meter.margin, meter.answers = 2 * once, once

    def cut(message: pb.EdgeMessage, context: object) -> None:
        nonlocal cuts
        if message.step == 1 and message.HasField("forward") and cuts:
            cuts -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "cut")  # type: ignore[attr-defined]

    cloud.before_answer = cut
    with opened(cloud, meter) as link:
        forward(link, 0, size)
        assert meter.room >= 2 * once, "the step fits"
        with pytest.raises(SessionLostError, match="--data-cap leaves no room to send again"):
            forward(link, 1, size)
    assert meter.cap is not None
    assert meter.link_bytes + meter.result <= meter.cap


def test_what_leaves_no_room_for_the_result_is_not_sent() -> None:
    """As a step that is sent again and again to a cloud without memory."""
    meter = Meter(3_000_000)
    meter.expect(1_000_000)
    with opened(ScriptedCloud(), meter) as link:
        forward(link, 0, 1000)
        meter.before = 1_500_000
        with pytest.raises(SessionLostError, match="--data-cap leaves no room to send again"):
            forward(link, 1, 900_000)
    assert meter.sent < 10_000


def test_a_result_is_brought_home_by_what_was_kept_for_it_and_once() -> None:
    """A download that breaks goes on; closing, with a stream that is opened for it, is no reason to fail."""
    cloud, breaks, size = ScriptedCloud(), [3], 5_000_000
    cloud.weights = [bytes(1_000_000)] * 5
    meter = Meter(int(on_link(size, 5)) + 40_000)

    def cut(context: object) -> None:
        breaks[0] -= 1
        if not breaks[0]:
            context.abort(grpc.StatusCode.UNAVAILABLE, "cut")  # type: ignore[attr-defined]

    cloud.before_chunk = cut
    with opened(cloud, meter) as link:
        meter.expect(size)
        assert sum(map(len, link.weights())) == size
        assert breaks[0] == -3, "it was broken off"
        assert meter.result < 10_000
        with pytest.raises(SessionLostError, match="--data-cap leaves no room to bring the result home"):
            next(link.weights())
    assert cloud.ended_properly.wait(TIMEOUT_SECONDS)
    assert meter.cap is not None
    assert meter.link_bytes <= meter.cap


def test_who_closes_does_not_wait_for_a_probe(clock: Clock) -> None:
    def wait(over: threading.Event, seconds: float) -> None:
        clock.now += seconds
        transport.close()

    pace = Pace(MBIT, lambda: clock.now, wait)
    transport = GrpcTransport("127.0.0.1:1", meter=Meter(None, pace))
    pace.took(SENT, 100_000_000)
    transport.check_carries(1_000_000)
    assert clock.now == 1.0


def test_a_stream_that_broke_is_not_opened_again_without_room() -> None:
    cloud, meter = ScriptedCloud(), Meter(3_000_000)
    meter.expect(1_000_000)

    def cut(message: pb.EdgeMessage, context: object) -> None:
        if message.step == 1 and message.HasField("forward"):
            meter.before = 2_900_000
            context.cancel()  # type: ignore[attr-defined]

    cloud.before_answer = cut
    with opened(cloud, meter) as link:
        forward(link, 0, 1000)
        with pytest.raises(SessionLostError, match="--data-cap leaves no room to send again"):
            forward(link, 1, 1000)
