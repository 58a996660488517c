"""Rows that are kept on a disk, of one owner and one key."""

from __future__ import annotations

import os
from pathlib import Path

from sft_cloud.identity import ANONYMOUS, Identity
from sft_cloud.storage import CheckpointStore, KeptRows, KeptStore

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
RUN = "0123456789abcdef" * 2
ROWS = [b"the rows of one", b"2", b"and of another sequence" * 100]


def keeping(directory: Path, max_bytes: int = 1 << 20, owner: Identity = ANONYMOUS) -> KeptRows:
    return opened(KeptStore(directory, max_bytes), owner)


def opened(
    store: KeptStore, owner: Identity = ANONYMOUS, saved: dict[str, Path] | None = None, run_id: str = ""
) -> KeptRows:
    rows = store.open(owner, KEY, saved, run_id)
    assert rows is not None
    return rows


def content(rows: KeptRows) -> bytes:
    return b"".join(rows._chunks(0, rows._end))


def read(rows: KeptRows) -> list[bytes]:
    return [rows.read(number) for number in range(1, rows.count + 1)]


def damage(rows: KeptRows, number: int) -> None:
    """Changes the last byte of a row."""
    place = rows._place(number)[1] - 1
    (byte,) = os.pread(rows._data, 1, place)
    os.pwrite(rows._data, bytes([byte ^ 1]), place)


def saved(rows: KeptRows, store: CheckpointStore, step: int = 0) -> dict[str, Path]:
    """A checkpoint of it, as an engine saves one."""
    files = store.run("ann", RUN).save(step, rows.parts())
    rows.were_saved(files.files)
    with store.run("ann", RUN).newest_of([(step, files.sha256)]) as found:
        assert found is not None
        return found
