"""Where the cloud's halves of checkpoints lie: a directory, or whatever fsspec has a URL for.

Names are paths below a root, with slashes. A file is there whole or not at all, whatever happens while it is written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from sft.errors import StorageError, UsageError
from sft.files.room import free_bytes, nearest_existing
from sft.files.whole import sync_directory, whole_file


class Files(Protocol):
    """What a store of checkpoints needs of a file system. All of it raises StorageError, and may take seconds."""

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """Writes a file that is not there yet; when it returns, the file survives the machine."""

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """The content of a small file; None where there is none, or it is larger."""

    def children(self, name: str) -> list[str]:
        """Names, without their paths, of what is in a directory; nothing where there is none."""

    def copy_here(self, name: str, path: Path) -> Path | None:
        """A local file with the content: its own, or a copy made at `path`; None where there is none."""

    def remove(self, name: str) -> None:
        """Deletes a directory, or a file, if it is there; but no link, nor what is behind one."""

    def check_room(self, total_bytes: int) -> None:
        """Raises StorageError where it is known that so many bytes do not fit."""


def open_files(place: str) -> Files:
    """`place` is a directory, or a URL such as `s3://bucket/folder`. Raises UsageError and StorageError."""
    scheme = urlsplit(place).scheme if "://" in place else ""
    if scheme in ("", "file"):
        return LocalFiles(Path(place.removeprefix("file://")))
    return FsspecFiles(place)


class LocalFiles:
    """A directory of this machine's, or one that several machines have mounted."""

    def __init__(self, root: Path) -> None:
        """The directory is made with the first file. Raises UsageError where that could not be."""
        self._root = root.absolute()
        existing = nearest_existing(self._root)
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            raise UsageError(f"--checkpoint-store {root}: {existing} is no directory that can be written in")

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """See Files: under a temporary name, synced, renamed, and the directory synced."""
        path = self._root / name
        with _storage_errors():
            self._make(path.parent)
            with whole_file(path, mode=0o600) as file:
                for chunk in chunks:
                    file.write(chunk)
            sync_directory(path.parent)

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """See Files."""
        path = self._root / name
        with _storage_errors():
            if not path.is_file() or path.stat().st_size > max_bytes:
                return None
            return path.read_bytes()

    def children(self, name: str) -> list[str]:
        """See Files."""
        path = self._root / name
        with _storage_errors():
            return sorted(child.name for child in path.iterdir()) if path.is_dir() else []

    def copy_here(self, name: str, path: Path) -> Path | None:
        """See Files: the file itself."""
        own = self._root / name
        return own if own.is_file() else None

    def remove(self, name: str) -> None:
        """See Files."""
        path = self._root / name
        with _storage_errors():
            if path.is_symlink() or path.parent.is_symlink():  # an operator's
                return
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            if path.parent.is_dir():
                sync_directory(path.parent)

    def check_room(self, total_bytes: int) -> None:
        """See Files."""
        with _storage_errors():
            check_disk(self._root, total_bytes, "checkpoint")

    def _make(self, directory: Path) -> None:
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            sync_directory(path.parent)


class FsspecFiles:
    """An object store, or anything else that fsspec knows."""

    def __init__(self, url: str) -> None:
        """Raises UsageError where fsspec, or its package for such URLs, is missing or does not know what to do."""
        self._scheme = urlsplit(url).scheme
        try:
            import fsspec
        except ImportError as error:
            raise UsageError("--checkpoint-store with a URL needs a package: pip install fsspec") from error
        try:
            self._fs: Any
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except Exception as error:  # of any kind, by package; some quote the URL, which may hold a password
            kind = f": {error}" if isinstance(error, (ImportError, ValueError)) else f" ({type(error).__name__})"
            raise UsageError(f"--checkpoint-store {self._scheme}://... cannot be used{kind}") from error

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """See Files: written aside on this machine, then put in one piece, which stores take whole or not at all."""
        with _storage_errors(), tempfile.NamedTemporaryFile(prefix="sft-checkpoint-") as aside:
            for chunk in chunks:
                aside.write(chunk)
            aside.flush()
            with self._store_errors():
                self._fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
                self._fs.put_file(aside.name, self._path(name))

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """See Files."""
        with self._store_errors():
            try:
                if int(self._fs.size(self._path(name)) or 0) > max_bytes:
                    return None
                return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def children(self, name: str) -> list[str]:
        """See Files."""
        with self._store_errors():
            self._fs.invalidate_cache()  # another server may have written
            try:
                return sorted(path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._path(name), False))
            except FileNotFoundError:
                return []

    def copy_here(self, name: str, path: Path) -> Path | None:
        """See Files."""
        with self._store_errors():
            try:
                self._fs.get_file(self._path(name), str(path))
            except FileNotFoundError:
                return None
        return path

    def remove(self, name: str) -> None:
        """See Files."""
        with self._store_errors():
            if self._fs.exists(self._path(name)):
                self._fs.rm(self._path(name), recursive=True)

    def check_room(self, total_bytes: int) -> None:
        """See Files: nobody knows."""

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except Exception as error:  # each store has a tree of its own
            reason = " ".join(str(error).split())[:200]
            raise StorageError(
                f"the checkpoint store {self._scheme}://... failed: {type(error).__name__}: {reason}"
            ) from error


def check_disk(directory: Path, needed: int, what: str) -> None:
    """Raises StorageError where `what`, of so many bytes, does not fit; OSError where nobody can tell."""
    free = free_bytes(directory)
    if free < needed:
        raise StorageError(f"the cloud's disk has {free:,} bytes left, the {what} needs {needed:,}")


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"the cloud's checkpoint store failed: {error.strerror or type(error).__name__}") from error
