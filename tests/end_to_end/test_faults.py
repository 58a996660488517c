"""Runs that cannot go on: each ends with one line and its exit code, the model of its last good step is kept, and the
cloud goes on serving."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.jobs import Job, error_line, flags, read_json, same_bits, weights_of
from support.tiny import make_tiny_model

from sft_cloud.serve import CloudServer
from sft_cloud.session import Session
from sft_edge import cloud_process, split_system
from sft_edge import link as link_module
from sft_edge import train as train_module
from sft_edge.cli import main
from sft_edge.cloud_process import CloudProcess
from sft_edge.saving import load_model
from sft_edge.split_system import SplitSystem
from sft_edge.systems import LocalSystem

SECONDS = 60

STEADY = {"lr_scheduler_type": "constant", "logging_steps": 1, "max_steps": 50}
"""So that a run of fewer steps is the beginning of a longer one."""

Steps = Callable[[int], None]


@pytest.fixture
def failing(
    job: Job, model: Path, cloud: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs `sft-edge train` into `tmp_path / "out"`; gives the exit code and the line of the error."""

    def run(**options: object) -> tuple[int, str]:
        values = {"model": model, "server": cloud, "output_dir": tmp_path / "out", **STEADY, **options}
        if values.get("mode") == "local":
            values["server"] = None
        code = main(["train", *job.flags(**values)])
        stderr = capsys.readouterr().err
        return code, error_line(stderr) if code != 130 else stderr.splitlines()[-1]

    return run


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """`at_step(3, act)` calls `act` on the edge, once, when its step 3, counted from 1, has been taken."""

    def install(step: int, act: Callable[[], object]) -> None:
        left = [act]
        for system in (SplitSystem, LocalSystem):

            def update(self, index, scale, update=system.update):
                update(self, index, scale)
                if index + 1 == step and left:
                    left.pop()()

            monkeypatch.setattr(system, "update", update)

    return install


def until(step: int, train: Callable[..., Path], job: Job, **options: object) -> dict[str, torch.Tensor]:
    """The weights of a run that is asked for so many steps."""
    return weights_of(train(job, **{**STEADY, **options, "max_steps": step}))


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
    monkeypatch.setattr(split_system, "PROTOCOL_VERSION", 2)
    code, line = failing()
    assert code == 5
    assert re.search(r"refuses: the edge \(release .*\) speaks protocol version 2, the cloud .* speaks version 1", line)


def test_a_server_that_is_killed(
    failing: Callable[..., tuple[int, str]], at_step: Callable[[int, Callable[[], object]], None], tmp_path: Path
) -> None:
    with CloudProcess(["--device", "cpu", "--threads", "1", "--state-dir", str(tmp_path / "state")]) as cloud:
        at_step(3, lambda: os.kill(cloud.pid, signal.SIGKILL))
        code, line = failing(server=cloud.address)
    assert code == 5
    assert line.startswith(f"the cloud at {cloud.address} was lost")
    assert read_json(tmp_path / "out" / "trainer_state.json")["global_step"] == 3


def test_a_cloud_of_its_own_that_is_killed(
    failing: Callable[..., tuple[int, str]],
    at_step: Callable[[int, Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Without --server, as a child of the run."""
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
    assert list((tmp_path / "sft-cloud" / "blobs").iterdir())


def test_a_server_that_stops_in_order(
    failing: Callable[..., tuple[int, str]],
    start_cloud: Callable[..., CloudServer],
    at_step: Callable[[int, Callable[[], object]], None],
) -> None:
    server = start_cloud()
    at_step(2, lambda: server.stop(grace_seconds=0))
    code, line = failing(server=server.address)
    assert code == 5
    assert line.startswith(f"the cloud at {server.address} was lost")


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
    handler, log = Closings(), logging.getLogger("sft_cloud.service")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler
    log.removeHandler(handler)
    log.setLevel(level)


def test_an_edge_that_is_killed_in_the_middle_of_a_step(
    job: Job,
    model: Path,
    train: Callable[..., Path],
    start_cloud: Callable[..., CloudServer],
    closings: Closings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The only place of the server is free again, and who gets it trains as if nobody had been there."""
    server = start_cloud(max_sessions=1)
    busy, killed = threading.Event(), threading.Event()

    def handle(self, message, handle=Session.handle):
        if message.HasField("forward") and message.step == 3 and not busy.is_set():
            busy.set()
            assert killed.wait(SECONDS)
        return handle(self, message)

    monkeypatch.setattr(Session, "handle", handle)
    options = job.flags(model=model, server=server.address, output_dir=tmp_path / "out", **STEADY)
    edge = subprocess.Popen([sys.executable, "-m", "sft_edge", "train", *options], stdout=subprocess.DEVNULL)
    assert busy.wait(SECONDS)
    edge.kill()
    assert edge.wait(SECONDS) == -signal.SIGKILL
    assert closings.closed.acquire(timeout=SECONDS)
    killed.set()
    assert same_bits(
        until(5, train, job, model=model, server=server.address),
        until(5, train, job, model=model),
    )


def interrupt() -> None:
    """Ctrl-C, here and now."""
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("mode", ["local", "sl", "sft"])
def test_ctrl_c_between_steps(
    failing: Callable[..., tuple[int, str]],
    at_step: Callable[[int, Callable[[], object]], None],
    job: Job,
    model: Path,
    train: Callable[..., Path],
    tmp_path: Path,
    mode: str,
) -> None:
    """Inside of the update already: a step is taken on both sides or on neither."""
    at_step(4, interrupt)
    code, line = failing(mode=mode)
    assert (code, line) == (130, "sft-edge train: interrupted")
    assert read_json(tmp_path / "out" / "trainer_state.json")["global_step"] == 4
    assert read_json(tmp_path / "out" / "all_results.json")["train_steps"] == 4
    assert "eval_accuracy" not in read_json(tmp_path / "out" / "all_results.json")
    load_model(tmp_path / "out")
    assert same_bits(weights_of(tmp_path / "out"), until(4, train, job, model=model, mode=mode))


@pytest.mark.parametrize("place", ["scale_gradients", "encode_activation", "decode_tensor"])
def test_ctrl_c_anywhere_in_a_step(
    failing: Callable[..., tuple[int, str]],
    job: Job,
    model: Path,
    train: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    """After the commit was handed to the link, before a micro-batch is sent, and after it was answered."""
    real, calls = getattr(split_system, place), iter(range(1, 1000))

    def interrupted(*arguments):
        if next(calls) == 4:
            interrupt()
        return real(*arguments)

    monkeypatch.setattr(split_system, place, interrupted)
    assert failing()[0] == 130
    steps = read_json(tmp_path / "out" / "trainer_state.json")["global_step"]
    assert steps == (4 if place == "scale_gradients" else 3)
    assert same_bits(weights_of(tmp_path / "out"), until(steps, train, job, model=model))


def test_ctrl_c_while_the_cloud_works(
    failing: Callable[..., tuple[int, str]],
    job: Job,
    model: Path,
    train: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The commit of the step before rides on the message that the cloud works on: it must count."""
    at_work, go_on = threading.Event(), threading.Event()
    waits = iter(range(1000))

    def handle(self, message, handle=Session.handle):
        if message.HasField("forward") and message.step == 3 and not at_work.is_set():
            assert message.HasField("commit")
            at_work.set()
            assert go_on.wait(SECONDS), "nobody waits for what is under way"
        return handle(self, message)

    def result(self, result=link_module.PendingReply.result):
        wait = next(waits)
        if wait == 3:
            assert at_work.wait(SECONDS)
            interrupt()
        if wait > 3:
            go_on.set()
        return result(self)

    monkeypatch.setattr(Session, "handle", handle)
    monkeypatch.setattr(link_module.PendingReply, "result", result)
    assert failing()[0] == 130
    assert read_json(tmp_path / "out" / "trainer_state.json")["global_step"] == 3
    assert same_bits(weights_of(tmp_path / "out"), until(3, train, job, model=model))


def test_ctrl_c_in_the_last_evaluation(
    failing: Callable[..., tuple[int, str]],
    job: Job,
    model: Path,
    train: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hours of training are not lost because somebody did not want to wait for the score."""

    def evaluate(*arguments: object) -> None:
        interrupt()

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate", evaluate)
        assert failing(max_steps=3)[0] == 130
    assert same_bits(weights_of(tmp_path / "out"), until(3, train, job, model=model))


def test_ctrl_c_for_a_process(job: Job, model: Path, train: Callable[..., Path], cloud: str, tmp_path: Path) -> None:
    options = {**STEADY, "max_steps": 100_000, "server": cloud, "output_dir": tmp_path / "out", "model": model}
    command = [sys.executable, "-m", "sft_edge", "train", *job.flags(**options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as edge:
        assert edge.stderr is not None
        lines = iter(edge.stderr)
        assert any(line.startswith("step 5/") for line in lines)
        edge.send_signal(signal.SIGINT)
        told = list(lines)
        assert edge.wait(SECONDS) == 130
    assert told[-1] == "sft-edge train: interrupted\n"
    steps = read_json(tmp_path / "out" / "trainer_state.json")["global_step"]
    assert f"stopping: saving the model as of step {steps}\n" in told
    assert 5 <= steps < 100_000
    assert "Traceback" not in "".join(told)
    # Learning rates do not tell how long a run was to be.
    assert same_bits(weights_of(tmp_path / "out"), until(steps, train, job, model=model))


# Numbers.


@pytest.mark.parametrize("mode", ["local", "sl", "sft"])
def test_a_loss_that_is_not_finite(
    failing: Callable[..., tuple[int, str]], job: Job, model: Path, tmp_path: Path, mode: str
) -> None:
    """What is left is the model after the last step that could be taken."""
    wild = {"optim": "SGD", "learning_rate": 1e30, "max_grad_norm": 0}
    code, line = failing(mode=mode, **wild)
    assert code == 6
    found = re.fullmatch(
        r"the (loss|norm of the gradient) is (nan|inf) at step (\d+); a lower --learning-rate or a longer warm-up may "
        r"help; the model as of step (\d+) is in (.*)",
        line,
    )
    assert found
    steps = int(found[4])
    assert int(found[3]) == steps + 1
    assert found[5] == str(tmp_path / "out")
    state = read_json(tmp_path / "out" / "trainer_state.json")
    assert state["global_step"] == read_json(tmp_path / "out" / "all_results.json")["train_steps"] == steps >= 1
    assert len(state["log_history"]) == steps
    load_model(tmp_path / "out")


@pytest.mark.parametrize("mode", ["local", "sl", "sft"])
def test_weights_that_are_not_finite(
    failing: Callable[..., tuple[int, str]],
    job: Job,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mode: str,
) -> None:
    """From the start: nothing is learned, and neither evaluation nor prediction make something up."""
    sick = make_tiny_model(tmp_path / "sick", layers=3)
    tensors = load_file(sick / "model.safetensors")
    tensors["encoder.layer.2.output.dense.bias"][0] = math.inf
    save_file(tensors, sick / "model.safetensors", {"format": "pt"})
    code, line = failing(model=sick, mode=mode)
    assert code == 6
    assert line.startswith("the loss is nan at step 1; ")
    assert line.endswith(f"the model as of step 0 is in {tmp_path / 'out'}")
    assert read_json(tmp_path / "out" / "all_results.json")["train_loss"] is None
    assert main(["predict", "--model", str(tmp_path / "out"), "--text", "a film"]) == 6
    assert "NaN or infinite" in error_line(capsys.readouterr().err)
    assert main(["evaluate", *flags(model=tmp_path / "out", data_dir=job.data_dir)]) == 6


def test_the_last_step_spoils_the_model(failing: Callable[..., tuple[int, str]], job: Job, tmp_path: Path) -> None:
    """Found by the evaluation at the end, when training is over: the model is kept for who wants to look at it."""
    code, line = failing(optim="SGD", learning_rate=1e38, max_grad_norm=0, max_steps=1)
    assert code == 6
    assert line.startswith("the model's outputs are NaN or infinite")
    assert line.endswith(f"the model as of step 1 is in {tmp_path / 'out'}")
    load_model(tmp_path / "out")


# The disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(disk: Path, leave: int) -> None:
    """Leaves so many bytes of a disk, more or less."""
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with (disk / "filler").open("r+b") as file:
        file.truncate((disk / "filler").stat().st_size - leave)


@pytest.mark.parametrize("leave", [0, 60_000, 120_000, 160_000])
def test_a_disk_that_is_full_at_the_end(
    failing: Callable[..., tuple[int, str]],
    job: Job,
    model: Path,
    train: Callable[..., Path],
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    leave: int,
) -> None:
    """Whichever file does not fit any more. The model goes where there is room, and nothing torn stays behind."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))

    def evaluate(*arguments, evaluate=train_module.evaluate):
        fill(small_disk, leave)
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate", evaluate)
        code, line = failing(output_dir=small_disk / "out", max_steps=2)
    assert code == 7
    (rescue,) = (tmp_path / "elsewhere").iterdir()
    assert line.startswith(f"cannot write {small_disk / 'out'}")
    assert line.endswith(
        "No space left on device; free some space or choose another --output-dir; "
        f"the model was saved in {rescue} instead"
    )
    assert same_bits(weights_of(rescue), until(2, train, job, model=model))
    load_model(rescue)
    left = [path.name for path in (small_disk / "out").iterdir()]
    assert not [name for name in left if name.startswith(".") or "safetensors" in name or name == "sft.json"]


def test_a_disk_without_room_from_the_start(failing: Callable[..., tuple[int, str]], small_disk: Path) -> None:
    """Told before hours of training, not after."""
    fill(small_disk, 8192)
    code, line = failing(output_dir=small_disk / "out")
    assert code == 7
    assert re.search(r"the model needs [\d,]+ bytes, the disk has [\d,]+ free", line)


def test_no_room_anywhere(job: Job, model: Path, tmp_path: Path) -> None:
    """A limit on the size of files, which temporary ones do not escape either."""
    limit = 120_000  # less than the weights
    (tmp_path / "tmp").mkdir()
    options = {"model": model, "output_dir": tmp_path / "out", "mode": "local", "split_layer": None, "max_steps": 1}
    done = subprocess.run(
        [sys.executable, "-m", "sft_edge", "train", *job.flags(**options)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 7
    assert error_line(done.stderr) == (
        f"cannot write {tmp_path / 'out' / 'model.safetensors'}: File too large; "
        "free some space or choose another --output-dir"
    )
    assert not list((tmp_path / "out").iterdir())
    assert not list((tmp_path / "tmp").iterdir())
