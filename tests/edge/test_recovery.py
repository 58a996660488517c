"""When a run whose session is gone opens another one, with a clock of the test's."""

from __future__ import annotations

import threading
from typing import Iterator, List

import pytest

from sft.errors import (
    AccessError,
    LinkError,
    ProtocolError,
    ServerFullError,
    ServerUnavailableError,
    SessionLostError,
    StreamBrokenError,
)
from sft_edge.recovery import Recovery


class Rig:
    def __init__(self) -> None:
        self.now = 100.0
        self.begun = 0
        self.terminated = threading.Event()
        self.recovery = Recovery(60.0, self._delays, self.terminated, lambda: self.now)

    def _delays(self) -> Iterator[float]:
        self.begun += 1
        return iter(())


LOST, AWAY = SessionLostError("lost"), ServerUnavailableError("nobody")
TRANSIENT: List[LinkError] = [AWAY, LOST, ServerFullError("full"), StreamBrokenError("broken")]
FATAL: List[LinkError] = [ProtocolError("odd"), AccessError("who?"), LinkError("other")]


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_session_that_is_lost(rig: Rig) -> None:
    rig.recovery.reached(3)
    assert rig.recovery.is_worth_trying(LOST, had_session=True)
    for error in TRANSIENT:
        assert rig.recovery.is_worth_trying(error, had_session=False)
    for error in FATAL:
        assert not rig.recovery.is_worth_trying(error, had_session=False)
    assert rig.begun == 1


def test_a_session_that_ends_otherwise(rig: Rig) -> None:
    for error in [*FATAL, AWAY]:
        assert not rig.recovery.is_worth_trying(error, had_session=True)


def test_the_first_attempt_of_all_is_not_repeated(rig: Rig) -> None:
    for error in [*TRANSIENT, *FATAL]:
        assert not rig.recovery.is_worth_trying(error, had_session=False)


def test_time_runs_since_the_furthest_step(rig: Rig) -> None:
    rig.recovery.reached(3)
    rig.now += 59
    assert rig.recovery.is_worth_trying(LOST, had_session=True)
    assert rig.recovery.is_worth_trying(AWAY, had_session=False)
    rig.recovery.reached(2)
    rig.recovery.reached(3)
    rig.now += 1
    assert not rig.recovery.is_worth_trying(AWAY, had_session=False)
    assert not rig.recovery.is_worth_trying(LOST, had_session=True)
    rig.recovery.reached(4)
    assert rig.recovery.is_worth_trying(LOST, had_session=True)
    assert rig.begun == 3


def test_a_wait_ends_when_the_run_is_to_stop(rig: Rig) -> None:
    recovery = Recovery(60.0, lambda: iter([3600.0]), rig.terminated)
    assert recovery.is_worth_trying(LOST, had_session=True)
    rig.terminated.set()
    recovery.wait()
