"""Files of a run, written whole or not at all, and JSON."""

from __future__ import annotations

import json
import math
import numbers
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping

from sft.errors import StorageError
from sft.files.room import free_bytes
from sft.files.whole import whole_file


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """An OSError inside becomes a StorageError that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StorageError(f"cannot write {path}: {reason}; free some space or choose another --output-dir") from error


def write_file(path: Path, chunks: Iterable[bytes], mode: int = 0o666) -> int:
    """Writes the file, making its directory; returns its size. `mode`: see `whole_file`. Raises StorageError.

    What `chunks` raises goes through. Nothing is left behind then.
    """
    size = 0
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, mode) as file:
            for chunk in chunks:
                size += file.write(chunk)
    return size


def check_room(option: str, directory: Path, needed: int) -> None:
    """Raises StorageError where a model of so many bytes does not fit into the directory that `option` names."""
    with storage_errors(directory):
        free = free_bytes(directory)
    if free < needed:
        raise StorageError(f"{option} {directory}: the model needs {needed:,} bytes, the disk has {free:,} free")


def write_json(path: Path, content: Any) -> None:
    """Writes a mapping or a dataclass; NaN and infinity, which JSON lacks, become null. Raises StorageError."""
    if is_dataclass(content) and not isinstance(content, type):
        content = asdict(content)
    write_file(path, [json_text(content).encode("utf-8")])


def json_text(content: Any) -> str:
    """A mapping as JSON; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_json_ready(content), indent=2, allow_nan=False) + "\n"


def _json_ready(value: Any) -> Any:
    """Numbers of numpy and torch as Python's, paths as text; what is not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if hasattr(value, "__float__"):
        number = float(value)
        return number if math.isfinite(number) else None
    return str(value)
