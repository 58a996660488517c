"""Where the cloud's halves of checkpoints lie: a directory, or whatever fsspec has a URL for.

Names are paths below a root, with slashes. A file is there whole or not at all, whatever happens while it is written.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from sft.errors import StorageError, UsageError
from sft.files.room import free_bytes, nearest_existing
from sft.files.whole import sync_directory, whole_file

_TRY_SECONDS = 15.0
"""How long a store may take for a small file, when the server starts."""

_WITH_BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "obs", "tos"}
"""Stores without directories: to make one there would make a bucket."""

_PACKAGES = {"s3": "split-fine-tuning[s3]", "s3a": "split-fine-tuning[s3]"}
"""What to install for a kind of URL; for others it is the package that is missing."""

_log = logging.getLogger(__name__)


class Files(Protocol):
    """What a store of checkpoints needs of a file system. All of it raises StorageError, and may take seconds.

    What an error says is for callers; what the operator needs besides is in the log.
    """

    def try_out(self) -> None:
        """Writes, reads and deletes a small file. Raises StorageError, with what the operator needs to know."""

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """Writes a file that is not there yet; when it returns, the file survives the machine."""

    def share(self, held: str, name: str) -> bool:
        """Gives a file that is there another name, which outlives the first; whether that could be done without reading
        it here. Raises nothing."""

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

    def try_out(self) -> None:
        """See Files: where the directory is, or will be."""
        check_writable(self._root, "--checkpoint-store")

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """See Files: under a temporary name, synced, renamed, and the directory synced."""
        path = self._root / name
        with _storage_errors():
            self._make(path.parent)
            with whole_file(path, mode=0o600) as file:
                for chunk in chunks:
                    file.write(chunk)
            sync_directory(path.parent)

    def share(self, held: str, name: str) -> bool:
        """See Files: by a hard link."""
        path = self._root / name
        try:
            self._make(path.parent)
            os.link(self._root / held, path)
            sync_directory(path.parent)
            return True
        except OSError:  # it is gone, or the file system has no links
            return False

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
        self._scheme, self._password = urlsplit(url).scheme, urlsplit(url).password
        try:
            import fsspec
        except ImportError as error:
            raise UsageError("--checkpoint-store with a URL needs a package: pip install fsspec") from error
        try:
            self._fs: Any
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            cause: BaseException = error
            while isinstance(cause.__cause__, ImportError):  # fsspec names the package it knows, not the one it lacks
                cause = cause.__cause__
            missing = getattr(cause, "name", None) or self._scheme
            wanted = _PACKAGES.get(self._scheme, missing)
            raise UsageError(
                f"--checkpoint-store {self._scheme}://... needs the package {missing}: pip install '{wanted}'"
            ) from error
        except Exception as error:  # of any kind, by package; some quote the URL, which may hold a password
            kind = f": {error}" if isinstance(error, ValueError) else f" ({type(error).__name__})"
            raise UsageError(f"--checkpoint-store {self._scheme}://... cannot be used{kind}") from error

    def try_out(self) -> None:
        """See Files: with a time, whatever the package's own are, which may try again for minutes."""
        failures: list[Exception] = []
        thread = threading.Thread(target=self._try, args=(failures,), daemon=True)
        thread.start()
        thread.join(_TRY_SECONDS)
        if thread.is_alive():
            raise StorageError(
                f"--checkpoint-store {self._scheme}://... did not take a small file within {_TRY_SECONDS:g} s: is it "
                "there, and may it be reached from here?"
            )
        if failures:
            raise StorageError(
                f"--checkpoint-store {self._scheme}://... does not take a small file: {self._reason(failures[0])}"
            ) from failures[0]

    def _try(self, failures: list[Exception]) -> None:
        content, path = secrets.token_bytes(16), self._path(f".sft-{secrets.token_hex(8)}")
        try:
            bucket = path.lstrip("/").partition("/")[0]
            # Some stores make one at the first write to it.
            if self._scheme in _WITH_BUCKETS and not self._fs.exists(bucket):
                raise FileNotFoundError(f"there is no bucket {bucket}, or it is not for us")
            self._make_parent(path)
            self._fs.pipe_file(path, content)
            try:
                if self._fs.cat_file(path) != content:
                    raise OSError("it gives back other bytes than were written")
            finally:
                self._fs.rm_file(path)
        except Exception as error:  # each store has a tree of its own
            failures.append(error)

    def _make_parent(self, path: str) -> None:
        if self._scheme not in _WITH_BUCKETS:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _reason(self, error: Exception) -> str:
        text = " ".join(str(error).split())[:200]
        return f"{type(error).__name__}: {text.replace(self._password, '***') if self._password else text}"

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """See Files: written aside on this machine, then put in one piece, which stores take whole or not at all."""
        with _storage_errors(), tempfile.NamedTemporaryFile(prefix="sft-checkpoint-") as aside:
            for chunk in chunks:
                aside.write(chunk)
            aside.flush()
            with self._store_errors():
                self._make_parent(self._path(name))
                self._fs.put_file(aside.name, self._path(name))

    def share(self, held: str, name: str) -> bool:
        """See Files: the store copies it, if it can."""
        try:
            self._make_parent(self._path(name))
            self._fs.cp_file(self._path(held), self._path(name))
            return True
        except Exception:  # each store has a tree of its own; what is left of it is written over
            return False

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
            _log.error("the checkpoint store failed", extra={"fields": {"reason": self._reason(error)}})
            raise StorageError(
                "the cloud's checkpoint store failed; whoever runs the cloud finds the reason in its log"
            ) from error


def check_writable(directory: Path, option: str) -> None:
    """Raises StorageError where no file can be written in a directory that is there, or will be made."""
    place = nearest_existing(directory.absolute())
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".sft-") as file:
            file.write(b"-")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(
            f"{option} {directory}: cannot write in {place}: {error.strerror}; choose another"
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
