"""Streams that end after the same number of bytes, or of seconds, each time: something on the way has a limit."""

from __future__ import annotations

from collections import deque
from typing import Deque, Tuple

from sft.cli.durations import Duration
from sft.printable import format_bytes

_STREAMS = 3
"""One after the other that have to be alike."""

_SPREAD = 0.25
"""By how much of the middle one they may differ: what was under way when one ended counts for it."""

_LEAST_BYTES, _LEAST_SECONDS = 64 << 10, 5.0
"""What ends sooner has other reasons."""


class Cuts:
    """Of one session."""

    def __init__(self) -> None:
        self._ended: Deque[Tuple[int, float]] = deque(maxlen=_STREAMS)
        self._was_said = False

    def note(self, sent_bytes: int, seconds: float) -> str:
        """A stream broke after so much. What is to be said about it, once; mostly nothing."""
        self._ended.append((sent_bytes, seconds))
        if self._was_said or len(self._ended) < _STREAMS:
            return ""
        sizes, times = zip(*self._ended)
        alike = []
        if _are_alike(sizes, _LEAST_BYTES):
            alike.append(f"{format_bytes(sorted(sizes)[1])} were sent (with nginx: `client_max_body_size 0;`)")
        if _are_alike(times, _LEAST_SECONDS):
            alike.append(f"{Duration(round(sorted(times)[1]))} (a time-out for streams)")
        if not alike:
            return ""
        self._was_said = True
        return (
            f"the link has broken {_STREAMS} times, each time after about {', and after '.join(alike)}: a proxy on the "
            "way may have such a limit; training goes on (docs/proxies.md)"
        )


def _are_alike(values: Tuple[float, ...], least: float) -> bool:
    return min(values) >= least and max(values) - min(values) <= _SPREAD * sorted(values)[len(values) // 2]
