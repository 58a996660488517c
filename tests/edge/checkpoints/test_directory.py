"""The edge's halves of checkpoints as directories, without a run: written, found, and deleted."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Dict, Iterator, List

import pytest

from sft.errors import CheckpointError, StorageError, UsageError
from sft.tensors.manifest import MANIFEST_FILE
from sft_edge.checkpoints import directory as checkpoints_module
from sft_edge.checkpoints.directory import (
    EdgeCheckpoint,
    check_hashes,
    checkpoints_in,
    foreign,
    only_run_in,
    open_checkpoint,
    remove_all_but,
    remove_others,
    write_checkpoint,
)

RUN = "0" * 32
SECONDS = 30


def write(directory: Path, step: int, **files: bytes) -> EdgeCheckpoint:
    chunks = {f"{name}.bin": [data] for name, data in (files or {"a": b"one"}).items()}
    return write_checkpoint(directory, RUN, step, "a" * 64, chunks)


def steps(directory: Path) -> List[int]:
    return [checkpoint.step for checkpoint in checkpoints_in(directory)]


def content(checkpoint: EdgeCheckpoint) -> Dict[str, bytes]:
    check_hashes(checkpoint)
    return {name: (checkpoint.directory / name).read_bytes() for name in checkpoint.manifest.files}


def test_what_is_written_is_found(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert checkpoints_in(out) == []
    for step in (10, 100, 20):
        written = write(out, step, a=b"of %d" % step, b=b"")
        assert written == open_checkpoint(out / f"checkpoint-{step}")
    assert steps(out) == [100, 20, 10]
    newest = checkpoints_in(out)[0]
    assert content(newest) == {"a.bin": b"of 100", "b.bin": b""}
    assert (newest.manifest.run_id, newest.manifest.other_half) == (RUN, "a" * 64)
    assert sorted(os.listdir(str(out))) == ["checkpoint-10", "checkpoint-100", "checkpoint-20"]


def test_what_lacks_bytes_is_none(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    (tmp_path / "checkpoint-20" / "a.bin").write_bytes(b"on")
    (tmp_path / "checkpoint-30" / "a.bin").unlink()
    (tmp_path / "checkpoint-40" / MANIFEST_FILE).write_bytes(b"{")
    (tmp_path / "checkpoint-50").mkdir()
    (tmp_path / "checkpoint-x").write_bytes(b"")
    assert steps(tmp_path) == [10]
    for step, told in (
        (20, "a.bin has 2 bytes, not 3"),
        (30, "No such file"),
        (40, "not the manifest"),
        (50, "No such"),
    ):
        with pytest.raises(CheckpointError, match=told):
            open_checkpoint(tmp_path / f"checkpoint-{step}")


def test_other_bytes_are_noticed_by_their_hash(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 10)
    (checkpoint.directory / "a.bin").write_bytes(b"two")
    assert steps(tmp_path) == [10]
    with pytest.raises(CheckpointError, match=r"a.bin is not what was written; delete the directory"):
        check_hashes(checkpoint)


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"format": 9}', "null", "x", "[" * 10_000])
def test_a_manifest_that_makes_no_sense(tmp_path: Path, manifest: str) -> None:
    checkpoint = write(tmp_path, 10)
    (checkpoint.directory / MANIFEST_FILE).write_text(manifest)
    with pytest.raises(CheckpointError, match="not the manifest of a checkpoint"):
        open_checkpoint(checkpoint.directory)


@pytest.mark.parametrize("name", ["../a.bin", ".a", "a/b", ""])
def test_a_manifest_names_no_path(tmp_path: Path, name: str) -> None:
    checkpoint = write(tmp_path, 10)
    path = checkpoint.directory / MANIFEST_FILE
    path.write_text(path.read_text().replace("a.bin", name))
    with pytest.raises(CheckpointError, match="a file has an odd name"):
        open_checkpoint(checkpoint.directory)


def test_a_step_that_is_written_again_replaces_the_first(tmp_path: Path) -> None:
    write(tmp_path, 10, a=b"first", b=b"first")
    second = write(tmp_path, 10, a=b"second")
    assert content(open_checkpoint(second.directory)) == {"a.bin": b"second"}
    assert os.listdir(str(tmp_path)) == ["checkpoint-10"]
    assert sorted(os.listdir(str(second.directory))) == ["a.bin", MANIFEST_FILE]


def test_what_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, 10, a=b"old")

    def broken() -> Iterator[bytes]:
        yield b"half"
        raise OSError(28, "No space left on device")

    for step in (10, 20):
        with pytest.raises(StorageError, match="No space left on device"):
            write_checkpoint(tmp_path, RUN, step, None, {"a.bin": [b"new"], "b.bin": broken()})
    assert os.listdir(str(tmp_path)) == ["checkpoint-10"]
    assert content(checkpoints_in(tmp_path)[0]) == {"a.bin": b"old"}


class Died(BaseException):
    pass


@pytest.mark.parametrize("call", range(12))
def test_an_edge_that_dies_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """At each call that changes the disk, before it. The step before is whole, and this one is whole or not there."""
    write(tmp_path, 10, a=b"old")
    left = [call]

    def dying(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def instead(*arguments: object, **settings: object) -> object:
            if left[0] == 0:
                raise Died
            left[0] -= 1
            return real(*arguments, **settings)

        patch.setattr(owner, name, instead)

    died = False
    with monkeypatch.context() as patch:
        # The dead do not tidy up.
        rmtree = shutil.rmtree
        patch.setattr(
            checkpoints_module.shutil,
            "rmtree",
            lambda path, **settings: None if left[0] == 0 else rmtree(path, **settings),
        )
        for name in ("write_file", "sync_directory"):
            dying(checkpoints_module, name)
        for name in ("mkdir", "rename"):
            dying(Path, name)
        try:
            write(tmp_path, 20, a=b"new", b=b"new")
        except Died:
            died = True
    assert died or call > 6
    assert content(open_checkpoint(tmp_path / "checkpoint-10")) == {"a.bin": b"old"}
    assert all(content(checkpoint) for checkpoint in checkpoints_in(tmp_path))
    write(tmp_path, 20, a=b"again")
    assert content(checkpoints_in(tmp_path)[0]) == {"a.bin": b"again"}
    assert sorted(os.listdir(str(tmp_path))) == ["checkpoint-10", "checkpoint-20"]


def test_it_dies_often_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the calls that the test above counts there are some, and fewer than it tries."""
    count = [0]

    def counted(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def instead(*arguments: object, **settings: object) -> object:
            count[0] += 1
            return real(*arguments, **settings)

        monkeypatch.setattr(owner, name, instead)

    for name in ("write_file", "sync_directory"):
        counted(checkpoints_module, name)
    for name in ("mkdir", "rename"):
        counted(Path, name)
    write(tmp_path, 20, a=b"new", b=b"new")
    assert 6 <= count[0] < 12


def test_all_but_some_are_deleted(tmp_path: Path) -> None:
    kept = [write(tmp_path, step).directory for step in (10, 20, 30)][1:]
    write_checkpoint(tmp_path, "f" * 32, 40, None, {})
    torn = write(tmp_path, 50)
    (torn.directory / "a.bin").unlink()
    (tmp_path / "checkpoint-of-mine").mkdir()
    (tmp_path / "other").write_bytes(b"")
    remove_all_but(kept, tmp_path)
    assert sorted(os.listdir(str(tmp_path))) == ["checkpoint-20", "checkpoint-30", "checkpoint-of-mine", "other"]


def test_a_directory_is_for_one_run(tmp_path: Path) -> None:
    with only_run_in(tmp_path):
        second = only_run_in(tmp_path)
        with pytest.raises(UsageError, match="another run is writing into it"):
            second.__enter__()
    with only_run_in(tmp_path):
        assert not os.listdir(str(tmp_path))


def test_a_directory_that_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    def fail(and_write: bool) -> None:
        with only_run_in(tmp_path / "runs" / "out"):
            if and_write:
                write(tmp_path / "runs" / "out", 10)
            raise StorageError("nothing comes of it")

    for and_write in (False, True):
        with pytest.raises(StorageError):
            fail(and_write)
        assert (tmp_path / "runs" / "out").exists() is and_write


def test_a_process_that_loads_data_holds_no_lock(tmp_path: Path) -> None:
    """It may live for a while when the run is killed, which is then started again."""
    context = multiprocessing.get_context("fork")
    is_there, may_end = context.Event(), context.Event()

    def load() -> None:
        is_there.set()
        may_end.wait(SECONDS)

    with only_run_in(tmp_path):
        child = context.Process(target=load, daemon=True)
        child.start()
        assert is_there.wait(SECONDS)
        with pytest.raises(UsageError):
            only_run_in(tmp_path).__enter__()
    with only_run_in(tmp_path):
        assert child.is_alive()
    may_end.set()
    child.join(SECONDS)


def test_what_earlier_saves_began_is_deleted(tmp_path: Path) -> None:
    kept = write(tmp_path, 20)
    for name in (".checkpoint-10.partial", ".checkpoint-30.replaced", ".checkpoint-of-mine.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.bin").write_bytes(b"one")
    remove_all_but([kept.directory], tmp_path)
    assert sorted(os.listdir(str(tmp_path))) == [".checkpoint-of-mine.partial", "checkpoint-20"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_what_breaks_off_between_the_two_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """The step is saved once more, the first one has made way, and the second cannot take its place."""
    write(tmp_path, 10, a=b"first")
    rename, renamed = Path.rename, []

    def breaking(self: Path, target: Path) -> Path:
        renamed.append(self.name)
        if self.name.endswith(".partial"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", breaking)
    with pytest.raises((StorageError, KeyboardInterrupt)):
        write(tmp_path, 10, a=b"second")
    assert renamed == ["checkpoint-10", ".checkpoint-10.partial", ".checkpoint-10.replaced"]
    assert content(open_checkpoint(tmp_path / "checkpoint-10")) == {"a.bin": b"first"}
    assert os.listdir(str(tmp_path)) == ["checkpoint-10"]


# What is not ours.


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A directory with what else may be called a checkpoint: another trainer's, a file, and links to one of ours."""
    out = tmp_path / "out"
    (out / "checkpoint-500").mkdir(parents=True)
    (out / "checkpoint-500" / "trainer_state.json").write_text("{}")
    (out / "checkpoint-600").write_text("a file")
    elsewhere = write(tmp_path / "elsewhere", 1)
    (out / "checkpoint-1").symlink_to(elsewhere.directory)
    (out / "checkpoint-2").mkdir()
    (out / "checkpoint-2" / MANIFEST_FILE).symlink_to(elsewhere.directory / MANIFEST_FILE)
    return out


def test_it_is_not_deleted(theirs: Path, tmp_path: Path) -> None:
    before = sorted(theirs.rglob("*"))
    write(theirs, 10)
    remove_others("f" * 32, theirs)
    remove_all_but([], theirs)
    assert sorted(theirs.rglob("*")) == before
    assert sorted(foreign(theirs)) == [1, 2, 500, 600]
    assert content(open_checkpoint(tmp_path / "elsewhere" / "checkpoint-1")) == {"a.bin": b"one"}


@pytest.mark.parametrize("step", [1, 2, 500, 600])
def test_it_is_not_replaced(theirs: Path, tmp_path: Path, step: int) -> None:
    before = sorted(theirs.rglob("*"))
    with pytest.raises(StorageError, match=f"checkpoint-{step} is in the way: it is no checkpoint of a run of ours"):
        write(theirs, step)
    assert sorted(theirs.rglob("*")) == before
    assert content(open_checkpoint(tmp_path / "elsewhere" / "checkpoint-1")) == {"a.bin": b"one"}


def test_what_somebody_keeps_in_a_checkpoint_of_ours_stays(tmp_path: Path) -> None:
    (write(tmp_path, 10).directory / "notes.txt").write_text("good one")
    remove_all_but([], tmp_path)
    assert os.listdir(str(tmp_path / "checkpoint-10")) == ["notes.txt"]
