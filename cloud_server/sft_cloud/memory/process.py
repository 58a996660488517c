"""What this process takes of the machine's memory, and what there is for it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

_PROC, _CGROUPS = Path("/proc/self"), Path("/sys/fs/cgroup")


def process_bytes() -> int:
    """What this process has in memory and the kernel cannot drop: without pages of programs and of mapped files.

    0 where the system does not say.
    """
    try:
        fields = (_PROC / "statm").read_bytes().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def machine_bytes() -> int:
    """What there is for this process: of the machine, or of the control groups that it is in."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_group_limits()])


def _group_limits() -> Iterator[int]:
    """Of the group and those around it, each of which counts. A container may see its own group at the root."""
    try:
        lines = (_PROC / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in ["0::/", ":memory:/", *lines]:
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if "memory" in controllers.split(","):
            root, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        elif number == "0" and not controllers:
            root, name = _CGROUPS, "memory.max"
        else:
            continue
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # there is none, or "max"
                yield int((folder / name).read_text())
            if folder == root:
                break


def give_back() -> None:
    """Has the allocator return to the system what it keeps; nothing where it cannot be told to (musl, macOS)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
