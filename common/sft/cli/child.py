"""Command lines in other processes of this Python."""

from __future__ import annotations

import sys
from typing import List

_PROGRAM = """\
import sys
sys.path[:1] = [place for place in sys.path[:1] if place]
{first}from {module} import main
{run}
"""
"""With `-c` the first place that Python imports from is the working folder, empty text: what stands there by a name of
Python's own would be run. `-P` is of Python 3.11, and `-I` leaves out what the environment names."""

_ENDING = """\
import os, signal, threading
def end_with_stdin():
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=end_with_stdin, daemon=True).start()
"""
"""Not through sys.stdin: its lock would be held when the interpreter ends."""

_DELETING = """\
import shutil
place = sys.argv.pop(1)
try:
    code = main()
finally:
    shutil.rmtree(place, ignore_errors=True)
sys.exit(code)
"""


def python_command(module: str, deletes: str = "", ends_with_stdin: bool = False) -> List[str]:
    """Runs `main` of a module as its console script would: without the working folder among what it imports from.

    `deletes`: a directory that is gone when that has ended, whoever else is alive then. `ends_with_stdin`: it gets a
    SIGTERM when its standard input ends, as that of a pipe does when whoever holds the other end is killed.
    """
    first, run = _ENDING if ends_with_stdin else "", _DELETING if deletes else "sys.exit(main())"
    program = _PROGRAM.format(first=first, module=module, run=run)
    return [sys.executable, "-c", program, *([deletes] if deletes else [])]
