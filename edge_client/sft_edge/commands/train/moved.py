"""What a run has moved, in OUTPUT_DIR/moved.json beside its checkpoints: it counts on, from whichever it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Iterable, NamedTuple

from sft_edge.files import write_json
from sft_edge.link import Meter

FILE = "moved.json"


class Moved(NamedTuple):
    """By a run, in whichever processes."""

    bytes_sent: int = 0
    """Whole messages with their framing."""

    bytes_received: int = 0
    """The same."""

    link_bytes: int = 0
    """Both, and what is wrapped around them."""

    def and_by(self, meter: Meter) -> Moved:
        """With what this process has moved."""
        mine = (meter.sent, meter.received, meter.link_bytes)
        return Moved(*(before + now for before, now in zip(self, mine)))


def read_moved(directories: Iterable[Path], run_id: str) -> Moved:
    """By a run of this id before; nothing where no file is of it."""
    found = [_read(directory / FILE, run_id) for directory in directories]
    return max(found, key=lambda moved: moved.link_bytes, default=Moved())


def write_moved(directory: Path, run_id: str, moved: Moved) -> None:
    """Raises StorageError."""
    write_json(directory / FILE, {"run_id": run_id, **moved._asdict()})


def _read(path: Path, run_id: str) -> Moved:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["run_id"] == run_id:
            moved = Moved(*(int(content[name]) for name in Moved._fields))
            if all(0 <= count < 1 << 62 for count in moved):
                return moved
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass
    return Moved()
