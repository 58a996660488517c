"""How a command's imports are made quicker: in a process of its own, as it is for the whole process."""

import subprocess
import sys

CODE = """
import gc, sys
from sft.cli.imports import imports

try:
    with imports():
        assert not gc.isenabled()
        raise ImportError("broken")
except ImportError:
    assert gc.isenabled()
assert gc.get_freeze_count() == 0

with imports():
    assert not gc.isenabled()
frozen = gc.get_freeze_count()
assert gc.isenabled() and frozen > 0

sys.modules["torch"] = None  # there already: what a program made so far is looked at as before
gc.unfreeze()
with imports():
    assert gc.isenabled()
assert gc.get_freeze_count() == 0
"""


def test_the_collector_waits_for_the_first_imports_only() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
