"""Runs that are broken off and go on: the bits of one that was not, of both halves and of all that was noted."""

from __future__ import annotations

import hashlib
import itertools
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.jobs import STEADY, Job, error_line, read_json, same_bits, weights_of

from sft.errors import StorageError
from sft_cloud.checkpoint_files import LocalFiles
from sft_cloud.serve import CloudServer
from sft_edge import checkpointing as checkpointing_module
from sft_edge.cli import main
from sft_edge.recovery import Recovery
from sft_edge.split_system import SplitSystem

STEPS = 7
OPTIONS = {**STEADY, "max_steps": STEPS, "save_steps": 2, "reconnect_backoff": "1ms"}
SECONDS = 60


class PowerCut(BaseException):
    """The edge is gone, without a chance to do anything."""


class Clouds:
    """Servers on one port, one after the other, which share a store of checkpoints and nothing else."""

    def __init__(self, directory: Path) -> None:
        self.store = directory / "store"
        self._directory = directory
        self._states = itertools.count()
        self.server = self._start(0)
        self.address = self.server.address

    def _start(self, port: int) -> CloudServer:
        state = self._directory / f"state-{next(self._states)}"
        return CloudServer(
            "127.0.0.1", port, torch.device("cpu"), state, None, 2, threads=1, checkpoint_store=self.store
        )

    def replace(self) -> None:
        """Another host takes the place of this one, which had no chance to do anything."""
        self.server.stop(grace_seconds=0)
        self.server = self._start(self.server.port)


@pytest.fixture
def clouds(tmp_path: Path) -> Iterator[Clouds]:
    made = Clouds(tmp_path / "clouds")
    yield made
    made.server.stop(grace_seconds=0)


@pytest.fixture
def run(job: Job, model: Path, tmp_path: Path, clouds: Clouds) -> Callable[..., int]:
    """`run(**options)` into `tmp_path / "out"`; gives the exit code."""

    def train(**options: object) -> int:
        values = {"model": model, "output_dir": tmp_path / "out", "server": clouds.address, **OPTIONS, **options}
        if values.get("mode") == "local":
            values["server"] = None
        return main(["train", *job.flags(**values)])

    return train


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


class Outcome:
    """All that a run leaves, but what depends on the time it took."""

    def __init__(self, output_dir: Path, store: Path) -> None:
        self.weights = weights_of(output_dir)
        state = read_json(output_dir / "trainer_state.json")
        timed = ("eval_runtime", "eval_samples_per_second")
        self.history = [{n: v for n, v in entry.items() if n not in timed} for entry in state.pop("log_history")]
        self.state = state
        results = read_json(output_dir / "all_results.json")
        self.results = {name: results[name] for name in ("train_loss", "train_steps", "train_samples", "eval_accuracy")}
        self.payload = [results[f"wire_payload_bytes_{way}"] for way in ("sent", "received")]
        self.checkpoints: dict[str, torch.Tensor] = {}
        for step in steps_in(output_dir):
            edge = output_dir / f"checkpoint-{step}"
            other_half = read_json(edge / "manifest.json")["other_half"]
            halves = [edge, *(half for half in store.glob(f"*/*/{step}-*") if hash_of(half) == other_half)]
            assert len(halves) == (1 if other_half is None else 2)
            for path in [half / name for half in halves for name in ("net_1", "net_2", "optimizer")]:
                file = path.with_suffix(".safetensors")
                if file.exists():
                    side = "edge" if path.parent.parent == output_dir else "cloud"
                    for name, tensor in load_file(file).items():
                        self.checkpoints[f"{side} {step} {path.stem} {name}"] = tensor

    def check_same(self, other: Outcome) -> None:
        assert self.history == other.history
        assert self.state == other.state
        assert self.results == other.results
        assert self.payload == other.payload
        assert same_bits(self.weights, other.weights)
        assert same_bits(self.checkpoints, other.checkpoints)
        assert self.checkpoints


def hash_of(half: Path) -> str:
    return hashlib.sha256((half / "manifest.json").read_bytes()).hexdigest()


def steps_in(output_dir: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in output_dir.glob("checkpoint-*"))


@pytest.fixture
def whole(run: Callable[..., int], clouds: Clouds, tmp_path: Path) -> Callable[..., Outcome]:
    """What a run leaves that nothing disturbs."""

    def train(**options: object) -> Outcome:
        assert run(output_dir=tmp_path / "whole", **options) == 0
        return Outcome(tmp_path / "whole", clouds.store)

    return train


KINDS: list[dict[str, object]] = [
    {"mode": "local"},
    {"mode": "local", "split_layer": None, "lora_r": 2, "lora_dropout": 0.1},
    {"mode": "sl"},
    {},
    {"labels": "local"},
    {"wire_dtype": "bfloat16", "gradient_accumulation_steps": 2},
    {"lora_r": 2, "lora_dropout": 0.1, "lora_half": "both"},
    {"freeze_edge": True},
    {"residual": "low-rank", "optim": "SGD", "optim_args": "momentum=0.9"},
    {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 3},
    {"eval_strategy": "epoch", "dataloader_num_workers": 1, "lr_scheduler_type": "cosine", "save_total_limit": 1},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_an_edge_that_is_cut_off_and_started_again(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    at_step: Callable[[int, Callable[[], object]], None],
    options: dict[str, object],
) -> None:
    expected = whole(**options)

    def cut() -> None:
        raise PowerCut

    at_step(5, cut)
    with pytest.raises(PowerCut):
        run(**options)
    assert steps_in(out) == ([4] if "save_total_limit" in options else [2, 4])
    if options.get("mode") != "local":
        clouds.replace()
    assert run(**options, resume_from_checkpoint=True) == 0
    Outcome(out, clouds.store).check_same(expected)


def test_from_any_step_again(
    run: Callable[..., int], whole: Callable[..., Outcome], clouds: Clouds, out: Path, tmp_path: Path
) -> None:
    """Named on the command line, into the same directory and into another one."""
    expected = whole()
    assert run() == 0
    for step in (2, 6):
        assert run(resume_from_checkpoint=out / f"checkpoint-{step}", output_dir=None) == 0
        Outcome(out, clouds.store).check_same(expected)
    assert run(resume_from_checkpoint=out / "checkpoint-4", output_dir=tmp_path / "other") == 0
    assert same_bits(weights_of(tmp_path / "other"), expected.weights)
    assert steps_in(tmp_path / "other") == [6]
    run_id = read_json(out / "checkpoint-4" / "manifest.json")["run_id"]
    assert {path.name.partition("-")[0] for path in clouds.store.glob(f"*/{run_id}/*")} == {"4", "6"}


def test_one_command_for_ever(
    run: Callable[..., int], whole: Callable[..., Outcome], clouds: Clouds, out: Path, capsys
) -> None:
    expected = whole()
    assert run(resume_from_checkpoint=True) == 0
    assert f"no checkpoint in {out} yet: beginning at step 0" in capsys.readouterr().err
    Outcome(out, clouds.store).check_same(expected)
    assert run(resume_from_checkpoint=True) == 0
    assert f"going on from step 6, as it is in {out / 'checkpoint-6'}" in capsys.readouterr().err
    Outcome(out, clouds.store).check_same(expected)


# What dies, and when.

POINTS = ("asked", "cloud saved", "edge saved", "cloud tidied", "edge tidied")
"""Of one save, in order; docs/checkpoints.md has what each leaves behind."""


@pytest.fixture
def at_point(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str, Callable[[], object]], list[str]]:
    """`at_point(2, "edge saved", act)` calls `act`, once, when the second save has got there; gives what was passed."""

    def install(save: int, point: str, act: Callable[[], object]) -> list[str]:
        passed: list[str] = []

        def reached(here: str) -> None:
            passed.append(here)
            if here == point and passed.count(point) == save:
                act()

        def around(owner: Any, name: str, before: str, after: str) -> None:
            real = getattr(owner, name)

            def instead(*arguments: Any) -> Any:
                if before:
                    reached(before)
                result = real(*arguments)
                reached(after)
                return result

            monkeypatch.setattr(owner, name, instead)

        around(SplitSystem, "save_other_half", "asked", "cloud saved")
        around(checkpointing_module, "write_checkpoint", "", "edge saved")
        around(SplitSystem, "keep_checkpoints", "", "cloud tidied")
        around(checkpointing_module, "remove_all_but", "", "edge tidied")
        return passed

    return install


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("limit", [1, None])
def test_the_edge_dies_in_the_middle_of_a_save(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    at_point: Callable[..., list[str]],
    point: str,
    limit: int | None,
) -> None:
    """Wherever it was: a step that both sides have whole is left, and it is the newest that could be."""
    expected = whole(save_total_limit=limit)

    def cut() -> None:
        raise PowerCut

    passed = at_point(2, point, cut)
    with pytest.raises(PowerCut):
        run(save_total_limit=limit)
    assert passed[-1] == point
    assert max(steps_in(out)) == (2 if point in POINTS[:2] else 4)
    clouds.replace()
    assert run(save_total_limit=limit, resume_from_checkpoint=True) == 0
    assert read_json(out / "all_results.json")["recoveries"] == 0
    Outcome(out, clouds.store).check_same(expected)


@pytest.mark.parametrize("point", POINTS)
def test_the_cloud_dies_in_the_middle_of_a_save(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    at_point: Callable[..., list[str]],
    point: str,
) -> None:
    """The edge notices with its next message, and goes on without being started again."""
    expected = whole(save_total_limit=1)
    passed = at_point(2, point, clouds.replace)
    assert run(save_total_limit=1) == 0
    assert point in passed
    results = read_json(out / "all_results.json")
    assert results["recoveries"] == 1
    # A half of the cloud's that is saved is as good as a server that lives: the edge's can still be added.
    assert results["steps_recomputed"] == (2 if point == "asked" else 0)
    Outcome(out, clouds.store).check_same(expected)


def test_a_cloud_that_dies_again_and_again(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also before there is a checkpoint at all: then the run begins anew."""
    expected = whole()
    dies_after = {1, 3, 4, 6}

    def update(self: SplitSystem, index: int, scale: float, update: Any = SplitSystem.update) -> None:
        update(self, index, scale)
        if index + 1 in dies_after:
            dies_after.remove(index + 1)
            clouds.replace()

    monkeypatch.setattr(SplitSystem, "update", update)
    assert run() == 0
    assert not dies_after
    results = read_json(out / "all_results.json")
    assert (results["recoveries"], results["steps_recomputed"]) == (4, 1 + 1 + 2 + 2)
    told = capsys.readouterr().err
    assert told.count(": going on in another session") == 4
    assert "going on from step 2, as it is in" in told
    Outcome(out, clouds.store).check_same(expected)


def test_without_checkpoints_a_lost_session_ends_the_run(
    run: Callable[..., int], clouds: Clouds, out: Path, at_step: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(3, clouds.replace)
    assert run(save_steps=None) == 5
    assert "there is no such session on this server" in error_line(capsys.readouterr().err)
    assert steps_in(out) == []


def test_a_cloud_of_its_own_that_is_killed(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    out: Path,
    at_step: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A child of the edge: another is started, with the same store."""
    from sft_edge import opening
    from sft_edge.cloud_process import CloudProcess

    expected = whole()
    children: list[CloudProcess] = []

    class Remembered(CloudProcess):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            children.append(self)

    monkeypatch.setattr(opening, "CloudProcess", Remembered)
    at_step(5, lambda: children[0]._child.kill())
    assert run(server=None) == 0
    assert len(children) == 2
    assert "the cloud process was killed by signal 9" in capsys.readouterr().err
    Outcome(out, out / "cloud-checkpoints").check_same(expected)


# SIGTERM.


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def default_sigterm() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("default_sigterm")
@pytest.mark.parametrize("mode", ["local", "sft"])
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


# What is refused.


def test_another_run_is_refused_by_name(
    run: Callable[..., int], clouds: Clouds, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(max_steps=3) == 0
    for changes, said in (
        ({"split_rank": 2}, "--split-rank 4, now it is 2"),
        ({"mode": "sl"}, "--mode sft, now it is sl"),
        ({"seed": 8}, "--seed 7, now it is 8"),
        ({"max_steps": 9}, "--max-steps 3, now it is 9"),
        ({"optim": "SGD"}, "--optim AdamW, now it is SGD"),
    ):
        capsys.readouterr()
        assert run(**{"max_steps": 3, "resume_from_checkpoint": True, **changes}) == 2
        line = error_line(capsys.readouterr().err)
        assert line.startswith(f"{out / 'checkpoint-2'} was trained with {said}"), line
    assert run(max_steps=3, resume_from_checkpoint=True, max_train_samples=9) == 2
    assert steps_in(out) == [2]


def test_a_checkpoint_that_is_not_there(run: Callable[..., int], out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(resume_from_checkpoint=out / "checkpoint-2") == 4
    assert error_line(capsys.readouterr().err).startswith(f"{out / 'checkpoint-2'}: no whole checkpoint")


def test_a_cloud_that_lost_its_half(
    run: Callable[..., int], clouds: Clouds, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(max_steps=5) == 0
    shutil.rmtree(clouds.store)
    capsys.readouterr()
    assert run(max_steps=5, resume_from_checkpoint=True) == 5
    assert "has no whole checkpoint of the run at a step that the edge has (the newest: 2, 4)" in error_line(
        capsys.readouterr().err
    )


@pytest.mark.parametrize("side", ["edge", "cloud"])
def test_a_newest_half_that_is_torn(
    run: Callable[..., int], whole: Callable[..., Outcome], clouds: Clouds, out: Path, side: str
) -> None:
    """The step before is taken."""
    expected = whole()
    assert run() == 0
    run_id = read_json(out / "checkpoint-6" / "manifest.json")["run_id"]
    (half,) = [out / "checkpoint-6"] if side == "edge" else clouds.store.glob(f"*/{run_id}/6-*")
    path = half / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (out / "all_results.json").unlink()
    assert run(resume_from_checkpoint=True) == 0
    Outcome(out, clouds.store).check_same(expected)


def test_halves_of_two_time_lines(
    run: Callable[..., int], clouds: Clouds, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The edge's half of one run beside the cloud's of another, which has the same steps."""
    assert run(max_steps=2) == 0
    assert run(max_steps=2, output_dir=tmp_path / "other") == 0
    mine, other = (read_json(place / "checkpoint-2" / "manifest.json") for place in (out, tmp_path / "other"))
    assert mine["run_id"] != other["run_id"]
    path = out / "checkpoint-2" / "manifest.json"
    path.write_text(path.read_text().replace(mine["run_id"], other["run_id"]))
    capsys.readouterr()
    assert run(max_steps=2, resume_from_checkpoint=True) == 5
    assert "has no whole checkpoint" in error_line(capsys.readouterr().err)


# Disks that are full.


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
        if next(calls) == 2:
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
        f"no checkpoint of step 3 could be saved (the disk is full); the newest is {out / 'checkpoint-2'}"
    )
    assert steps_in(out) == [2]
