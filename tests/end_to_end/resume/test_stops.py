"""SIGTERM on either side, and disks that are full: what is saved is whole, and the run goes on."""

from __future__ import annotations

import itertools
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import error_line, read_json, same_bits, weights_of
from support.resuming import SECONDS, Clouds, Outcome, steps_in, terminate

from sft.errors import LinkError, StorageError
from sft_cloud.storage.files import LocalFiles
from sft_edge.checkpoints import policy as checkpointing_module
from sft_edge.link.retries import Retries
from sft_edge.training.recovery import Recovery

# SIGTERM.


@pytest.mark.first_only
@pytest.mark.usefixtures("default_sigterm")
@pytest.mark.parametrize("mode", ["sft", "local"])
@pytest.mark.parametrize("save_steps", [2, None])
def test_an_edge_that_is_told_to_stop(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    at_step: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    mode: str,
    save_steps: int | None,
) -> None:
    expected = whole(mode=mode, save_steps=None)
    at_step(3, terminate)
    capsys.readouterr()
    assert run(mode=mode, save_steps=save_steps) == 0
    assert capsys.readouterr().out == (
        f"stopped after step 3, which is saved in {out / 'checkpoint-3'}; the same command with "
        "--resume-from-checkpoint goes on\n"
    )
    assert steps_in(out)[-1] == 3
    assert not (out / "all_results.json").exists()
    assert run(mode=mode, save_steps=save_steps, resume_from_checkpoint=True) == 0
    assert same_bits(weights_of(out), expected.weights)
    assert Outcome(out, clouds.store).history == expected.history


@pytest.mark.usefixtures("default_sigterm")
def test_an_edge_that_is_told_to_stop_while_it_waits_for_a_server(
    run: Callable[..., int],
    clouds: Clouds,
    at_step: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = Recovery.wait

    def wait(self: Recovery) -> None:
        terminate()
        real(self)

    monkeypatch.setattr(Recovery, "wait", wait)
    at_step(3, clouds.replace)
    assert run() == 0
    assert "stopped after step 2, which is saved in" in capsys.readouterr().out


def test_a_server_that_is_told_to_stop(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    at_step: Callable[..., None],
) -> None:
    """It waits for the edge's checkpoint; the edge waits for the server to be back, and recomputes nothing."""
    expected = whole(save_steps=3)
    stopped = threading.Event()

    def stop() -> None:
        clouds.server.wait_for_checkpoints(SECONDS, threading.Event())
        assert not clouds.server.sessions.entries() or clouds.server.sessions.entries()[0].saves
        clouds.replace()
        stopped.set()

    stopping = threading.Thread(target=stop)

    def begin() -> None:
        stopping.start()
        assert clouds.server.service.stopping.wait(SECONDS)

    at_step(4, begin)
    assert run(save_steps=3) == 0
    stopping.join(SECONDS)
    assert stopped.is_set()
    results = read_json(out / "all_results.json")
    assert (results["recoveries"], results["steps_recomputed"]) == (1, 0)
    assert steps_in(out) == [3, 5, 6]
    mine, theirs = Outcome(out, clouds.store), expected
    assert same_bits(mine.weights, theirs.weights)
    assert (mine.history, mine.state, mine.results) == (theirs.history, theirs.state, theirs.results)


# Disks that are full.


@pytest.mark.first_only
@pytest.mark.parametrize("side", ["edge", "cloud"])
def test_a_save_for_which_there_is_no_room(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    side: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Training goes on, says so, and saves the next one."""
    expected = whole(save_total_limit=1)
    owner, name = (checkpointing_module, "write_checkpoint") if side == "edge" else (LocalFiles, "check_room")
    real, calls = getattr(owner, name), itertools.count(1)

    def full(*arguments: Any) -> Any:
        if next(calls) in (2, 3):  # it is tried twice
            raise StorageError("the disk is full")
        return real(*arguments)

    monkeypatch.setattr(owner, name, full)
    assert run(save_total_limit=1) == 0
    assert re.search(r"no checkpoint of step 4: .*the disk is full; training goes on", capsys.readouterr().err)
    Outcome(out, clouds.store).check_same(expected)


@pytest.mark.usefixtures("default_sigterm")
def test_no_room_for_the_last_one(
    run: Callable[..., int],
    out: Path,
    at_step: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that is told to stop cannot go on: it says that the last steps are lost."""

    def full() -> None:
        def write(*arguments: Any) -> None:
            raise StorageError("the disk is full")

        monkeypatch.setattr(checkpointing_module, "write_checkpoint", write)
        terminate()

    at_step(3, full)
    assert run() == 7
    assert error_line(capsys.readouterr().err) == (
        f"no checkpoint of step 3 could be saved (the disk is full); the newest is {out / 'checkpoint-2'}; "
        f"the model as of step 3 is in {out}"
    )
    assert steps_in(out) == [2]


# SIGTERM while the link is broken.


@pytest.mark.usefixtures("default_sigterm")
@pytest.mark.parametrize("save_steps", [2, None])
def test_an_edge_that_is_told_to_stop_while_its_link_is_broken(
    run: Callable[..., int],
    clouds: Clouds,
    out: Path,
    at_step: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    save_steps: int | None,
) -> None:
    """It does not wait for the server, which may be away for as long as --reconnect-timeout."""
    told = []
    after = Retries.after

    def terminated(self: Retries, error: LinkError) -> None:
        if not told:
            told.append(str(error))
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        after(self, error)

    monkeypatch.setattr(Retries, "after", terminated)
    at_step(3, lambda: clouds.server.stop(grace_seconds=0))
    code = run(save_steps=save_steps, reconnect_backoff="1h", reconnect_backoff_max="1h", reconnect_timeout="1h")
    assert told
    said = capsys.readouterr()
    if save_steps:
        assert code == 0
        assert said.out.startswith(f"stopped after step 2, which is saved in {out / 'checkpoint-2'}; the same command")
    else:
        assert code == 7
        assert re.match(r"no checkpoint of step 3 could be saved \(.*\); there is none", error_line(said.err))
