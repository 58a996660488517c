"""Rows that are kept on a disk: what is read back is what was kept, for who has the key, and nobody sees more."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.kept_rows import KEY, ROWS, RUN, content, damage, keeping, opened, read, saved

from sft.errors import StorageError
from sft_cloud.identity import ANONYMOUS, Identity
from sft_cloud.storage import CheckpointStore, KeptStore, kept_rows


def test_what_is_read_back(tmp_path: Path) -> None:
    rows = keeping(tmp_path)
    rows.add(ROWS[:2])
    rows.add(ROWS[2:])
    rows.add([])
    assert (rows.count, rows.is_full) == (3, False)
    assert read(rows) == ROWS
    assert [rows.rows_bytes(number) for number in (1, 2, 3)] == [len(data) for data in ROWS]


def test_nothing_of_it_is_seen(tmp_path: Path) -> None:
    """No name on the disk, no row and no key in the file; and the same rows never look the same."""
    rows = keeping(tmp_path / "made")
    rows.add(ROWS)
    once = content(rows)
    rows.add(ROWS)
    both = content(rows)
    assert list((tmp_path / "made").iterdir()) == []
    for secret in (KEY, ROWS[0], ROWS[2]):
        assert secret not in both
    assert os.fstat(rows._data).st_mode & 0o777 == 0o600
    assert both.startswith(once)
    assert both[len(once) :] != once[16:]


def test_it_goes_with_who_has_it(tmp_path: Path) -> None:
    store = KeptStore(tmp_path, 300)
    rows = opened(store)
    rows.add([b"x" * 200])
    descriptors = [rows._data, rows._index]
    late = opened(store)
    late.add([b"y" * 200])
    assert late.is_full
    del rows
    gc.collect()
    for descriptor in descriptors:
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.fstat(descriptor)
    again = opened(store)
    again.add([b"y" * 200])
    assert again.count == 1


def test_what_is_for_one_caller(tmp_path: Path) -> None:
    """Of all its sessions together; what others keep is no matter. All of a message, or nothing."""
    store = KeptStore(tmp_path, 1000)
    first, second = (opened(store, Identity("ann")) for _ in range(2))
    other = opened(store, Identity("bob"))
    first.add([b"x" * 400])
    second.add([b"x" * 400])
    other.add([b"x" * 900])
    assert (first.count, second.count, other.count) == (1, 1, 1)
    first.add([b"y", b"x" * 100])
    assert (first.count, first.is_full) == (1, True)
    first.add([b"z"])  # there would be room, but it was said that nothing is kept any more
    assert first.count == 1
    assert read(first) == [b"x" * 400]
    second.add([b"y"])
    assert (second.count, second.is_full) == (2, False)
    assert KeptStore(tmp_path, 0).open(ANONYMOUS, KEY) is None


def test_a_disk_that_is_full(tmp_path: Path, free: Callable[[int], None]) -> None:
    free(500)
    rows = keeping(tmp_path)
    rows.add([b"x" * 400])
    rows.add([b"x" * 500])
    assert (rows.count, rows.is_full) == (1, True)


def test_room_for_what_is_not_saved_yet(tmp_path: Path, free: Callable[[int], None], store: CheckpointStore) -> None:
    """Checkpoints have it once more, of all sessions whose runs have names."""
    kept = KeptStore(tmp_path, 1 << 20)
    rows, other, unsaved = opened(kept, run_id=RUN), opened(kept, run_id="f" * 32), opened(kept)
    free(1000)
    rows.add([b"x" * 400])  # 440 on the disk, twice
    other.add([b"x" * 400])
    assert (rows.count, other.is_full) == (1, True)
    unsaved.add([b"x" * 400])
    assert unsaved.count == 1
    unsaved.add([b"x" * 500])
    assert unsaved.is_full
    saved(rows, store)
    other = opened(kept, run_id="e" * 32)
    other.add([b"x" * 400])
    assert other.count == 1
    other.leave_out(StorageError("no room"))
    assert (other.parts(), other.bytes_to_come) == ({}, 0)


def test_what_is_granted_and_not_yet_written(
    tmp_path: Path, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sessions at once: the second finds what the first is about to write taken."""
    kept, write = KeptStore(tmp_path, 1 << 20), os.pwrite
    rows, other = opened(kept), opened(kept)
    free(600)

    def meanwhile(descriptor: int, data: bytes, at: int) -> int:
        monkeypatch.setattr(os, "pwrite", write)
        other.add([b"y" * 400])
        return write(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", meanwhile)
    rows.add([b"x" * 400])
    assert (rows.count, other.count, other.is_full) == (1, 0, True)
    late = opened(kept)
    late.add([b"y" * 400])
    assert late.count == 1


def test_an_older_session_of_the_same_run_is_in_nobodys_way(tmp_path: Path) -> None:
    kept = KeptStore(tmp_path, 1000)
    older = opened(kept, run_id=RUN)
    older.add([b"x" * 400])
    newer, other = opened(kept, run_id=RUN), opened(kept, run_id="f" * 32)
    newer.add([b"x" * 800])
    other.add([b"x" * 200])
    older.add([b"y"])
    assert (newer.count, other.is_full, older.is_full, read(older)) == (1, True, True, [b"x" * 400])


def test_many_small_sequences(tmp_path: Path, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their index is counted, is made anew in pieces, and has an end."""
    monkeypatch.setattr(kept_rows, "_MAX_SEQUENCES", 1000)
    monkeypatch.setattr(kept_rows, "_INDEX_PIECE", 64)
    rows = keeping(tmp_path)
    for _ in range(10):
        rows.add([b"x"] * 100)
    assert rows.total_bytes == os.fstat(rows._data).st_size - 16 + os.fstat(rows._index).st_size == 1000 * 41
    files = saved(rows, store)
    written: list[int] = []
    write = os.pwrite

    def noted(descriptor: int, data: memoryview, at: int) -> int:
        written.append(len(data))
        return write(descriptor, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", noted)
        on = opened(KeptStore(tmp_path, 1 << 20), saved=files)
    assert (read(on), on.total_bytes) == ([b"x"] * 1000, rows.total_bytes)
    assert written == [16, 33 * 1000 + 16, *[8 * 64] * 15, 8 * 40]
    on.add([b"x"])
    assert (on.count, on.is_full) == (1000, True)
    assert opened(KeptStore(tmp_path, 40_000), saved=files).is_full
    monkeypatch.setattr(kept_rows, "_MAX_SEQUENCES", 999)
    assert opened(KeptStore(tmp_path, 1 << 20), saved=files).is_full


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_a_disk_that_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    rows = keeping(tmp_path)
    rows.add(ROWS)
    before = content(rows)
    write, calls = os.pwrite, []

    def full(descriptor: int, data: memoryview, at: int) -> int:
        calls.append(at)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    rows.add([b"more", b"of it"])
    assert len(calls) == fails_at
    assert (rows.count, rows.is_full) == (3, True)
    assert content(rows) == before
    assert os.fstat(rows._data).st_size == len(before)
    assert read(rows) == ROWS


def test_a_process_without_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = keeping(tmp_path)
    rows.add(ROWS)

    def nothing(*arguments: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(rows, "_cipher", SimpleNamespace(encrypt=nothing, decrypt=rows._cipher.decrypt))
    rows.add(ROWS)
    assert (rows.count, rows.is_full, read(rows)) == (3, True, ROWS)


def test_a_write_that_is_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, write = keeping(tmp_path), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: write(descriptor, data[:3], at))
    rows.add(ROWS)
    assert read(rows) == ROWS


def test_a_disk_without_a_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert KeptStore(tmp_path / "file", 1000).open(ANONYMOUS, KEY) is None


# What the disk does not give back.


@pytest.mark.parametrize("where", ["data", "index", "all of the index"])
def test_rows_that_are_damaged(tmp_path: Path, where: str) -> None:
    """Then it holds those before, and says that it keeps no more: the edge has the others."""
    rows = keeping(tmp_path)
    rows.add(ROWS)
    rows.add(ROWS)
    if where == "data":
        damage(rows, 3)
    elif where == "index":
        os.pwrite(rows._index, b"\xff" * 8, 16)
    else:
        os.ftruncate(rows._index, 0)
    with pytest.raises(StorageError, match="does not give back"):
        rows.read(3)
    left = 0 if where == "all of the index" else 2
    assert (rows.count, rows.is_full) == (left, True)
    assert read(rows) == ROWS[:left]
    assert sum(part.total_bytes for part in rows.parts().values()) == (len(content(rows)) if left else 0)


@pytest.mark.parametrize(
    "place", [b"\xff" * 8, (1 << 40).to_bytes(8, "little"), b"\x31" + bytes(7)], ids=["-1", "huge", "near"]
)
def test_a_place_that_is_damaged_beside_rows_that_are(tmp_path: Path, place: bytes) -> None:
    """No length of memory, or of a checkpoint, is taken from it."""
    rows = keeping(tmp_path)
    rows.add(ROWS)
    os.pwrite(rows._index, place, 8)
    with pytest.raises(StorageError):
        rows.read(3)
    assert (rows.count, content(rows), rows.parts()) == (0, content(rows)[:16], {})


def test_a_disk_that_gives_nothing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step fails, once: of a run in which several do one after the other nothing would come."""
    rows = keeping(tmp_path)
    rows.add(ROWS)
    read_back = os.pread

    def broken(descriptor: int, size: int, at: int) -> bytes:
        if descriptor == rows._data:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_back(descriptor, size, at)

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(StorageError):
        rows.read(3)
    assert rows.count == 0


def test_damage_for_the_second_time(tmp_path: Path) -> None:
    rows = keeping(tmp_path)
    rows.add(ROWS * 10)
    for number, left in ((20, 19), (10, 0)):
        damage(rows, number)
        with pytest.raises(StorageError):
            rows.read(number)
        assert (rows.count, len(content(rows)) > 16) == (left, left > 0)


def test_rows_in_the_place_of_others(tmp_path: Path) -> None:
    rows = keeping(tmp_path)
    rows.add([b"one", b"two"])
    (begin, middle), (_, end) = rows._place(1), rows._place(2)
    one, two = (os.pread(rows._data, upto - at, at) for at, upto in ((begin, middle), (middle, end)))
    os.pwrite(rows._data, two + one, begin)
    with pytest.raises(StorageError):
        rows.read(2)
