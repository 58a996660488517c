"""Who did what: a file of JSON lines, kept apart from the log, for whoever has to answer for the server.

Every line has `time`, `who` (the name of the identity), `peer` (its address), `what`, and fields of the event. Sessions
go by the beginning of their id; tokens, keys and weights are never in it. What comes from outside is cut and escaped.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from sft.errors import StorageError
from sft_cloud.observability.log_limit import LogLimit

MAX_TEXT = 200
"""Characters of a value."""

REFUSALS_PER_SECOND = 10
"""Lines about refused calls; more are counted, and how many is said in the next one: nobody shall fill the disk."""

_log = logging.getLogger(__name__)


class AuditLog:
    """Adds lines to a file, which may be moved away at any time and is made anew. Safe to use from several threads."""

    def __init__(self, path: Path | None, wall_clock: Callable[[], float] = time.time) -> None:
        """None writes nothing. Raises StorageError when the file cannot be written."""
        self._path = path
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._refusals = LogLimit(REFUSALS_PER_SECOND, wall_clock)
        self._is_broken = False
        if path is not None:
            try:
                _append(path, b"")
            except OSError as error:
                raise StorageError(f"cannot write the audit log {path}: {error.strerror}") from error

    def write(self, what: str, who: str, peer: str, **fields: object) -> None:
        """One event. A disk that does not take it is said in the log, once; the server goes on."""
        if self._path is None:
            return
        with self._lock:
            now = self._wall_clock()
            if what == "refused":
                left_out = self._refusals.take()
                if left_out is None:
                    return
                if left_out:
                    fields["left_out_before"] = left_out
            entry: dict[str, object] = {
                "time": datetime.fromtimestamp(now, timezone.utc).isoformat(timespec="milliseconds"),
                "who": who,
                "peer": peer,
                "what": what,
                **fields,
            }
            line = json.dumps({key: _plain(value) for key, value in entry.items()}) + "\n"
            try:
                _append(self._path, line.encode())
                self._is_broken = False
            except OSError as error:
                if not self._is_broken:
                    _log.error("the audit log cannot be written", extra={"fields": {"reason": error.strerror}})
                self._is_broken = True


def _append(path: Path, line: bytes) -> None:
    # Opened each time, so that the file can be rotated; one write, so that lines of several processes stay whole.
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(file, line)
    finally:
        os.close(file)


def _plain(value: object) -> object:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = str(value)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."
