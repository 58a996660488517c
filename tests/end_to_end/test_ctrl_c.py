"""Ctrl-C, wherever it comes: exit code 130, and the model as of the last step that both sides took."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import STEADY, Job, read_json, same_bits, weights_of

from sft_cloud.session.session import Session
from sft_edge.commands.train import train as train_module
from sft_edge.link import link as link_module
from sft_edge.model_files.saved import load_model
from sft_edge.systems import crossing
from sft_edge.systems import split as split_system

SECONDS = 60


def interrupt() -> None:
    """Ctrl-C, here and now."""
    signal.raise_signal(signal.SIGINT)


@pytest.mark.first_only
@pytest.mark.parametrize("mode", ["sft", "sl", "local"])
def test_ctrl_c_between_steps(
    failing: Callable[..., tuple[int, str]],
    at_step: Callable[[int, Callable[[], object]], None],
    job: Job,
    model: Path,
    first_steps: Callable[..., dict[str, torch.Tensor]],
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
    assert same_bits(weights_of(tmp_path / "out"), first_steps(4, job, model=model, mode=mode))


@pytest.mark.first_only
@pytest.mark.parametrize(
    ("module", "place"),
    [(split_system, "scale_gradients"), (crossing, "encode_activation"), (crossing, "decode_tensor")],
)
def test_ctrl_c_anywhere_in_a_step(
    failing: Callable[..., tuple[int, str]],
    job: Job,
    model: Path,
    first_steps: Callable[..., dict[str, torch.Tensor]],
    tmp_path: Path,
    at_call: Callable[..., None],
    module: Any,
    place: str,
) -> None:
    """After the commit was handed to the link, before a micro-batch is sent, and after it was answered."""
    at_call(4, module, place, interrupt)
    assert failing()[0] == 130
    steps = read_json(tmp_path / "out" / "trainer_state.json")["global_step"]
    assert steps == (4 if place == "scale_gradients" else 3)
    assert same_bits(weights_of(tmp_path / "out"), first_steps(steps, job, model=model))


def test_ctrl_c_while_the_cloud_works(
    failing: Callable[..., tuple[int, str]],
    job: Job,
    model: Path,
    first_steps: Callable[..., dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The commit of the step before rides on the message that the cloud works on: it must count."""
    at_work, go_on = threading.Event(), threading.Event()
    waits = iter(range(1000))

    def handle(self, message, *more, handle=Session.handle_in_pieces):
        if message.HasField("forward") and message.step == 3 and not at_work.is_set():
            assert message.HasField("commit")
            at_work.set()
            assert go_on.wait(SECONDS), "nobody waits for what is under way"
        return (yield from handle(self, message, *more))

    def until_answered(self, until_answered=link_module.PendingReply.wait):
        wait = next(waits)
        if wait == 3:
            assert at_work.wait(SECONDS)
            interrupt()
        if wait > 3:
            go_on.set()
        return until_answered(self)

    monkeypatch.setattr(Session, "handle_in_pieces", handle)
    monkeypatch.setattr(link_module.PendingReply, "wait", until_answered)
    assert failing()[0] == 130
    assert read_json(tmp_path / "out" / "trainer_state.json")["global_step"] == 3
    assert same_bits(weights_of(tmp_path / "out"), first_steps(3, job, model=model))


def test_ctrl_c_in_the_last_evaluation(
    failing: Callable[..., tuple[int, str]],
    job: Job,
    model: Path,
    first_steps: Callable[..., dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hours of training are not lost because somebody did not want to wait for the score."""

    def evaluate(*arguments: object) -> None:
        interrupt()

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate", evaluate)
        assert failing(max_steps=3)[0] == 130
    assert same_bits(weights_of(tmp_path / "out"), first_steps(3, job, model=model))


@pytest.mark.slow
def test_ctrl_c_for_a_process(
    job: Job, model: Path, cloud: str, first_steps: Callable[..., dict[str, torch.Tensor]], tmp_path: Path
) -> None:
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
    assert same_bits(weights_of(tmp_path / "out"), first_steps(steps, job, model=model))
