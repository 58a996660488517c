"""HOST:PORT taken apart."""

from __future__ import annotations

import re
from typing import Tuple

from sft.errors import UsageError


def split_address(server: str) -> Tuple[str, int]:
    """Host and port of `HOST:PORT`; an IPv6 host stands in brackets, here and in the result. Raises UsageError."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})", server)
    if not match or not 1 <= int(match[2]) <= 65535:
        raise UsageError(f"--server must be HOST:PORT, such as cloud.example:50051 or [::1]:50051, not {server!r}")
    return match[1], int(match[2])
