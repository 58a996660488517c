"""Temporary directories go with who made them, or with the next that is made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from sft.files.temporary import TemporaryDirectory

LEAVES = """
import os, signal, sys
from sft.files.temporary import TemporaryDirectory
directory = TemporaryDirectory("sft-test-", sys.argv[1])
open(os.path.join(directory.name, "half of a model"), "w").close()
os.kill(os.getpid(), signal.SIGKILL)
"""


def aged(path: Path) -> None:
    os.utime(str(path), (1, 1))


def test_it_goes_with_the_block(tmp_path: Path) -> None:
    with TemporaryDirectory("sft-test-", tmp_path) as name:
        assert Path(name).is_dir()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", LEAVES, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with TemporaryDirectory("sft-test-", tmp_path):
        assert left.is_dir(), "it may be about to be locked"
    aged(left)
    with TemporaryDirectory("sft-test-", tmp_path):
        assert not left.exists()


def test_what_is_in_use_or_somebody_elses_stays(tmp_path: Path) -> None:
    other, link = tmp_path / "elsewhere", tmp_path / "sft-test-link"
    other.mkdir()
    (other / "kept").touch()
    link.symlink_to(other)
    (tmp_path / "sft-test-file").touch()
    with TemporaryDirectory("sft-test-", tmp_path) as used:
        child = os.dup(os.open(used, os.O_RDONLY))
        os.close(child)
        for path in (Path(used), other, tmp_path / "sft-test-file"):
            aged(path)
        with TemporaryDirectory("sft-test-", tmp_path):
            assert Path(used).is_dir()
            assert (other / "kept").exists()
            assert (tmp_path / "sft-test-file").exists()


def test_a_child_that_inherits_the_lock_holds_it(tmp_path: Path) -> None:
    directory = TemporaryDirectory("sft-test-", tmp_path)
    name = Path(directory.name)
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=[directory.lock]
    ) as child:
        os.close(directory.lock)  # as if this process had been killed
        directory.lock = -1
        aged(name)
        with TemporaryDirectory("sft-test-", tmp_path):
            assert name.is_dir()
        assert child.stdin is not None
        child.stdin.close()
    with TemporaryDirectory("sft-test-", tmp_path):
        assert not name.exists()
    directory.cleanup()  # where somebody else has deleted it
