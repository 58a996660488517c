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
from sft_edge.checkpoints.policy import CloudStoppingError
from sft_edge.training.recovery import Recovery


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


def test_time_runs_since_a_session_was_lost(rig: Rig) -> None:
    """Not since the last step: the evaluation after it took an hour, or the steps before it came again."""
    rig.recovery.reached(3)
    for _ in range(2):
        rig.now += 3600
        assert rig.recovery.is_worth_trying(LOST, had_session=True)
        rig.now += 59
        assert rig.recovery.is_worth_trying(AWAY, had_session=False)
        rig.now += 1
        assert not rig.recovery.is_worth_trying(AWAY, had_session=False)


def test_a_step_at_which_every_server_dies(rig: Rig) -> None:
    """The run ends, however much time there is; one that gets further begins to count again."""
    for furthest in (3, 4):
        rig.recovery.reached(furthest)
        for _ in range(5):
            assert rig.recovery.is_worth_trying(LOST, had_session=True)
            rig.recovery.reached(2)
            rig.recovery.reached(furthest)
    assert not rig.recovery.is_worth_trying(LOST, had_session=True)


def test_a_server_that_is_somebody_else_for_a_while(rig: Rig) -> None:
    """Between two servers, a proxy may answer for one that is not there yet."""

    class NotOurs(ServerUnavailableError):
        pass

    assert rig.recovery.is_worth_trying(CloudStoppingError("the server stops"), had_session=True)
    for error in (NotOurs("html"), StreamBrokenError("closed at once"), ServerFullError("full")):
        assert rig.recovery.is_worth_trying(error, had_session=False)


def test_a_wait_ends_when_the_run_is_to_stop(rig: Rig) -> None:
    recovery = Recovery(60.0, lambda: iter([3600.0]), rig.terminated)
    assert recovery.is_worth_trying(LOST, had_session=True)
    rig.terminated.set()
    recovery.wait()
