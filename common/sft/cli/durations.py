"""Durations as people write them: `30s`, `1m30s`, `500ms`."""

from __future__ import annotations

import re
from typing import Union

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


class Duration(float):
    """A number of seconds that is read and shown with its units."""

    def __new__(cls, value: Union[str, float]) -> Duration:
        """`value`: text such as `1m30s`, or seconds. Raises ValueError for other text, a bare number included."""
        if isinstance(value, str):
            if not re.fullmatch(f"(?:{_PART.pattern})+", value):
                raise ValueError(f"{value!r} is not a duration such as 500ms, 30s, 1m30s, 2h or 7d")
            value = sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(value))
        return super().__new__(cls, value)

    def __str__(self) -> str:
        """With the largest units that leave whole numbers, down to milliseconds; `0s` for nothing."""
        left, text = round(float(self) * 1000), ""
        for unit in ("d", "h", "m", "s", "ms"):
            count, left = divmod(left, round(_SECONDS[unit] * 1000))
            text += f"{count}{unit}" if count else ""
        return text or "0s"
