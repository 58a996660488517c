"""Commands in an environment that may be another than the tests'."""

from __future__ import annotations

import os
import subprocess
import time
from typing import NamedTuple


class Finished(NamedTuple):
    """A command that succeeded."""

    stdout: str
    seconds: float
    """from its start to its end, Python's imports included"""


class Interpreter:
    """A Python, with variables of its own beside those of this process."""

    def __init__(self, path: str, **variables: str) -> None:
        self.path = path
        self._environment = {**os.environ, **variables}

    def run(self, *arguments: object) -> Finished:
        """Its exit code must be 0."""
        begin = time.perf_counter()
        done = subprocess.run(
            [self.path, *map(str, arguments)],
            capture_output=True,
            env=self._environment,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr
        return Finished(done.stdout, time.perf_counter() - begin)
