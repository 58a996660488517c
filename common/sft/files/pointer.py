"""Files that stand for others: what Git leaves of a large file that was not fetched."""

from __future__ import annotations

from pathlib import Path

_BEGINNING = b"version https://git-lfs"


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a Git LFS pointer. A file that cannot be read is none."""
    try:
        with path.open("rb") as file:
            return file.read(len(_BEGINNING)) == _BEGINNING
    except OSError:
        return False


def lfs_advice(path: Path) -> str:
    """What to tell of such a file."""
    return f"{path}: a Git LFS pointer stands here, not the file; fetch it with: git lfs pull"
