"""`bench/chaos.py` in small: one edge and one cloud are killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[2] / "bench" / "chaos.py"


@pytest.mark.slow
def test_a_kill_on_either_side() -> None:
    done = subprocess.run([sys.executable, CHAOS, "--kills", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "disturbed run: " in done.stdout
    assert "2 kills" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("the same, bit for bit: 60 losses")
