"""Files of a run, which may be anybody's: read up to a size, and into numbers and short texts alone."""

from __future__ import annotations

import csv
import json
from itertools import accumulate
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional

from sft.errors import CheckpointError
from sft.printable import printable
from sft_edge.files import json_text

MAX_JSON_BYTES = 16 << 20
MAX_LEDGER_BYTES = 64 << 20
"""Half a million steps."""

MAX_TEXT = 200
MAX_DIGITS = 18
MAX_NUMBER = 1e18
"""Further from 0 is no loss, no count of bytes and no time."""


def read_json(path: Path) -> Dict[str, Any]:
    """An object. Raises CheckpointError for what is none, or too large."""
    _check_size(path, MAX_JSON_BYTES)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_int=_whole_number)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON as sft-edge train writes it ({printable(str(error))[:100]})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not what sft-edge train writes: no JSON object")
    return content


def read_if_there(path: Path) -> Optional[Dict[str, Any]]:
    """The same; None where there is no file."""
    return read_json(path) if path.is_file() else None


def read_ledger(path: Path) -> List[int]:
    """Of `ledger.csv`: bytes on the wire, both ways, up to and with each step. Raises CheckpointError."""
    _check_size(path, MAX_LEDGER_BYTES)
    try:
        with open(str(path), encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            return list(accumulate(_count(row["bytes_sent"]) + _count(row["bytes_received"]) for row in rows))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise CheckpointError(f"{path} is not what sft-edge train writes") from error


def read_saved_ledger(path: Path) -> Dict[str, List[float]]:
    """By name the columns of a checkpoint's `ledger.safetensors`. Raises CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    _check_size(path, MAX_LEDGER_BYTES)
    try:
        columns = load_file(str(path))
        return {name: [number(one) or 0 for one in column.ravel().tolist()] for name, column in columns.items()}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not what sft-edge train writes") from error


def number(value: object) -> Optional[float]:
    """One that can be calculated with; None for all else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_NUMBER:
        return None
    return value


def numbers(content: Mapping[str, Any]) -> Dict[str, float]:
    """The entries that are such."""
    found = {short(name): number(value) for name, value in content.items()}
    return {name: value for name, value in found.items() if value is not None}


def entries(history: object) -> Iterator[Dict[str, float]]:
    """Of a log history those with a step, as numbers."""
    for entry in history if isinstance(history, list) else []:
        found = numbers(entry) if isinstance(entry, dict) else {}
        if "step" in found:
            yield found


def short(text: object) -> str:
    """One line, not too long, that does nothing to a terminal."""
    text = str(text)
    return printable(text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…")


def option_text(value: object) -> str:
    """The value of an option, in the same words from `options.json` and from a checkpoint, where all are text."""
    if value is None or value == "None":
        return "-"
    if isinstance(value, bool) or value in ("True", "False"):
        return str(value).lower()
    return short(" ".join(json_text(value).split()) if isinstance(value, dict) else value)


def _check_size(path: Path, limit: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if size > limit:
        raise CheckpointError(f"{path} has {size:,} bytes; no more than {limit:,} are read of such a file")


def _count(digits: str) -> int:
    if not (digits.isdigit() and len(digits) <= MAX_DIGITS):
        raise ValueError("no count of bytes")
    return int(digits)


def _whole_number(digits: str) -> float:
    """Reading thousands of digits exactly takes longer the more there are, without end."""
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)
