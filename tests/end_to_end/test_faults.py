"""Runs that lose the other side: the edge ends with one line and its exit code, the cloud goes on serving."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.jobs import STEADY, Job, read_json, same_bits

from sft_cloud.server import CloudServer
from sft_cloud.session.session import Session
from sft_edge.cli import main
from sft_edge.link import request as session_request
from sft_edge.link.retries import Retries
from sft_edge.systems import cloud_process
from sft_edge.systems.cloud_process import CloudProcess

SECONDS = 60

# The server.


def test_a_full_server(
    failing: Callable[..., tuple[int, str]],
    job: Job,
    model: Path,
    start_cloud: Callable[..., CloudServer],
    at_step: Callable[[int, Callable[[], object]], None],
    tmp_path: Path,
) -> None:
    """A second edge is sent away; the first is not disturbed; and when it has ended, there is room."""
    server = start_cloud(max_sessions=1)
    second: list[tuple[int, str]] = []
    at_step(1, lambda: second.append(failing(server=server.address)))
    assert main(["train", *job.flags(model=model, server=server.address, max_steps=2, output_dir=tmp_path / "a")]) == 0
    ((code, line),) = second
    assert code == 5
    assert line == f"{server.address} has no room: the server has no room: all of its 1 sessions are in use"
    assert not (tmp_path / "out").exists()
    assert main(["train", *job.flags(model=model, server=server.address, max_steps=1, output_dir=tmp_path / "b")]) == 0


def test_another_version(failing: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_request, "PROTOCOL_VERSION", 1)
    code, line = failing()
    assert code == 5
    assert re.search(r"refuses: the edge \(release .*\) speaks protocol version 1, the cloud .* speaks version 3", line)


@pytest.mark.slow
def test_a_server_that_is_killed(
    failing: Callable[..., tuple[int, str]], at_step: Callable[[int, Callable[[], object]], None], tmp_path: Path
) -> None:
    with CloudProcess(["--device", "cpu", "--threads", "1", "--state-dir", str(tmp_path / "state")]) as cloud:
        at_step(3, lambda: os.kill(cloud.pid, signal.SIGKILL))
        code, line = failing(server=cloud.address, reconnect_timeout="300ms")
    assert code == 5
    assert line.startswith(f"the link to {cloud.address} broke")
    assert "tries in 300ms did not help" in line
    assert read_json(tmp_path / "out" / "trainer_state.json")["global_step"] == 3


@pytest.mark.slow
def test_a_server_that_freezes_for_a_while(
    job: Job,
    model: Path,
    first_steps: Callable[..., dict[str, torch.Tensor]],
    at_step: Callable[[int, Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Its connections stay open, and nothing comes over them: only the time-out can tell."""
    waited_for: list[str] = []
    with CloudProcess(["--device", "cpu", "--threads", "1", "--state-dir", str(tmp_path / "state")]) as cloud:

        def thaw(self, error, after=Retries.after):
            waited_for.append(str(error))
            os.kill(cloud.pid, signal.SIGCONT)
            after(self, error)

        monkeypatch.setattr(Retries, "after", thaw)
        at_step(3, lambda: os.kill(cloud.pid, signal.SIGSTOP))
        frozen = first_steps(5, job, model=model, server=cloud.address, reply_timeout="1s", reconnect_backoff="1ms")
    assert waited_for[0] == "the cloud did not answer within 1 s"
    assert same_bits(frozen, first_steps(5, job, model=model))


@pytest.mark.slow
def test_a_cloud_of_its_own_that_is_killed(
    failing: Callable[..., tuple[int, str]],
    at_step: Callable[[int, Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Without --server, as a child of the run, which keeps nothing of what was uploaded to it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    children: list[int] = []

    def remember(command, popen=subprocess.Popen, **settings):
        child = popen(command, **settings)
        children.append(child.pid)
        return child

    monkeypatch.setattr(cloud_process.subprocess, "Popen", remember)
    at_step(3, lambda: os.kill(children[0], signal.SIGKILL))
    code, line = failing(server=None)
    assert (code, line) == (5, "the cloud process was killed by signal 9 and left no message")
    assert not (tmp_path / "sft-cloud").exists()


def test_a_server_that_stops_in_order(
    failing: Callable[..., tuple[int, str]],
    start_cloud: Callable[..., CloudServer],
    at_step: Callable[[int, Callable[[], object]], None],
) -> None:
    server = start_cloud()
    at_step(2, lambda: server.stop(grace_seconds=0))
    code, line = failing(server=server.address, reconnect_timeout="0s")
    assert code == 5
    assert line.startswith(f"the link to {server.address} broke")


# The edge.


class Closings(logging.Handler):
    """Waits for sessions to end, as the server's log tells."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = threading.Semaphore(0)

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "session closed":
            self.closed.release()


@pytest.fixture
def closings() -> Iterator[Closings]:
    handler, log = Closings(), logging.getLogger("sft_cloud.service.servicer")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler
    log.removeHandler(handler)
    log.setLevel(level)


@pytest.mark.slow
def test_an_edge_that_is_killed_in_the_middle_of_a_step(
    job: Job,
    model: Path,
    first_steps: Callable[..., dict[str, torch.Tensor]],
    start_cloud: Callable[..., CloudServer],
    closings: Closings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """When it stays away the only place of the server is free again, and who gets it trains as if nobody had been
    there."""
    server = start_cloud(max_sessions=1)
    monkeypatch.setattr(server.sessions, "session_timeout_seconds", 0.0)
    busy, killed = threading.Event(), threading.Event()

    def handle(self, message, *more, handle=Session.handle_in_pieces):
        if message.HasField("forward") and message.step == 3 and not busy.is_set():
            busy.set()
            assert killed.wait(SECONDS)
        return (yield from handle(self, message, *more))

    monkeypatch.setattr(Session, "handle_in_pieces", handle)
    options = job.flags(model=model, server=server.address, output_dir=tmp_path / "out", **STEADY)
    edge = subprocess.Popen([sys.executable, "-m", "sft_edge", "train", *options], stdout=subprocess.DEVNULL)
    assert busy.wait(SECONDS)
    edge.kill()
    assert edge.wait(SECONDS) == -signal.SIGKILL
    assert closings.closed.acquire(timeout=SECONDS)
    killed.set()
    assert same_bits(
        first_steps(5, job, model=model, server=server.address),
        first_steps(5, job, model=model),
    )
