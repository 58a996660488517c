"""Blobs on disk, each under the SHA-256 of its bytes: what a caller uploaded once and its later sessions find.

Every caller has a directory of its own, so that nobody can find out, or use, what another has uploaded.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sft.errors import ProtocolError, StorageError
from sft.files.whole import whole_file
from sft_cloud.errors import QuotaError
from sft_cloud.identity import Identity
from sft_cloud.storage.files import check_disk

MAX_BLOB_BYTES = 64 << 30
"""Largest blob accepted: float32 weights of 16 billion parameters."""

MAX_HEADER_BYTES = 4 << 20
"""Of a safetensors file: names, types, shapes of some 30,000 tensors. More would take gigabytes as Python objects."""

_ABANDONED_SECONDS = 24 * 3600
_IN_USE_SECONDS = 24 * 3600
"""A blob that was used so recently is not deleted to make room."""

_BLOB = re.compile(r"[0-9a-f]{64}\.safetensors")
_PART = re.compile(rf"\.{_BLOB.pattern}\.[0-9a-f]+\.part")
"""What we write: nothing else is ours to count, or to delete."""

_log = logging.getLogger(__name__)

_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
)


def check_sha256(text: str) -> str:
    """`text`, if it is a SHA-256 in lower-case hexadecimal. Raises ProtocolError."""
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ProtocolError(f"{text[:80]!r} is not a SHA-256: 64 lower-case hexadecimal digits")
    return text


def read_blob(path: Path) -> dict[str, Tensor]:
    """The tensors of a blob, mapped from the file: they take memory as they are read. Raises ProtocolError."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {header_bytes} bytes, where {MAX_HEADER_BYTES} is the most")
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ProtocolError(f"blob {path.stem} is not a safetensors file ({error})") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ProtocolError(f"blob {path.stem}: '{name[:200]}' has type {tensor.dtype}, which is not supported")
    return tensors


def directory_name(owner: Identity) -> str:
    """A name for what belongs to a caller, whatever it is called."""
    name = quote(owner.name, safe="", errors="surrogatepass").replace(".", "%2E")
    if len(name) > 200:
        name = "%" + hashlib.sha256(owner.name.encode(errors="surrogatepass")).hexdigest()
    return name or "%"


class BlobStore:
    """A directory of files named `<sha256>.safetensors`. Safe to use from several threads and processes."""

    def __init__(self, directory: Path, max_bytes: int | None = None) -> None:
        """Makes the directory. `max_bytes` of all blobs in it. Raises StorageError."""
        self._directory = directory
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._coming = 0  # bytes that uploads have announced and not finished
        self._owners: dict[str, BlobStore] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for part in directory.glob("*.part"):  # of servers that were killed
                if _PART.fullmatch(part.name) and part.lstat().st_mtime < time.time() - _ABANDONED_SECONDS:
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot use {directory}: {error.strerror}; choose another --state-dir") from error

    def of(self, owner: Identity) -> BlobStore:
        """The caller's own store, in a directory of this one; as large as its limits say, or as this one may be.

        Raises StorageError.
        """
        limit = owner.limits.max_upload_bytes
        with self._lock:
            name = directory_name(owner)
            store = self._owners.get(name)
            if store is None:
                try:
                    store = self._owners[name] = BlobStore(self._directory / name)
                except StorageError as error:  # whose sentence is for who runs the server: it names a path
                    _log.error("uploads cannot be stored", extra={"fields": {"reason": str(error)}})
                    raise StorageError(
                        "the cloud cannot store uploads of yours; whoever runs it finds the reason in its log"
                    ) from error
            store.max_bytes = self.max_bytes if limit is None else limit
            return store

    def find(self, sha256: str) -> Path | None:
        """The file of a blob, if it is here."""
        path = self._path(sha256)
        if not path.is_file():
            return None
        with suppress(OSError):  # a disk that is read-only
            os.utime(path)  # when it was used last
        return path

    def add(self, sha256: str, total_bytes: int, chunks: Iterable[bytes]) -> None:
        """Stores a blob, all of it or nothing.

        Raises ProtocolError when it is too large or has another size or hash than announced, QuotaError when the caller
        has no room for it, StorageError when the disk does not take it.
        """
        path = self._path(sha256)
        if total_bytes > MAX_BLOB_BYTES:
            raise ProtocolError(f"a blob of {total_bytes} bytes is too large; at most {MAX_BLOB_BYTES} are accepted")
        if path.is_file():
            if path.stat().st_size != total_bytes:
                raise ProtocolError(f"the blob of this SHA-256 has {path.stat().st_size} bytes, not {total_bytes}")
            return
        try:
            check_disk(self._directory, total_bytes, "upload")
            with self._room_for(total_bytes), whole_file(path, mode=0o600, suffix=".part") as file:
                _write(file, sha256, total_bytes, chunks)
        except OSError as error:
            raise StorageError(f"the cloud cannot store the upload: {error.strerror}") from error

    @contextmanager
    def _room_for(self, size: int) -> Iterator[None]:
        """Holds room while a blob comes; what was not used for long makes way."""
        with self._lock:
            if self.max_bytes is not None:
                self._make_room(size, self.max_bytes)
            self._coming += size
        try:
            yield
        finally:
            with self._lock:
                self._coming -= size

    def _make_room(self, size: int, max_bytes: int) -> None:
        held = sorted((stat.st_mtime, stat.st_size, path) for path, stat in self._blobs())
        total = self._coming + sum(held_size for _, held_size, _ in held)
        for used_at, held_size, path in held:
            if total + size <= max_bytes or used_at > time.time() - _IN_USE_SECONDS:
                break
            path.unlink(missing_ok=True)
            total -= held_size
        if total + size > max_bytes:
            raise QuotaError(
                f"the server keeps at most {max_bytes} bytes of uploads for you; there are {total}, and {size} more do "
                "not fit: they make way a day after they were used last"
            )

    def _blobs(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._directory.glob("*.safetensors"):
            if not _BLOB.fullmatch(path.name):
                continue
            with suppress(FileNotFoundError):  # another process was faster
                yield path, path.stat()

    def _path(self, sha256: str) -> Path:
        return self._directory / f"{check_sha256(sha256)}.safetensors"


def _write(file: BinaryIO, sha256: str, total_bytes: int, chunks: Iterable[bytes]) -> None:
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
