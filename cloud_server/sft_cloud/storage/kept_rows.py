"""Activations that the cloud keeps for a session: encrypted, in files without a name.

A file's name is gone before anything is in it, so the system deletes it with the session, and with a process that is
killed. The key is the edge's, and is in memory alone: whoever takes the disk finds noise. Who has the process has both.

    data     _HEAD, then a record for each sequence, the next number each: length of what follows, nonce, ciphertext
    index    where each record ends

AES-256-GCM. Nonces are drawn, and do not count: a session that goes on from a checkpoint has the key of the one before,
which may have kept other rows under the same numbers after it, on the same disk. The number is authenticated, so that
rows are those of their number or none.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import struct
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sft.errors import CheckpointError, StorageError
from sft.files.room import free_bytes
from sft_cloud.errors import PreconditionError
from sft_cloud.identity import Identity
from sft_cloud.storage.checkpoints import Held, Part

KEY_BYTES = 32

_HEAD = b"sft kept rows 1\n"
_LENGTH, _NUMBER = struct.Struct("<I"), struct.Struct("<Q")
_NONCE_BYTES, _TAG_BYTES = 12, 16
_RECORD_BYTES = _LENGTH.size + _NONCE_BYTES + _TAG_BYTES
"""Beside the rows themselves, of which there is at least one byte."""
_COST_BYTES = _RECORD_BYTES + _NUMBER.size
"""Of a sequence, beside its rows, with its place in the index."""
_CHUNK_BYTES = 1 << 20
_INDEX_PIECE = 1 << 16
"""Places that are written at once when an index is made anew."""

_MAX_SEQUENCES = 1 << 22
"""Of a session, however small they are: an index of 32 MB, made anew in some seconds."""

_LEFT_BYTES = 1 << 30
"""Of the disk, for what else there is: uploads and checkpoints, also of others."""

_NO_ROOM = "no room on the disk, or no more of what is for one caller"

_PART = re.compile(r"kept-\d{1,9}\.bin")

_log = logging.getLogger(__name__)


class _Saved(NamedTuple):
    """A piece of the data, as it is in a checkpoint, or will be."""

    begin: int
    end: int
    held: Held | None


class KeptStore:
    """What one server keeps, for everybody. Safe to use from several threads."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """`directory` on the disk that is to be used; it is made when it is needed. `max_bytes` for each caller; with 0
        nothing is kept."""
        self._directory = directory
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._rows: weakref.WeakSet[KeptRows] = weakref.WeakSet()

    def open(
        self, owner: Identity, key: bytes, saved: Mapping[str, Path] | None = None, run_id: str = ""
    ) -> KeptRows | None:
        """For a session of `owner`, with what is among the files of a checkpoint, by name; where there is no room for
        that, it is full and holds nothing. An older session of the same run keeps no more: it is about to end, and is
        in nobody's way. None where nothing is kept here.

        Raises PreconditionError where `saved` was kept with another key, CheckpointError where it is none of ours.
        """
        if not self._max_bytes:
            return None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            rows = KeptRows(self, owner, key, self._directory, run_id)
        except OSError as error:
            _log.error("activations cannot be kept", extra={"fields": {"reason": error.strerror}})
            return None
        with self._lock:
            for each in self._rows:
                each.is_replaced |= bool(run_id) and (each.owner, each.run_id) == (rows.owner, run_id)
            self._rows.add(rows)
        files = sorted((name for name in saved or () if _PART.fullmatch(name)), key=lambda name: int(name[5:-4]))
        if saved and files:
            rows.load([saved[name] for name in files])
        return rows

    def grows(self, rows: KeptRows, size: int) -> bool:
        """Counts so many bytes more for one of them; whether there is room."""
        with self._lock:
            held = sum(each.total_bytes for each in self._rows if each.owner == rows.owner and not each.is_replaced)
            comes = size * (2 if rows.is_to_be_saved else 1) + sum(each.bytes_to_come for each in self._rows)
            if rows.is_replaced or held + size > self._max_bytes:
                return False
            if free_bytes(self._directory) < comes + _LEFT_BYTES:
                return False
            rows.total_bytes += size
            return True


class KeptRows:
    """Of one session. Numbers count from 1. Not for several threads at once."""

    def __init__(self, store: KeptStore, owner: Identity, key: bytes, directory: Path, run_id: str) -> None:
        """Holds nothing. Raises OSError."""
        self.owner, self.run_id = owner.name, run_id
        self.is_saved = True
        """Checkpoints have it, too, where the run has a name to be saved under."""
        self.is_replaced = False
        """There is a newer session of its run."""
        self.count = 0
        """How many sequences it holds, and the newest number."""
        self.is_full = False
        """No more is kept, now or later."""
        self.total_bytes = 0
        """On the disk, for what is kept or is about to be."""
        self._store = store
        self._cipher = AESGCM(key)
        self._data = _nameless(directory)
        weakref.finalize(self, os.close, self._data)
        self._index = _nameless(directory)
        weakref.finalize(self, os.close, self._index)
        os.pwrite(self._data, _HEAD, 0)
        self._end = len(_HEAD)
        self._saved: list[_Saved] = []
        self._was_damaged = False

    @property
    def is_to_be_saved(self) -> bool:
        """The next checkpoint needs as much room as what is added, most likely on the same disk."""
        return self.is_saved and bool(self.run_id)

    @property
    def bytes_to_come(self) -> int:
        """That the disk has still to take: what is being written, and what the next checkpoint will have anew."""
        written = self._end - len(_HEAD) + _NUMBER.size * self.count
        saved = self._saved[-1].end if self._saved else 0
        return max(0, self.total_bytes - written) + (max(0, self._end - saved) if self.is_to_be_saved else 0)

    def add(self, rows: Sequence[bytes | memoryview]) -> None:
        """Keeps the rows of the next sequences, each of at least a byte: of all, or of none, and is full then."""
        if self.is_full or not rows:
            return
        try:
            self._grow(sum(len(data) + _COST_BYTES for data in rows), self.count + len(rows))
            end = self._end
            for number, data in enumerate(rows, self.count + 1):
                end = self._write(number, data, end)
        except (OSError, MemoryError) as error:
            self.stop(error)
            return
        self.count, self._end = self.count + len(rows), end

    def rows_bytes(self, number: int) -> int:
        """Of the rows of a sequence that it holds. Raises StorageError."""
        begin, end = self._place(number)
        return end - begin - _RECORD_BYTES

    def read(self, number: int) -> bytes:
        """The rows of a sequence that it holds.

        Raises StorageError where the disk does not give back what was written; it then holds those before it alone, the
        second time none, and is full: the edge still has the others.
        """
        begin, end = self._place(number)
        try:
            return self._opened(number, begin, end)
        except (OSError, InvalidTag, ValueError) as error:  # a nonce that is cut short
            raise self._is_damaged(number, error) from error

    def parts(self) -> dict[str, Part]:
        """The files of a checkpoint, for which nothing may be added until it is written; none where nothing is held,
        or checkpoints do not have it.

        What older ones have is in files of its own, which need not be written again. Small ones become one with those
        after them, so that there are few, and little is written twice.
        """
        files = [each for each in self._saved if each.end <= self._end]
        begin = files[-1].end if files else 0
        if begin < self._end:
            while files and files[-1].end - files[-1].begin <= self._end - begin:
                begin = files.pop().begin
            files.append(_Saved(begin, self._end, None))
        return {
            f"kept-{index}.bin": Part(each.end - each.begin, partial(self._chunks, each.begin, each.end), each.held)
            for index, each in enumerate(files if self.count and self.is_saved else [])
        }

    def were_saved(self, files: Mapping[str, Held]) -> None:
        """The files that `parts` gave are in a checkpoint now, among others."""
        begin, saved = 0, []
        for name, part in self.parts().items():
            saved.append(_Saved(begin, begin + part.total_bytes, files[name]))
            begin += part.total_bytes
        self._saved = saved

    def leave_out(self, error: Exception) -> None:
        """Checkpoints from now on do not have it: who goes on from one sends it again."""
        _log.warning(
            "checkpoints are saved without the activations that are kept",
            extra={"fields": {"owner": self.owner, "reason": str(error)}},
        )
        self.is_saved = False

    def stop(self, error: Exception) -> None:
        """Keeps what it holds, and no more."""
        reason = str(error) or type(error).__name__
        _log.warning("no more activations are kept", extra={"fields": {"owner": self.owner, "reason": reason}})
        self.is_full = True
        with contextlib.suppress(OSError):
            os.ftruncate(self._data, self._end)
            os.ftruncate(self._index, _NUMBER.size * self.count)
        self.total_bytes = self._end - len(_HEAD) + _NUMBER.size * self.count

    def _grow(self, size: int, count: int) -> None:
        """Raises OSError where there is no room for so many bytes more, or for so many sequences together."""
        if count > _MAX_SEQUENCES or not self._store.grows(self, size):
            raise OSError(errno.EDQUOT, _NO_ROOM)

    def _chunks(self, begin: int, end: int) -> Iterator[bytes]:
        for at in range(begin, end, _CHUNK_BYTES):
            yield os.pread(self._data, min(_CHUNK_BYTES, end - at), at)

    def load(self, saved: Sequence[Path]) -> None:
        """Holds what the files of a checkpoint do, and nothing else. Raises as `KeptStore.open` does."""
        try:
            size = sum(path.stat().st_size for path in saved)
            self._grow(size - len(_HEAD), 0)
            at = 0
            for path in saved:
                with path.open("rb") as file:
                    while chunk := file.read(_CHUNK_BYTES):
                        _write_all(self._data, chunk, at)
                        at += len(chunk)
                        self._end = max(self._end, at)  # so much of what was granted is written
            count = self._index_of(size)
        except OSError as error:
            self._end = len(_HEAD)
            self.stop(error)
            return
        self.count, self._end = count, size

    def _index_of(self, size: int) -> int:
        """Makes it anew of the records of the data; how many there are."""
        ends: list[int] = []
        end, count = len(_HEAD), 0
        with os.fdopen(os.dup(self._data), "rb", buffering=_INDEX_PIECE) as file:
            file.seek(0)
            if file.read(len(_HEAD)) != _HEAD:
                raise CheckpointError("the cloud's half of the checkpoint holds activations of another release")
            while end < size:
                head = file.read(_LENGTH.size)
                length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else size
                if _LENGTH.size + length <= _RECORD_BYTES or end + _LENGTH.size + length > size:
                    raise CheckpointError("the cloud's half of the checkpoint holds activations that are cut short")
                if end == len(_HEAD):
                    self._check_key(file.read(length))
                else:
                    file.seek(length, os.SEEK_CUR)
                end += _LENGTH.size + length
                ends.append(end)
                if len(ends) == _INDEX_PIECE or end == size:
                    self._grow(_NUMBER.size * len(ends), count + len(ends))
                    _write_all(self._index, struct.pack(f"<{len(ends)}Q", *ends), _NUMBER.size * count)
                    count += len(ends)
                    ends.clear()
        return count

    def _check_key(self, record: bytes) -> None:
        try:
            self._cipher.decrypt(record[:_NONCE_BYTES], record[_NONCE_BYTES:], _NUMBER.pack(1))
        except InvalidTag:
            raise PreconditionError(
                "the activations in the checkpoint were kept with another keep_key than the one that came"
            ) from None

    def _write(self, number: int, data: bytes | memoryview, begin: int) -> int:
        """Gives the end."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._cipher.encrypt(nonce, data, _NUMBER.pack(number))
        end = begin + _LENGTH.size + len(nonce) + len(sealed)
        _write_all(self._data, _LENGTH.pack(len(nonce) + len(sealed)) + nonce + sealed, begin)
        _write_all(self._index, _NUMBER.pack(end), _NUMBER.size * (number - 1))
        return end

    def _opened(self, number: int, begin: int, end: int) -> bytes:
        """The rows in a record."""
        record = os.pread(self._data, end - begin, begin)[_LENGTH.size :]
        return self._cipher.decrypt(record[:_NONCE_BYTES], record[_NONCE_BYTES:], _NUMBER.pack(number))

    def _place(self, number: int) -> tuple[int, int]:
        """Of a record."""
        try:
            begin, end = self._end_of(number - 1), self._end_of(number)
            if not begin + _RECORD_BYTES < end <= self._end:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return begin, end
        except (OSError, struct.error) as error:
            raise self._is_damaged(number, error) from error

    def _end_of(self, number: int) -> int:
        if not number:
            return len(_HEAD)
        end: int = _NUMBER.unpack(os.pread(self._index, _NUMBER.size, _NUMBER.size * (number - 1)))[0]
        return end

    def _is_damaged(self, number: int, error: Exception) -> StorageError:
        reason = str(error) or type(error).__name__
        _log.error("kept activations cannot be read", extra={"fields": {"owner": self.owner, "reason": reason}})
        before, self.is_full = self._end, True
        self.count, self._end = 0, len(_HEAD)
        if number > 1 and not self._was_damaged:
            self._was_damaged = True  # whoever calls may find more: a second time there is nothing left to find it in
            with contextlib.suppress(OSError, struct.error, InvalidTag, ValueError):
                begin, end = self._end_of(number - 2), self._end_of(number - 1)
                if begin + _RECORD_BYTES < end <= before:  # else a length that no memory holds
                    self._opened(number - 1, begin, end)
                    self.count, self._end = number - 1, end
        return StorageError("the cloud's disk does not give back the activations that were kept")


def _nameless(directory: Path) -> int:
    """A file that ends when it is closed."""
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        return os.dup(file.fileno())


def _write_all(descriptor: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, at)
        at += written
        view = view[written:]
