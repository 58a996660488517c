"""Blobs: stored whole under their own hash, or not at all."""

import hashlib
import os
import shutil
from collections import namedtuple

import pytest

from sft.errors import ProtocolError, StorageError
from sft_cloud.store import MAX_BLOB_BYTES, BlobStore

CONTENT = b"net_2" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
CHUNKS = [CONTENT[:3000], CONTENT[3000:]]


@pytest.fixture
def store(tmp_path):
    return BlobStore(tmp_path / "state" / "blobs")


def files(tmp_path):
    return sorted(path.name for path in (tmp_path / "state" / "blobs").iterdir())


def test_a_blob_is_found_under_its_hash(store, tmp_path):
    assert store.find(SHA256) is None
    store.add(SHA256, len(CONTENT), CHUNKS)
    assert store.find(SHA256).read_bytes() == CONTENT
    assert files(tmp_path) == [f"{SHA256}.safetensors"]
    assert BlobStore(tmp_path / "state" / "blobs").find(SHA256) is not None


def test_what_is_there_is_not_read_again(store):
    store.add(SHA256, len(CONTENT), CHUNKS)
    chunks = iter(CHUNKS)
    store.add(SHA256, len(CONTENT), chunks)
    assert list(chunks) == CHUNKS


@pytest.mark.parametrize(
    ("sha256", "total_bytes", "chunks", "says"),
    [
        (hashlib.sha256(b"other").hexdigest(), len(CONTENT), CHUNKS, "upload them again"),
        (SHA256, len(CONTENT) + 1, CHUNKS, "fewer bytes than the 5001 announced"),
        (SHA256, len(CONTENT) - 1, CHUNKS, "more bytes than the 4999 announced"),
        (SHA256, MAX_BLOB_BYTES + 1, CHUNKS, "too large"),
        (SHA256, 0, CHUNKS, "more bytes"),
    ],
)
def test_what_does_not_match_leaves_nothing(store, tmp_path, sha256, total_bytes, chunks, says):
    with pytest.raises(ProtocolError, match=says):
        store.add(sha256, total_bytes, chunks)
    assert files(tmp_path) == []


def test_an_endless_upload_is_cut_short(store):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield b"x" * 1000

    with pytest.raises(ProtocolError, match="more bytes"):
        store.add(SHA256, 5000, endless())
    assert len(taken) == 6


def test_an_upload_that_breaks_leaves_nothing(store, tmp_path):
    def broken():
        yield CONTENT[:100]
        raise ConnectionError("gone")

    with pytest.raises(StorageError):
        store.add(SHA256, len(CONTENT), broken())
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", "/etc/passwd", SHA256[:-1], SHA256.upper(), SHA256 + "\n", "g" * 64, "a/" * 32]
)
def test_only_hashes_name_blobs(store, name):
    with pytest.raises(ProtocolError, match="is not a SHA-256"):
        store.find(name)
    with pytest.raises(ProtocolError, match="is not a SHA-256"):
        store.add(name, 1, [b"x"])


def test_a_blob_larger_than_the_disk_is_refused_before_it_comes(store, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 6_000, 4_000))
    with pytest.raises(StorageError, match="4000 bytes left, the upload needs 5000"):
        store.add(SHA256, len(CONTENT), CHUNKS)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_that_fills_up_is_an_error_of_its_own(store, tmp_path, monkeypatch):
    def on_a_full_disk(file):
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    monkeypatch.setattr(os, "fsync", on_a_full_disk)
    with pytest.raises(StorageError, match="No space left on device"):
        store.add(SHA256, len(CONTENT), CHUNKS)
    assert files(tmp_path) == []


def test_a_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "state").write_text("a file")
    with pytest.raises(StorageError, match="choose another --state-dir"):
        BlobStore(tmp_path / "state" / "blobs")


def test_parts_left_by_a_killed_server_are_removed_when_old(tmp_path):
    directory = tmp_path / "blobs"
    directory.mkdir()
    for name in ("old.part", "new.part"):
        (directory / name).write_bytes(b"x")
    os.utime(directory / "old.part", (0, 0))
    BlobStore(directory)
    assert [path.name for path in directory.iterdir()] == ["new.part"]
