"""Disks without room: told before training where it can be known, and after it the model goes where there is room."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.jobs import STEADY, Job, error_line, same_bits, weights_of
from support.servers import start_server

from sft_cloud.storage.checkpoints import CheckpointStore
from sft_cloud.storage.files import LocalFiles
from sft_edge.checkpoints.directory import check_hashes, checkpoints_in
from sft_edge.cli import main
from sft_edge.commands.train import train as train_module
from sft_edge.model_files.saved import load_model

SECONDS = 60


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


@pytest.mark.one_in(2)
@pytest.mark.parametrize("leave", [0, 60_000, 120_000, 160_000])
def test_a_disk_that_is_full_at_the_end(
    failing: Callable[..., tuple[int, str]],
    job: Job,
    model: Path,
    first_steps: Callable[..., dict[str, torch.Tensor]],
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
    assert same_bits(weights_of(rescue), first_steps(2, job, model=model))
    load_model(rescue)
    left = [path.name for path in (small_disk / "out").glob("*")]
    assert not [name for name in left if name.startswith(".") or "safetensors" in name or name == "sft.json"]


def test_a_full_disk_and_nowhere_else_to_go(
    failing: Callable[..., tuple[int, str]], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk / "tmp"))  # which is not there

    def evaluate(*arguments, evaluate=train_module.evaluate):
        fill(small_disk, leave=0)
        return evaluate(*arguments)

    monkeypatch.setattr(train_module, "evaluate", evaluate)
    code, line = failing(output_dir=small_disk / "out", max_steps=2)
    assert code == 7
    assert line.endswith("No space left on device; free some space or choose another --output-dir")


def test_a_disk_without_room_from_the_start(failing: Callable[..., tuple[int, str]], small_disk: Path) -> None:
    """Told before hours of training, not after."""
    fill(small_disk, 8192)
    code, line = failing(output_dir=small_disk / "out")
    assert code == 7
    assert re.search(r"the model needs [\d,]+ bytes, the disk has [\d,]+ free", line)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("side", ["edge", "cloud"])
@pytest.mark.parametrize("leave", [0, 20_000, 60_000])
def test_a_disk_that_is_full_when_a_checkpoint_is_saved(
    job: Job,
    model: Path,
    first_steps: Callable[..., dict[str, torch.Tensor]],
    at_step: Callable[[int, Callable[[], object]], None],
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    side: str,
    leave: int,
) -> None:
    """Whichever file does not fit any more: training goes on, and the checkpoint before is whole."""
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    out, store = (
        (small_disk / "out", tmp_path / "store") if side == "edge" else (tmp_path / "out", small_disk / "store")
    )
    monkeypatch.setattr(LocalFiles, "check_room", lambda self, total_bytes: None)  # it was there when it was asked
    server = start_server(tmp_path / "state", 2, checkpoint_store=str(store))
    at_step(3, lambda: fill(small_disk, leave))
    at_step(5, lambda: (small_disk / "filler").unlink())
    options = {**STEADY, "model": model, "output_dir": out, "server": server.address, "save_steps": 2, "max_steps": 5}
    try:
        assert main(["train", *job.flags(**options)]) == 0
    finally:
        server.stop(grace_seconds=0)
    told = capsys.readouterr().err
    assert re.search(r"no checkpoint of step 4: .*No space left on device.*; training goes on", told)
    (checkpoint,) = checkpoints_in(out)
    assert checkpoint.step == 2
    check_hashes(checkpoint)
    wanted = [(2, checkpoint.manifest.other_half or "")]
    with CheckpointStore(store).run("anonymous", checkpoint.manifest.run_id).newest_of(wanted) as files:
        assert files is not None
    halves = [path for path in store.glob("*/*/*") if side == "cloud"] or list(out.glob(".checkpoint*"))
    assert len(halves) == (1 if side == "cloud" else 0), "what was begun is gone"
    assert same_bits(weights_of(out), first_steps(5, job, model=model))


WITH_SMALL_FILES = """
import resource, sys
from sft_edge.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))  # less than the weights
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_no_room_anywhere(job: Job, model: Path, tmp_path: Path) -> None:
    """A limit on the size of files, which temporary ones do not escape either."""
    (tmp_path / "tmp").mkdir()
    options = {"model": model, "output_dir": tmp_path / "out", "mode": "local", "split_layer": None, "max_steps": 1}
    done = subprocess.run(
        [sys.executable, "-c", WITH_SMALL_FILES, "train", *job.flags(**options)],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 7
    assert error_line(done.stderr) == (
        f"cannot write {tmp_path / 'out' / 'model.safetensors'}: File too large; "
        "free some space or choose another --output-dir"
    )
    assert not list((tmp_path / "out").glob("*"))
    assert not list((tmp_path / "tmp").iterdir())
