"""Several command lines in one new process: importing torch and transformers takes seconds in each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PROGRAM = """
import importlib, json, os, sys
module, commands = json.load(sys.stdin)
main = importlib.import_module(module).main
for number, (arguments, variables) in enumerate(commands):
    os.environ.update(variables)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{number}.{name}", os.O_CREAT | os.O_WRONLY), descriptor)
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    with open(f"{number}.code", "w") as file:
        file.write(str(code))
"""


class Told(NamedTuple):
    """What came of a command; all that its process wrote, libraries in C included."""

    code: int
    stdout: str
    stderr: str


def run_each(module: str, commands: list[tuple[list[str], dict[str, str]]], place: Path, seconds: float) -> list[Told]:
    """Runs `module.main` with the arguments of each, one after the other, under its variables and those before it.

    `place` is a directory of this call's own.
    """
    place.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([module, commands]),
        cwd=place,
        env=dict(os.environ),
        text=True,
        capture_output=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr + "".join(path.read_text() for path in sorted(place.glob("*.err")))
    return [
        Told(
            int((place / f"{number}.code").read_text()),
            *((place / f"{number}.{end}").read_text() for end in ("out", "err")),
        )
        for number in range(len(commands))
    ]
