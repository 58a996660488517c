"""A file is there whole or not at all, and is nobody else's from its first byte on."""

import os
import stat
from pathlib import Path
from typing import List

import pytest

from sft.files.whole import sync_directory, whole_file


def test_a_file_takes_the_place_of_another_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"one ")
        file.write(b"two")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"one two"
    assert os.listdir(str(tmp_path)) == ["file.bin"]


@pytest.mark.parametrize("error", [ValueError("no more"), KeyboardInterrupt(), OSError("disk")])
@pytest.mark.parametrize("there", [True, False])
def test_what_breaks_off_leaves_what_was_there(tmp_path: Path, error: BaseException, there: bool) -> None:
    path = tmp_path / "file.bin"
    if there:
        path.write_bytes(b"old")

    def write() -> None:
        with whole_file(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert os.listdir(str(tmp_path)) == (["file.bin"] if there else [])
    assert not there or path.read_bytes() == b"old"


def test_a_disk_that_fails_at_the_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"), whole_file(tmp_path / "file") as file:
        file.write(b"x")
    assert os.listdir(str(tmp_path)) == []


def test_content_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: List[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle: int) -> None:
        happened.append(f"sync of {os.fstat(handle).st_size}")
        fsync(handle)

    def note_replace(source: str, to: str) -> None:
        happened.append(f"{Path(to).name} appears")
        replace(source, to)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    with whole_file(tmp_path / "file") as file:
        file.write(b"x" * 9)
    assert happened == ["sync of 9", "file appears"]
    sync_directory(tmp_path)
    assert len(happened) == 3


def test_the_mode_counts_from_the_first_byte_on(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        for name, mode, expected in (("secret", 0o600, 0o600), ("public", 0o666, 0o644)):
            with whole_file(tmp_path / name, mode):
                (temporary,) = tmp_path.glob(f".{name}.*")
                assert stat.S_IMODE(temporary.stat().st_mode) == expected
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == expected
    finally:
        os.umask(old)


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path, suffix=".part") as first, whole_file(path, suffix=".part") as second:
        first.write(b"first")
        second.write(b"second")
        names = os.listdir(str(tmp_path))
        assert len(names) == 2
        assert all(name.startswith(".file.") and name.endswith(".part") for name in names)
    assert path.read_bytes() == b"first"  # whose block ended last
    assert os.listdir(str(tmp_path)) == ["file"]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "no" / "file"):
        pass
    with pytest.raises(IsADirectoryError), whole_file(tmp_path / "."):
        pass
    assert os.listdir(str(tmp_path)) == []
