"""How much a disk still takes."""

from __future__ import annotations

import shutil
from pathlib import Path


def nearest_existing(path: Path) -> Path:
    """The path, or what there is of it already: the first of its parents that exists."""
    return next((place for place in (path, *path.parents) if place.exists()), path)


def free_bytes(path: Path) -> int:
    """Room on the disk that `path` is on, or will be once it is made. Raises OSError."""
    return shutil.disk_usage(str(nearest_existing(path))).free
