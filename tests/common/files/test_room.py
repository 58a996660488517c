"""Room on a disk, for a place that may not be there yet."""

import os
import shutil
from pathlib import Path

import pytest

from sft.files.room import free_bytes, nearest_existing


def test_the_nearest_place_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert nearest_existing(tmp_path) == tmp_path
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path
    assert nearest_existing(tmp_path / "file" / "x") == tmp_path / "file"
    monkeypatch.chdir(tmp_path)
    assert nearest_existing(Path("a/b")) == Path(".")
    assert nearest_existing(Path(os.sep)) == Path(os.sep)


def test_room_is_that_of_the_disk_to_be_written_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(path: str) -> object:
        asked.append(path)
        return real(path)._replace(free=1000)

    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert free_bytes(tmp_path / "runs" / "one") == 1000
    assert asked == [str(tmp_path)]
