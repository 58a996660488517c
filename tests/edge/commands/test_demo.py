"""`sft-edge demo`, which has its runs done by other processes."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from sft_edge.cli import main

RUN = "import os, signal; {}; os.kill(os.getppid(), signal.SIGTERM); signal.pause()"
SAVES = "signal.signal(signal.SIGTERM, lambda *_: os._exit(0))"


@pytest.mark.parametrize(("run", "code"), [(RUN.format(SAVES), 128 + signal.SIGTERM), (RUN.format(0), -signal.SIGTERM)])
def test_a_demo_that_is_terminated_leaves_no_run_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, code: int
) -> None:
    monkeypatch.setattr("sft_edge.commands.demo.python_command", lambda module: [sys.executable, "-c", run])
    assert main(["demo", "--output-dir", str(tmp_path / "demo")]) == code
