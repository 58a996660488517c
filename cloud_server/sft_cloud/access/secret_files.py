"""Files with secrets in them: written whole or not at all, and readable by nobody else."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from sft.errors import StorageError, UsageError

PRIVATE, PUBLIC = 0o600, 0o644


def write_file(path: Path, content: bytes, mode: int = PRIVATE) -> None:
    """Puts a file in the place of what was there, with this mode from its first byte on. Raises StorageError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
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
