"""An edge that leaves, and comes back for the result: the bits of a run that stayed, whatever happens meanwhile."""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.jobs import Job, error_line, read_json, same_bits
from support.resuming import SECONDS, Clouds, Outcome

from sft.errors import StorageError, StreamBrokenError
from sft.v1 import split_training_pb2 as pb
from sft_cloud.engine.in_process import InProcessEngine
from sft_cloud.session.session import Session
from sft_cloud.session.upper_half import TransformersUpperHalf
from sft_edge.cli import main
from sft_edge.link.reliable_stream import ReliableStream
from sft_edge.systems.ahead import StepOnItsWay
from sft_edge.systems.split import SplitSystem

LEAVES = {
    "freeze_edge": True,
    "activations": "keep-on-cloud",
    "mode": "sl",
    "max_train_samples": 7,
    "per_device_train_batch_size": 3,
    "save_steps": None,
    "max_steps": 8,
}
"""Three steps an epoch; the cloud has all rows after the third."""


def check_same(out: Path, other: Path, store: Path) -> None:
    one, two = Outcome(out, store), Outcome(other, store)
    assert one.history == two.history
    assert one.state == two.state
    assert one.results == two.results
    assert one.payload == two.payload
    assert same_bits(one.weights, two.weights)


class Alone:
    """What the cloud does while nobody is there, and an event when it has had message `until`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.until, self.done, self.numbers = 0, threading.Event(), []
        right = InProcessEngine.handle

        def handle(engine, session_id, message, remembered_bytes):
            handled = right(engine, session_id, message, remembered_bytes)
            self.numbers.append(message.number)
            if message.number == self.until:
                self.done.set()
            return handled

        monkeypatch.setattr(InProcessEngine, "handle", handle)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Alone:
    return Alone(monkeypatch)


def wait_for(alone: Alone, out: Path) -> None:
    """Until the cloud has done all that was left."""
    alone.until = read_json(out / "detached.json")["left"]["last"]
    assert alone.until in alone.numbers or alone.done.wait(SECONDS)


@pytest.mark.first_only
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eval_strategy": "epoch", "gradient_accumulation_steps": 2, "max_steps": 5},
        {"eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=["plain", "epochs", "steps"],
)
def test_the_bits_are_those_of_a_run_that_stayed(
    run: Callable[..., int],
    clouds: Clouds,
    out: Path,
    tmp_path: Path,
    alone: Alone,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, object],
) -> None:
    values = {**LEAVES, **options}
    assert run(**values, output_dir=tmp_path / "stayed") == 0
    capsys.readouterr()
    assert run(**values, detach=True) == 0
    steps = 2 if "gradient_accumulation_steps" in options else 3
    assert (
        f"after step {steps} the cloud goes on alone: sft-edge attach {out} has the result" in capsys.readouterr().out
    )
    assert (out / "detached.json").stat().st_mode & 0o077 == 0
    assert not (out / "model.safetensors").exists()
    wait_for(alone, out)
    assert len(clouds.server.sessions) == 1
    alone.numbers.clear()
    assert main(["attach", str(out)]) == 0
    assert alone.numbers == [], "all was done before it came"
    check_same(out, tmp_path / "stayed", clouds.store)
    assert not (out / "detached.json").exists()
    assert len(clouds.server.sessions) == 0


@pytest.mark.slow
def test_an_edge_that_comes_back_at_once(run: Callable[..., int], clouds: Clouds, out: Path, tmp_path: Path) -> None:
    assert run(**LEAVES, output_dir=tmp_path / "stayed") == 0
    assert run(**LEAVES, detach=True) == 0
    assert main(["attach", "--output-dir", str(out)]) == 0
    check_same(out, tmp_path / "stayed", clouds.store)


def test_a_server_that_is_replaced_while_nobody_is_there(
    run: Callable[..., int], clouds: Clouds, out: Path, tmp_path: Path, alone: Alone
) -> None:
    assert run(**LEAVES, output_dir=tmp_path / "stayed") == 0
    assert run(**LEAVES, detach=True) == 0
    wait_for(alone, out)
    clouds.replace()
    assert main(["attach", str(out)]) == 0
    assert read_json(out / "all_results.json")["recoveries"] == 1
    check_same(out, tmp_path / "stayed", clouds.store)


@pytest.mark.slow
def test_an_edge_that_is_interrupted_when_it_is_back(
    run: Callable[..., int], clouds: Clouds, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cloud goes on, and it may come back once more."""
    assert run(**LEAVES, output_dir=tmp_path / "stayed") == 0
    assert run(**LEAVES, detach=True) == 0
    right, fired = StepOnItsWay.settle, []

    def interrupted(self):
        if self.number == 5 and not fired:
            fired.append(self.number)
            raise KeyboardInterrupt
        return right(self)

    monkeypatch.setattr(StepOnItsWay, "settle", interrupted)
    assert main(["attach", str(out)]) == 130
    assert fired == [5]
    assert (out / "detached.json").exists()
    assert main(["attach", str(out)]) == 0
    check_same(out, tmp_path / "stayed", clouds.store)


@pytest.mark.slow
def test_a_cloud_that_does_not_go_on_alone(
    run: Callable[..., int],
    clouds: Clouds,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run stays, and says so."""
    assert run(**LEAVES, output_dir=tmp_path / "stayed") == 0
    with monkeypatch.context() as patched:
        patched.setattr("sft_cloud.service.absent.Mailbox", refuses)
        assert run(**LEAVES, detach=True) == 0
    assert "cannot leave after step 3: there is no room; staying" in capsys.readouterr().err
    check_same(out, tmp_path / "stayed", clouds.store)
    monkeypatch.setattr(SplitSystem, "can_leave", False)
    assert run(**LEAVES, detach=True, overwrite_output_dir=True) == 0
    check_same(out, tmp_path / "stayed", clouds.store)


def refuses(*arguments: object) -> None:
    from sft_cloud.errors import NoMemoryError

    raise NoMemoryError("there is no room")


def test_a_link_that_breaks_before_the_cloud_has_answered(
    run: Callable[..., int], clouds: Clouds, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cloud goes on at once, and the edge hears that it has left when it is back."""
    assert run(**LEAVES, output_dir=tmp_path / "stayed") == 0
    right, broken = ReliableStream._take, []

    def breaks(self, data: bytes) -> None:
        if pb.CloudMessage.FromString(data).HasField("detached") and not broken:
            broken.append(True)
            raise StreamBrokenError("for a test")
        right(self, data)

    monkeypatch.setattr(ReliableStream, "_take", breaks)
    assert run(**LEAVES, detach=True) == 0
    assert broken
    assert main(["attach", str(out)]) == 0
    check_same(out, tmp_path / "stayed", clouds.store)


@pytest.mark.slow
def test_an_edge_that_comes_back_twice_over_a_bad_link(
    run: Callable[..., int], clouds: Clouds, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was told before the link broke, and before it was stopped, it is told again."""
    assert run(**LEAVES, output_dir=tmp_path / "stayed") == 0
    assert run(**LEAVES, detach=True) == 0
    take, settle, fired = ReliableStream._take, StepOnItsWay.settle, []

    def breaks(self, data: bytes) -> None:
        take(self, data)
        if pb.CloudMessage.FromString(data).HasField("result") and not fired:
            fired.append("link")
            raise StreamBrokenError("for a test")

    def interrupted(self):
        if self.number == 6 and fired == ["link"]:
            fired.append("edge")
            raise KeyboardInterrupt
        return settle(self)

    monkeypatch.setattr(ReliableStream, "_take", breaks)
    monkeypatch.setattr(StepOnItsWay, "settle", interrupted)
    assert main(["attach", str(out)]) == 130
    assert fired == ["link", "edge"]
    assert main(["attach", str(out)]) == 0
    check_same(out, tmp_path / "stayed", clouds.store)


@pytest.mark.slow
def test_a_disk_that_does_not_take_what_is_to_be_written_down(
    run: Callable[..., int],
    clouds: Clouds,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The cloud never hears of it, and the run stays, with the learning rates that are its own."""
    options = {**LEAVES, "lr_scheduler_type": "linear"}
    assert run(**options, output_dir=tmp_path / "stayed") == 0

    def full(*arguments: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr("sft_edge.commands.train.leaving.write_left", full)
    assert run(**options, detach=True) == 0
    assert "cannot leave after step 3: the disk is full; staying" in capsys.readouterr().err
    check_same(out, tmp_path / "stayed", clouds.store)
    assert len(clouds.server.sessions) == 0


def test_a_step_that_is_undone_while_nobody_is_there(
    run: Callable[..., int], clouds: Clouds, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on from its checkpoint."""
    assert run(**LEAVES, output_dir=tmp_path / "stayed") == 0
    right, struck = Session._check_forward, []

    def full(self, message: pb.EdgeMessage, *arguments):
        work = right(self, message, *arguments)
        if message.step != 5 or struck:
            return work
        struck.append(message.number)
        return self._skips("there is none, for a test")

    monkeypatch.setattr(Session, "_check_forward", full)
    assert run(**LEAVES, detach=True) == 0
    assert main(["attach", str(out)]) == 0
    assert struck
    assert read_json(out / "all_results.json")["recoveries"] == 1
    check_same(out, tmp_path / "stayed", clouds.store)


def test_a_loss_that_is_none_while_nobody_is_there(
    run: Callable[..., int],
    clouds: Clouds,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a run that stayed: no step is taken with it, and the model of the step before is saved."""
    right, losses = TransformersUpperHalf.loss, itertools.count(1)

    def sick(self, *arguments):
        return right(self, *arguments) * (math.nan if next(losses) == 6 else 1.0)

    monkeypatch.setattr(TransformersUpperHalf, "loss", sick)
    assert run(**LEAVES, detach=True) == 0
    capsys.readouterr()
    assert main(["attach", str(out)]) == 6
    line = error_line(capsys.readouterr().err)
    assert line.startswith("the loss is nan at step 6; ")
    assert line.endswith(f"; the model as of step 5 is in {out}")
    assert read_json(out / "trainer_state.json")["global_step"] == 5
    assert list(out.glob("model*.safetensors"))
    assert len(clouds.server.sessions) == 0


@pytest.mark.slow
def test_what_is_made_again_is_not_what_was_left(
    run: Callable[..., int], clouds: Clouds, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a file with rows was changed: the answers are not for these, and the run goes on from its checkpoint."""
    assert run(**LEAVES, output_dir=tmp_path / "stayed") == 0
    assert run(**LEAVES, detach=True) == 0
    content = read_json(out / "detached.json")
    content["left"]["sha256"] = "0" * 64
    (out / "detached.json").write_text(json.dumps(content))
    assert main(["attach", str(out)]) == 0
    assert "what was left to the cloud is not what is made again here" in capsys.readouterr().err
    check_same(out, tmp_path / "stayed", clouds.store)


@pytest.mark.slow
def test_another_run_where_one_has_left(
    run: Callable[..., int], clouds: Clouds, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(**LEAVES, detach=True) == 0
    capsys.readouterr()
    assert run(**LEAVES, resume_from_checkpoint=True) == 2
    assert f"sft-edge attach {out} comes back to it" in error_line(capsys.readouterr().err)
    (out / "detached.json").unlink()
    assert run(**LEAVES, resume_from_checkpoint=True) == 0
    assert run(**LEAVES, output_dir=tmp_path / "stayed") == 0
    check_same(out, tmp_path / "stayed", clouds.store)
    assert len(clouds.server.sessions) == 0, "that which was left has ended, too"


def test_nobody_answers(run: Callable[..., int], clouds: Clouds, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cloud may be at it: what is known of it stays."""
    assert run(**LEAVES, reconnect_timeout="1ms", detach=True) == 0
    clouds.server.stop(grace_seconds=0)
    capsys.readouterr()
    assert main(["attach", str(out)]) == 5
    assert (out / "detached.json").exists()


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"left": {}}', b"\xff"])
def test_nothing_to_come_back_to(content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "detached.json").write_bytes(content)
    assert main(["attach", str(tmp_path)]) == 2
    line = error_line(capsys.readouterr().err)
    assert line.startswith(
        f"{tmp_path} has no detached.json" if content is None else f"{tmp_path}/detached.json is not"
    )


def test_a_file_with_other_numbers(run: Callable[..., int], out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(**LEAVES, detach=True) == 0
    content = read_json(out / "detached.json")
    content["left"]["last"] = content["left"]["number"]
    (out / "detached.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["attach", str(out)]) == 2
    assert "is not what sft-edge train --detach wrote" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"activations": "keep-on-edge"}, "--detach needs --activations keep-on-cloud"),
        ({"labels": "local"}, "--detach needs labels that travel"),
        ({"server": None}, "--detach needs --server"),
    ],
)
def test_what_cannot_leave(
    run: Callable[..., int], options: dict[str, object], line: str, capsys: pytest.CaptureFixture[str], job: Job
) -> None:
    assert run(**{**LEAVES, **options}, detach=True) == 2
    assert error_line(capsys.readouterr().err).startswith(line)
