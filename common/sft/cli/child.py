"""Command lines in other processes of this Python."""

from __future__ import annotations

import sys
from typing import List

_PROGRAM = """\
import sys
sys.path[:1] = [place for place in sys.path[:1] if place]
from {module} import main
{run}
"""
"""With `-c` the first place that Python imports from is the working folder, empty text: what stands there by a name of
Python's own would be run. `-P` is of Python 3.11, and `-I` leaves out what the environment names."""

_DELETING = """\
import shutil
place = sys.argv.pop(1)
try:
    code = main()
finally:
    shutil.rmtree(place, ignore_errors=True)
sys.exit(code)
"""


def python_command(module: str, deletes: str = "") -> List[str]:
    """Runs `main` of a module as its console script would: without the working folder among what it imports from.

    `deletes`: a directory that is gone when that has ended, whoever else is alive then.
    """
    run = _DELETING if deletes else "sys.exit(main())"
    return [sys.executable, "-c", _PROGRAM.format(module=module, run=run), *([deletes] if deletes else [])]
