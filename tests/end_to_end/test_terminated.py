"""SIGTERM for real processes: both sides end with code 0, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.jobs import STEADY, Job, read_json, same_bits
from support.servers import start_server

from sft_cloud.server import CloudServer

SECONDS = 60


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes, which end with the test."""
    processes: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen([sys.executable, "-m", *arguments], stdout=pipe, stderr=pipe, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def serve(
    start: Callable[..., subprocess.Popen[str]], state: Path, port: int = 0, *more: str
) -> tuple[subprocess.Popen[str], int]:
    flags = f"--port {port} --device cpu --threads 1 --state-dir {state} --log-format json"
    server = start("sft_cloud", "serve", *flags.split(), *more)
    assert server.stdout is not None
    return server, int(json.loads(server.stdout.readline())["address"].rpartition(":")[2])


@contextmanager
def stopped_at_the_end(server: CloudServer) -> Iterator[None]:
    try:
        yield
    finally:
        server.stop(grace_seconds=0)


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    assert any(words in line for line in process.stderr), f"no line had {words!r} in it"


@pytest.mark.slow
def test_a_server_and_then_an_edge(
    start: Callable[..., subprocess.Popen[str]],
    job: Job,
    model: Path,
    first_steps: Callable[..., dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    """The server is replaced under the edge, which then has to go itself, and comes back."""
    server, port = serve(start, tmp_path / "cloud")
    options = {**STEADY, "model": model, "server": f"127.0.0.1:{port}", "output_dir": tmp_path / "out"}
    options.update(save_steps=1000, reconnect_backoff="10ms", max_steps=100_000)
    edge = start("sft_edge", "train", *job.flags(**options))
    wait_for(edge, "step 5/")
    server.send_signal(signal.SIGTERM)
    assert server.wait(SECONDS) == 0
    # The one in its place is no process: how such a one ends was seen just now.
    with stopped_at_the_end(start_server(tmp_path / "cloud", 2, port=port)):
        wait_for(edge, "going on from step")
        wait_for(edge, "loss")
        edge.send_signal(signal.SIGTERM)
        told, _ = edge.communicate(timeout=SECONDS)
    assert edge.returncode == 0
    checkpoint = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    assert told == (
        f"stopped after step {checkpoint.name.partition('-')[2]}, which is saved in {checkpoint}; the same command "
        "with --resume-from-checkpoint goes on\n"
    )
    counts = read_json(checkpoint / "state.json")["counts"]
    assert counts == {"recoveries": 1, "steps_recomputed": 0}
    steps = read_json(checkpoint / "manifest.json")["step"]
    # Learning rates do not tell how long a run was to be.
    expected = first_steps(steps, job, model=model)
    saved = load_file(checkpoint / "net_1.safetensors")
    assert same_bits(saved, {name: expected[name] for name in saved})


@pytest.mark.slow
def test_a_server_with_an_edge_that_does_not_save(
    start: Callable[..., subprocess.Popen[str]], job: Job, model: Path, tmp_path: Path
) -> None:
    """A second signal ends the wait for it, which could be an hour."""
    server, port = serve(start, tmp_path / "cloud", 0, "--grace", "1h")
    options = {**STEADY, "model": model, "server": f"127.0.0.1:{port}", "output_dir": tmp_path / "out"}
    edge = start("sft_edge", "train", *job.flags(**{**options, "max_steps": 100_000, "save_steps": 1000}))
    wait_for(edge, "step 5/")
    edge.send_signal(signal.SIGSTOP)
    server.send_signal(signal.SIGTERM)
    wait_for(server, '"stopping"')
    server.send_signal(signal.SIGTERM)
    assert server.wait(SECONDS) == 0
    edge.send_signal(signal.SIGCONT)


@pytest.mark.slow
def test_a_whole_group_of_processes(job: Job, model: Path, tmp_path: Path) -> None:
    """As a service manager or a container's end has it: those that load data get the signal, too."""
    options = {**STEADY, "model": model, "mode": "local", "output_dir": tmp_path / "out", "dataloader_num_workers": 2}
    # Every epoch ends the workers of the one before: this one does not end in the test.
    options.update(max_steps=100_000, per_device_train_batch_size=1, logging_steps=1, max_train_samples=None)
    edge = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED_IN_A_STEP, "train", *job.flags(**options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        told, errors = edge.communicate(timeout=SECONDS)
    finally:
        if edge.poll() is None:
            os.killpg(edge.pid, signal.SIGKILL)
            edge.communicate()
    assert edge.returncode == 0, errors
    assert told.startswith(f"stopped after step 5, which is saved in {tmp_path / 'out' / 'checkpoint-5'}")


SIGNALLED_IN_A_STEP = """
import multiprocessing, subprocess, sys
from sft_edge.cli import main
from sft_edge.systems.local import LocalSystem

def update(self, step, scale, update=LocalSystem.update):
    update(self, step, scale)
    if step == 4:
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        subprocess.run(["sh", "-c", "kill -TERM 0"])  # not by the process whose children they are
        for worker in workers:
            worker.join(0.5)  # as long as it takes to die of it

LocalSystem.update = update
sys.exit(main(sys.argv[1:]))
"""
