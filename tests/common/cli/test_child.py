"""What another process of this Python imports, and what it leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sft.cli.child import python_command

OWN = "print('somebody else is run')\n"


@pytest.mark.parametrize(
    "start", [python_command("sft_edge.cli"), [sys.executable, "-m", "sft_edge"]], ids=["-c", "-m"]
)
def test_what_stands_in_the_working_folder_is_not_run(tmp_path: Path, start: list) -> None:
    for name in ("argparse", "random", "statistics", "yaml"):
        (tmp_path / f"{name}.py").write_text(OWN)
    done = subprocess.run([*start, "train", "--nothing"], cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


def test_the_directory_goes_whatever_becomes_of_the_command(tmp_path: Path) -> None:
    place = tmp_path / "state"
    for arguments, code in ((["--version"], 0), (["train", "--help"], 0), (["nothing"], 2)):
        place.mkdir()
        (place / "blob").touch()
        command = [*python_command("sft_edge.cli", str(place)), *arguments]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        assert done.returncode == code
        assert not place.exists()
