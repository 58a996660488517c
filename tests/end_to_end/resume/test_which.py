"""From which checkpoint a run goes on where there are several, and which are deleted."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import error_line, read_json
from support.resuming import Clouds, Outcome, PowerCut, steps_in

from sft.errors import StorageError
from sft_cloud.storage.files import LocalFiles
from sft_edge.checkpoints import policy as checkpointing_module
from sft_edge.checkpoints.directory import only_run_in


def cut() -> None:
    raise PowerCut


@pytest.mark.parametrize("side", ["edge", "cloud"])
def test_the_one_that_is_named_and_no_other(
    run: Callable[..., int], clouds: Clouds, out: Path, side: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it is torn nothing older is taken instead."""
    assert run() == 0
    run_id = read_json(out / "checkpoint-4" / "manifest.json")["run_id"]
    (half,) = [out / "checkpoint-4"] if side == "edge" else clouds.store.glob(f"*/{run_id}/4-*")
    path = half / "optimizer.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    capsys.readouterr()
    assert run(resume_from_checkpoint=out / "checkpoint-4") == (4 if side == "edge" else 5)
    line = error_line(capsys.readouterr().err)
    assert ("is not what was written" if side == "edge" else "(the newest: 4)") in line
    assert steps_in(out) == [2, 4, 6]


def test_the_one_that_is_named_in_one_process(
    run: Callable[..., int], out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Elsewhere, while the directory that is written into holds the same step of the same run."""
    assert run(mode="local") == 0
    shutil.copytree(out / "checkpoint-4", tmp_path / "named")
    capsys.readouterr()
    assert run(mode="local", resume_from_checkpoint=tmp_path / "named") == 0
    assert f"going on from step 4, as it is in {tmp_path / 'named'}" in capsys.readouterr().err


@pytest.mark.slow
def test_two_of_one_step(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    tmp_path: Path,
    at_step: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same step, saved twice: the cloud has two halves, each of which fits one of the edge's."""
    expected = whole()
    assert run() == 0
    shutil.copytree(out / "checkpoint-4", tmp_path / "named")
    assert run(resume_from_checkpoint=out / "checkpoint-2") == 0
    manifests = [read_json(place / "manifest.json") for place in (out / "checkpoint-4", tmp_path / "named")]
    assert manifests[0]["other_half"] != manifests[1]["other_half"]
    at_step(5, clouds.replace)
    capsys.readouterr()
    assert run(resume_from_checkpoint=tmp_path / "named") == 0
    assert capsys.readouterr().err.count(f"going on from step 4, as it is in {tmp_path / 'named'}") == 2
    Outcome(out, clouds.store).check_same(expected)


@pytest.mark.first_only
@pytest.mark.parametrize("step", [1, 3])
def test_nothing_of_another_run_is_left_to_be_taken(
    run: Callable[..., int], out: Path, at_step: Callable[..., None], capsys: pytest.CaptureFixture[str], step: int
) -> None:
    """Not even when the run that wrote over it died before its first save."""
    assert run() == 0
    at_step(step, cut)
    with pytest.raises(PowerCut):
        run(overwrite_output_dir=True)
    assert steps_in(out) == ([] if step == 1 else [2])
    capsys.readouterr()
    assert run(resume_from_checkpoint=True) == 0
    assert ("beginning at step 0" if step == 1 else "going on from step 2") in capsys.readouterr().err


def test_a_directory_that_another_run_has_from_the_start(
    run: Callable[..., int], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with only_run_in(out):
        assert run(save_steps=None) == 2
    assert "another run is writing into it" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("side", ["edge", "cloud"])
def test_room_is_made_where_there_is_none(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    side: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """For two halves, and no third: the older of the two that are there makes way."""
    expected = whole(save_total_limit=2)
    owner, name = (checkpointing_module, "write_checkpoint") if side == "edge" else (LocalFiles, "check_room")
    real, refused = getattr(owner, name), []

    def full(*arguments: Any) -> Any:
        halves = list(out.glob("checkpoint-*"))
        if side == "cloud" and halves:
            run_id = read_json(halves[0] / "manifest.json")["run_id"]
            halves = list(clouds.store.glob(f"*/{run_id}/*-*"))
        if len(halves) >= 2:
            refused.append(len(halves))
            raise StorageError("the disk is full")
        return real(*arguments)

    monkeypatch.setattr(owner, name, full)
    assert run(save_total_limit=2) == 0
    assert refused == [2]
    assert "training goes on" not in capsys.readouterr().err
    Outcome(out, clouds.store).check_same(expected)


def test_older_ones_that_cannot_be_deleted(
    run: Callable[..., int], out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new one is saved all the same, and nothing else is said."""

    def refuse(*_: object) -> None:
        raise StorageError("the disk is read-only")

    monkeypatch.setattr(checkpointing_module, "remove_all_but", refuse)
    assert run(save_total_limit=1) == 0
    told = capsys.readouterr().err
    assert "older checkpoints are still there: the disk is read-only" in told
    assert not re.search("no checkpoint of step", told)
    assert steps_in(out) == [2, 4, 6]
