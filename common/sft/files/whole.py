"""Files that are there whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import os
import secrets
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Iterator


@contextmanager
def whole_file(path: Path, mode: int = 0o666, suffix: str = "") -> Iterator[BinaryIO]:
    """A file to write; with the end of the block it takes the place of what was at `path`. Its directory is there.

    When the block raises, nothing is left behind and what was there stays. `mode`: what the umask leaves of it, from
    the first byte on; `suffix` of the temporary name, which begins with a dot. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{suffix}")
    descriptor = os.open(str(temporary), os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(str(temporary), str(path))
    except BaseException:
        with suppress(OSError):
            os.unlink(str(temporary))
        raise


def sync_directory(path: Path) -> None:
    """Until then a crash of the machine may forget what was renamed in it. Raises OSError."""
    handle = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
