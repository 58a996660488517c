"""A control group with a limit of memory, as a container has one: the kernel ends what goes over it. Needs root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


class MemoryGroup:
    """Of version 1 or 2 of control groups, whichever the machine has."""

    def __init__(self, directory: Path, is_old: bool) -> None:
        self._directory = directory
        self._is_old = is_old

    def command(self, command: list[str]) -> list[str]:
        """The same command, in the group from its first instruction on."""
        procs = self._directory / "cgroup.procs"
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(procs), *command]

    def peak_bytes(self) -> int | None:
        """The most that the group has ever had, pages of files included; None where the kernel does not say."""
        file = self._directory / ("memory.max_usage_in_bytes" if self._is_old else "memory.peak")
        return int(file.read_text()) if file.exists() else None

    def kills(self) -> int:
        """Processes that were ended for want of memory."""
        file = self._directory / ("memory.oom_control" if self._is_old else "memory.events")
        found = [line.split()[1] for line in file.read_text().splitlines() if line.startswith("oom_kill ")]
        return int(found[0]) if found else 0


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Made, and removed once nothing runs in it. Raises OSError where this user may not, or there are none."""
    is_old = (_ROOT / "memory" / "memory.limit_in_bytes").exists()
    parent = _ROOT / "memory" if is_old else _ROOT
    directory = parent / f"sft-bench-{os.getpid()}"
    if not is_old:
        (_ROOT / "cgroup.subtree_control").write_text("+memory")
    directory.mkdir()
    try:
        limits = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"] if is_old else ["memory.max"]
        for name in limits:  # the second is there where swap is counted
            if name in limits[:1] or (directory / name).exists():
                (directory / name).write_text(str(limit_bytes))
        if not is_old and (directory / "memory.swap.max").exists():
            (directory / "memory.swap.max").write_text("0")
        yield MemoryGroup(directory, is_old)
    finally:
        directory.rmdir()
