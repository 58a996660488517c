"""Rows that are kept, in checkpoints: what one held goes on, for who has the key, and is not written again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from support.kept_rows import KEY, OTHER_KEY, ROWS, RUN, content, damage, keeping, opened, read, saved

from sft.errors import CheckpointError, StorageError
from sft_cloud.errors import PreconditionError
from sft_cloud.identity import ANONYMOUS
from sft_cloud.storage import CheckpointStore, KeptStore
from sft_cloud.storage.files import LocalFiles


def test_what_a_checkpoint_held_goes_on(tmp_path: Path, store: CheckpointStore) -> None:
    rows = keeping(tmp_path)
    assert saved(rows, store) == {}
    rows.add(ROWS)
    files = saved(rows, store)
    on = opened(KeptStore(tmp_path / "elsewhere", 1 << 20), saved={**files, "else.bin": tmp_path})
    for path in files.values():
        path.unlink()
    assert read(on) == ROWS
    assert on.total_bytes == rows.total_bytes
    rows.add([b"more"])
    on.add([b"else"])
    assert (on.read(4), rows.read(4)) == (b"else", b"more")
    assert content(on)[: -len(b"else") - 16] != content(rows)[: -len(b"more") - 16]  # nonces were drawn for each


@pytest.mark.parametrize("links", [True, False])
def test_what_a_checkpoint_held_is_not_written_again(
    tmp_path: Path, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """A checkpoint after every few sequences: few files, each written a few times at most, whatever was deleted."""
    written: list[int] = []
    write = LocalFiles.write

    def counted(self: LocalFiles, name: str, chunks) -> None:
        data = b"".join(chunks)
        written.append(len(data) if name.endswith(".bin") else 0)
        write(self, name, [data])

    monkeypatch.setattr(LocalFiles, "write", counted)
    if not links:

        def none(*arguments: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", none)
    rows = keeping(tmp_path)
    for step in range(64):
        if step < 50:
            rows.add([b"x" * 100])
        files = saved(rows, store, step)
        assert len(files) <= 6
        store.run("ann", RUN).keep([step], step)
    on = opened(KeptStore(tmp_path / "elsewhere", 1 << 20), saved=files)
    assert read(on) == read(rows) == [b"x" * 100] * 50
    assert (sum(written) < 4 * rows.total_bytes) is links
    assert sorted(path.stat().st_nlink for path in files.values()) == [1] * len(files)


def test_more_than_ten_files_are_in_order(tmp_path: Path, store: CheckpointStore) -> None:
    rows = keeping(tmp_path)
    for size in range(12, 0, -1):
        rows.add([bytes(2**size)])
        files = saved(rows, store, size)
    assert len(files) > 10
    assert read(opened(KeptStore(tmp_path, 1 << 20), saved=files)) == read(rows)


def test_damage_after_a_checkpoint(tmp_path: Path, store: CheckpointStore) -> None:
    """What is held then is saved again, and nothing else."""
    rows = keeping(tmp_path)
    for _ in range(2):
        rows.add(ROWS)
        saved(rows, store)
    damage(rows, 2)
    with pytest.raises(StorageError):
        rows.read(2)
    assert read(opened(KeptStore(tmp_path, 1 << 20), saved=saved(rows, store, 1))) == ROWS[:1]


def test_a_checkpoint_of_another_key(tmp_path: Path, store: CheckpointStore) -> None:
    rows = keeping(tmp_path)
    rows.add(ROWS)
    with pytest.raises(PreconditionError, match="another keep_key"):
        KeptStore(tmp_path, 1 << 20).open(ANONYMOUS, OTHER_KEY, saved(rows, store))


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: d + b"\0" * 9, lambda d: b"x" + d])
def test_a_checkpoint_that_is_none_of_ours(tmp_path: Path, store: CheckpointStore, change) -> None:
    rows = keeping(tmp_path)
    rows.add(ROWS)
    files = saved(rows, store)
    (path,) = files.values()
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError):
        KeptStore(tmp_path, 1 << 20).open(ANONYMOUS, KEY, files)


def test_a_checkpoint_for_which_there_is_no_room(
    tmp_path: Path, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = keeping(tmp_path)
    rows.add(ROWS)
    files = saved(rows, store)
    on = opened(KeptStore(tmp_path, 2000), saved=files)
    assert (on.count, on.is_full) == (0, True)
    roomy = KeptStore(tmp_path, 1 << 20)
    write = os.pwrite

    def full(descriptor: int, data: bytes, at: int) -> int:
        if len(data) > 16:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    on = opened(roomy, saved=files)
    assert (on.count, on.is_full) == (0, True)
    monkeypatch.undo()
    assert read(on) == []
