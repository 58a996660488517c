"""Files with secrets in them: written whole or not at all, and readable by nobody else."""

from __future__ import annotations

import stat
from pathlib import Path

from sft.errors import StorageError, UsageError
from sft.files.whole import sync_directory, whole_file

PRIVATE, PUBLIC = 0o600, 0o644


def write_file(path: Path, content: bytes, mode: int = PRIVATE) -> None:
    """Puts a file in the place of what was there, with this mode from its first byte on. Raises StorageError."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with whole_file(path, mode) as file:
            file.write(content)
        sync_directory(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def read_file(path: Path, what: str) -> bytes:
    """`what` names the file in the error: `--tls-cert`. Raises UsageError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror}") from error


def signature(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def written_by_others(path: Path) -> bool:
    """Whether somebody besides its owner may change the file."""
    return bool(path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH))
