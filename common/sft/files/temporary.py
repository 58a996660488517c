"""Temporary directories that do not stay, even where the process that made them is killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Optional, Type, Union

_NEW_SECONDS = 60.0
"""So old a directory is before another process looks whether it is left over: its own has locked it by then."""


class TemporaryDirectory:
    """A new directory, deleted with the block. What was left of such directories by killed processes goes before.

    Who is alive holds a lock on its own; a child that inherits `lock` holds it, too. Raises OSError.
    """

    def __init__(self, prefix: str, parent: Optional[Union[str, Path]] = None) -> None:
        """`prefix`: of nothing but these; `parent`: the system's place for temporary files, unless it is given."""
        place = tempfile.gettempdir() if parent is None else str(parent)
        _delete_left_over(place, prefix)
        self._directory = tempfile.TemporaryDirectory(prefix=prefix, dir=place)
        self.name = self._directory.name
        self.lock = os.open(self.name, os.O_RDONLY)
        """Of the file system; closed with `cleanup`."""
        with suppress(OSError):  # a file system without locks: it is not looked at either
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def cleanup(self) -> None:
        """Deletes it. Idempotent, also where a child has done so."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1
        self._directory.cleanup()

    def __enter__(self) -> str:
        return self.name

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.cleanup()


def _delete_left_over(place: str, prefix: str) -> None:
    with suppress(OSError):
        for name in os.listdir(place):
            if name.startswith(prefix):
                _delete_unlocked(os.path.join(place, name))


def _delete_unlocked(path: str) -> None:
    with suppress(OSError):  # somebody's who is alive, or not ours
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            found = os.fstat(handle)
            if found.st_uid == os.geteuid() and time.time() - found.st_mtime > _NEW_SECONDS:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)
