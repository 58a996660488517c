"""Imports of a command, sooner."""

from __future__ import annotations

import gc
import sys
from contextlib import contextmanager
from typing import Iterator


@contextmanager
def imports() -> Iterator[None]:
    """Around the first import of torch and transformers: the garbage collector waits, and leaves out what they made.

    It would look again and again at hundreds of thousands of objects that all stay, a quarter of a short command's
    time. Where torch is there already, as in a program that calls `main`, nothing is done.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
