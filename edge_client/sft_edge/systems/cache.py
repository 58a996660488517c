"""Activations of a frozen edge on disk: a row's is the same in every epoch, so it is computed once.

The file begins with what its content depends on (the run, net_1 and the codec), then come records: the key of a
sequence, which is a hash of its tokens, a checksum, and the bytes of its rows as the wire has them. A record that was
not written to its end, as when the machine lost its power, is cut off when the file is opened.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from sft.batch import Batch
from sft.errors import StorageError
from sft.files.room import free_bytes
from sft_edge.files import storage_errors

_BEGIN = b"sft activations "
KEY_BYTES = 16
"""Of what stands for a sequence."""
_HEAD = struct.Struct(f"<{KEY_BYTES}sII")  # key, bytes of the rows, CRC-32 of both


def keys_of(batch: Batch, salt: bytes = b"") -> List[bytes]:
    """One for each sequence: of its tokens, whatever it is padded to and beside whichever it is; with another `salt`
    another."""
    keys = []
    columns = sorted(batch.inputs)
    for index, length in enumerate(batch.lengths):
        digest = hashlib.blake2b(digest_size=KEY_BYTES, salt=salt)
        for name in columns:
            digest.update(f"{name} {length} ".encode())
            digest.update(batch.inputs[name][index, :length].contiguous().numpy().tobytes())
        keys.append(digest.digest())
    return keys


def is_ours(path: Path) -> bool:
    """Whether nothing is there, or what an ActivationCache may have written. Raises StorageError."""
    with storage_errors(path):
        try:
            with open(str(path), "rb") as file:
                begin = file.read(len(_BEGIN))
        except FileNotFoundError:
            return True
    return _BEGIN.startswith(begin.rstrip(b"\0"))  # zeros: the machine lost its power


class ActivationCache:
    """One file. Not for several threads or processes at once."""

    def __init__(
        self, path: Path, content: str, on_status: Callable[[str], None] = lambda text: None, leaves: int = 0
    ) -> None:
        """`content`: what the activations depend on, in a line; a file of another is begun anew. `on_status` is told
        of that, and of a disk that takes no more, or has less than `leaves` bytes left. Raises StorageError.
        """
        self._path = path
        self._on_status = on_status
        self._leaves = leaves
        self._places: Dict[bytes, Tuple[int, int, int]] = {}
        self._is_full = False
        head = _BEGIN + f"1 {content}\n".encode()
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(str(path), "a+b", buffering=0)  # noqa: SIM115  # closed by `close`
            try:
                self._open(head)
            except BaseException:
                self._file.close()
                raise

    def __len__(self) -> int:
        """Sequences that are kept."""
        return len(self._places)

    def find(self, keys: Sequence[bytes]) -> Optional[List[bytes]]:
        """The rows of each sequence; None where one of them is not here. Raises StorageError."""
        if not all(key in self._places for key in keys):
            return None
        return [self._read(key) for key in keys]

    def add(self, keys: Sequence[bytes], rows: Sequence[bytes]) -> None:
        """Keeps those that are new. Where the disk takes no more, nothing is kept from then on."""
        if self._is_full:
            return
        try:
            if self._leaves and free_bytes(self._path.parent) < self._leaves:
                raise OSError(errno.ENOSPC, "what the disk has left is for the model and its checkpoints")
            for key, data in zip(keys, rows):
                if key not in self._places:
                    self._append(key, data)
        except OSError as error:
            self._is_full = True
            self._on_status(
                f"{self._path} takes no more activations ({error.strerror}): those of other rows are computed again "
                "in every epoch"
            )

    def close(self) -> None:
        """The file stays."""
        self._file.close()

    def _open(self, head: bytes) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if os.pread(self._file.fileno(), len(head), 0) != head:
            if size:
                self._on_status(
                    f"{self._path} holds activations of another run, model, codec, device or release of torch: they "
                    "are computed anew"
                )
            self._file.truncate(0)
            self._file.write(head)
        else:
            self._file.truncate(self._scan(len(head), size))
        self._end = os.fstat(self._file.fileno()).st_size

    def _scan(self, at: int, size: int) -> int:
        """Finds the records, and where the last whole one ends."""
        while at + _HEAD.size <= size:
            key, length, checksum = _HEAD.unpack(os.pread(self._file.fileno(), _HEAD.size, at))
            begin = at + _HEAD.size
            if begin + length > size or _checksum(key, os.pread(self._file.fileno(), length, begin)) != checksum:
                break
            self._places[key] = (begin, length, checksum)
            at = begin + length
        return at

    def _append(self, key: bytes, data: bytes) -> None:
        checksum = _checksum(key, data)
        record = _HEAD.pack(key, len(data), checksum) + data
        try:
            written = self._file.write(record)
            if written != len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise
        self._places[key] = (self._end + _HEAD.size, len(data), checksum)
        self._end += len(record)

    def _read(self, key: bytes) -> bytes:
        begin, length, checksum = self._places[key]
        with storage_errors(self._path):
            data = os.pread(self._file.fileno(), length, begin)
        if _checksum(key, data) != checksum:
            raise StorageError(f"{self._path} is damaged: delete it, and go on with --resume-from-checkpoint")
        return data


def _checksum(key: bytes, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(key))  # of zeros it is not zero: what was never written is no record
