"""Blobs on disk, each under the SHA-256 of its bytes: what edges uploaded once and every later session finds."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sft.errors import ProtocolError, StorageError

MAX_BLOB_BYTES = 64 << 30
"""Largest blob accepted: float32 weights of 16 billion parameters."""

_ABANDONED_SECONDS = 24 * 3600


def check_sha256(text: str) -> str:
    """`text`, if it is a SHA-256 in lower-case hexadecimal. Raises ProtocolError."""
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ProtocolError(f"{text[:80]!r} is not a SHA-256: 64 lower-case hexadecimal digits")
    return text


def read_blob(path: Path) -> dict[str, Tensor]:
    """The tensors of a blob, mapped from the file: they take memory as they are read. Raises ProtocolError."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ProtocolError(f"blob {path.stem} is not a safetensors file ({error})") from error


class BlobStore:
    """A directory of files named `<sha256>.safetensors`. Safe to use from several threads and processes."""

    def __init__(self, directory: Path) -> None:
        """Makes the directory. Raises StorageError."""
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for part in directory.glob("*.part"):  # of servers that were killed
                if part.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot use {directory}: {error.strerror}; choose another --state-dir") from error

    def find(self, sha256: str) -> Path | None:
        """The file of a blob, if it is here."""
        path = self._path(sha256)
        return path if path.is_file() else None

    def add(self, sha256: str, total_bytes: int, chunks: Iterable[bytes]) -> None:
        """Stores a blob, all of it or nothing.

        Raises ProtocolError when it is too large or has another size or hash than announced, StorageError when the disk
        does not take it.
        """
        path = self._path(sha256)
        if total_bytes > MAX_BLOB_BYTES:
            raise ProtocolError(f"a blob of {total_bytes} bytes is too large; at most {MAX_BLOB_BYTES} are accepted")
        if path.is_file():
            return
        try:
            free = shutil.disk_usage(self._directory).free
            if total_bytes > free:
                raise StorageError(f"the cloud's disk has {free} bytes left, the upload needs {total_bytes}")
            with tempfile.NamedTemporaryFile(dir=self._directory, suffix=".part", delete=False) as file:
                try:
                    _write(file, sha256, total_bytes, chunks)
                    os.replace(file.name, path)
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            raise StorageError(f"the cloud cannot store the upload: {error.strerror}") from error

    def _path(self, sha256: str) -> Path:
        return self._directory / f"{check_sha256(sha256)}.safetensors"


def _write(file: tempfile._TemporaryFileWrapper[bytes], sha256: str, total_bytes: int, chunks: Iterable[bytes]) -> None:
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        size += len(chunk)
        if size > total_bytes:
            break
        digest.update(chunk)
        file.write(chunk)
    if size != total_bytes:
        relation = "more" if size > total_bytes else "fewer"
        raise ProtocolError(f"{relation} bytes than the {total_bytes} announced were uploaded")
    if digest.hexdigest() != sha256:
        raise ProtocolError(f"the uploaded bytes have SHA-256 {digest.hexdigest()}, not {sha256}; upload them again")
    file.flush()
    os.fsync(file.fileno())
