"""The manifest of one half of a checkpoint: which files make it up, how long they are, and their hashes.

It is written last. Files without a manifest, or that are not what it says, are no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterable, Iterator, Optional

from sft.errors import CheckpointError
from sft.version import __version__

MANIFEST_FILE = "manifest.json"

MAX_MANIFEST_BYTES = 1 << 20

_FORMAT = 1
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written."""

    total_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Of one step of a run, on one side."""

    run_id: str
    step: int
    """Steps that were committed."""

    files: Dict[str, FileEntry]
    """By name; there are no directories among them."""

    other_half: Optional[str] = None
    """SHA-256 of the cloud's manifest, in the edge's; None where there is no cloud."""

    package_version: str = __version__

    def to_bytes(self) -> bytes:
        """Of the file; the same manifest gives the same bytes."""
        content = {
            "format": _FORMAT,
            "package_version": self.package_version,
            "run_id": self.run_id,
            "step": self.step,
            "other_half": self.other_half,
            "files": {name: {"bytes": f.total_bytes, "sha256": f.sha256} for name, f in sorted(self.files.items())},
        }
        return (json.dumps(content, indent=2) + "\n").encode()

    @property
    def total_bytes(self) -> int:
        """Of all files, this one left out."""
        return sum(entry.total_bytes for entry in self.files.values())


def read_manifest(data: bytes, where: str) -> Manifest:
    """A manifest from the bytes of its file. Raises CheckpointError, which begins with `where`."""
    try:
        content = json.loads(data)
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']} is of another release")
        files = {name: FileEntry(entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
        manifest = Manifest(
            content["run_id"], content["step"], files, content["other_half"], content["package_version"]
        )
        hashes = [entry.sha256 for entry in files.values()]
        if not all(re.fullmatch(r"[0-9a-f]{64}", sha256) for sha256 in hashes):
            raise ValueError("a hash is none")
        if not all(re.fullmatch(r"[\w.-]+", name) and not name.startswith(".") for name in files):
            raise ValueError("a file has an odd name")
        if type(manifest.step) is not int or not is_run_id(manifest.run_id):
            raise ValueError("step or run are odd")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: not the manifest of a checkpoint ({error})") from error


def is_run_id(text: str) -> bool:
    """Whether it names a run: 32 hexadecimal digits, lower case."""
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


class Measured:
    """Passes chunks on, and knows their size and hash in the end."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = chunks
        self._digest = hashlib.sha256()
        self._size = 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self._digest.update(chunk)
            self._size += len(chunk)
            yield chunk

    @property
    def entry(self) -> FileEntry:
        """Of what was passed on so far."""
        return FileEntry(self._size, self._digest.hexdigest())


def is_whole(path: Path, entry: FileEntry) -> bool:
    """Whether a file is here, as long as it should be and with its hash. Raises OSError only for a broken disk."""
    if not path.is_file() or path.stat().st_size != entry.total_bytes:
        return False
    measured = Measured(chunks_of(path))
    for _ in measured:
        pass
    return measured.entry == entry


def chunks_of(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a megabyte at a time."""
    with path.open("rb") as file:
        while True:
            chunk = file.read(_CHUNK_BYTES)
            if not chunk:
                return
            yield chunk
