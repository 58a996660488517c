"""What people read: what the other side says, made fit for a terminal and for arithmetic, and figures with units."""

from __future__ import annotations

import math
from typing import Any

MAX_TEXT = 400
"""Characters of a text in an answer."""

MAX_SECONDS = 253_370_764_800.0
"""The year 9999, in Unix seconds: later than anything that calendars and durations can show."""


def printable(text: str) -> str:
    """One line, in which nothing moves a terminal's cursor, changes its colours or turns the writing round."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))


def told_by(error: BaseException, limit: int = 300) -> str:
    """What a library's error says, in one line: its first line alone is often no more than a title."""
    text = f"there is no {error}" if isinstance(error, KeyError) and error.args else str(error)
    return printable(text)[:limit] or type(error).__name__


def said(text: str) -> str:
    """What the other side says, `printable` and not too long."""
    return printable(text[:MAX_TEXT])


def finite(number: float) -> float:
    """`number`, no further from 0 than MAX_SECONDS; 0 for what is none."""
    return 0.0 if math.isnan(number) else max(-MAX_SECONDS, min(number, MAX_SECONDS))


def tidied(message: Any) -> Any:
    """A copy of a protobuf message, with every text `printable` and not too long, and every number `finite`."""
    tidy = type(message)()
    tidy.CopyFrom(message)
    _tidy(tidy)
    return tidy


def _tidy(message: Any) -> None:
    for field, value in message.ListFields():
        if hasattr(value, "ListFields"):  # a message; the class is not named, as --help needs no protobuf
            _tidy(value)
        elif isinstance(value, (str, float)):
            setattr(message, field.name, _tidied(value))
        elif field.message_type is not None:  # the rest are lists of these
            for one in value:
                _tidy(one)
        elif not isinstance(value, (bool, int, bytes)):
            value[:] = [_tidied(one) for one in value]


def _tidied(value: Any) -> Any:
    if isinstance(value, str):
        return said(value)
    return finite(value) if isinstance(value, float) else value


def counted(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def format_bytes(count: float) -> str:
    """`12.9 kB`, with decimal units."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.3g} {units[0]}"


def format_seconds(seconds: float) -> str:
    """`42s`, `1m20s` or `2h05m`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def format_value(value: Any) -> str:
    """Numbers with five significant digits, whole ones whole."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
