"""What `sft-cloud serve` allows: options, read before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sft.config import above_zero, at_least
from sft.durations import Duration

_IDLE, _STALL = Duration("30m"), Duration("1m")


@dataclass(frozen=True)
class LimitOptions:
    """What a caller may take of the server, beside the limits of its token, and how long the server waits for it."""

    idle_timeout: Duration = _IDLE
    """a stream on which the edge says nothing for so long is ended; its session lives on for --session-timeout"""

    stall_timeout: Duration = _STALL
    """how long a call waits for the other side in the middle of something: a first message, the next part of an upload,
    an answer to be read; large messages get a second more for every 8 KiB"""

    opens_per_minute: int = 120
    """requests to open a session that one caller may make in a minute"""

    max_upload_bytes: int | None = None
    """bytes of uploads kept for one caller whose token says nothing of it, and as many of checkpoints (default: what
    the disk holds)"""

    memory_limit: int | None = None
    """bytes that the sessions may take together (default: four fifths of the device's memory)"""

    download_models: bool = False
    """fetch models from the hub when a caller names one that is not here; otherwise the caller uploads its weights"""

    audit_log: Path | None = None
    """file to which who did what is added, one JSON object a line"""

    def __post_init__(self) -> None:
        """Raises UsageError."""
        above_zero(self, "idle_timeout", "stall_timeout")
        at_least(self, 1, "opens_per_minute", "max_upload_bytes", "memory_limit")
