"""Running `sft-edge train` as a process of its own and reading what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
SHAPES = Path(__file__).with_name("shapes")


def train(flags: Sequence[str], output_dir: Path, prefix: Sequence[str] = ()) -> dict[str, Any]:
    """One run, its own output left out; returns the content of its all_results.json.

    `prefix` is a command to run it under. Raises CalledProcessError when the run fails, after it has said why.
    """
    own = [f"--output-dir={output_dir}", "--overwrite-output-dir"]
    command = [*prefix, str(BIN / "sft-edge"), "train", *flags, *own]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return read_results(output_dir)


def read_results(output_dir: Path) -> dict[str, Any]:
    """What a run has written of itself."""
    results: dict[str, Any] = json.loads((output_dir / "all_results.json").read_text())
    return results
