"""Blobs: stored whole under their own hash, or not at all."""

import hashlib
import json
import os
import shutil
from collections import namedtuple

import pytest

from sft.errors import ProtocolError, StorageError
from sft_cloud.errors import QuotaError
from sft_cloud.identity import Identity, Limits
from sft_cloud.storage.blobs import MAX_BLOB_BYTES, MAX_HEADER_BYTES, BlobStore, directory_name, read_blob

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


def test_a_caller_whose_directory_cannot_be_made_learns_no_path_of_the_server(store, tmp_path, caplog):
    (tmp_path / "state" / "blobs" / "alice").write_text("in the way")
    with pytest.raises(StorageError, match="the cloud cannot store uploads of yours") as caught:
        store.of(Identity("alice"))
    assert str(tmp_path) not in str(caught.value)
    assert str(tmp_path / "state" / "blobs" / "alice") in caplog.records[0].fields["reason"]


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
    with pytest.raises(StorageError, match="4,000 bytes left, the upload needs 5,000"):
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
    old, new = (f".{SHA256}.safetensors.{nonce}.part" for nonce in ("0" * 8, "1" * 8))
    for name in (old, new, "song.part"):
        (directory / name).write_bytes(b"x")
        if name != new:
            os.utime(directory / name, (0, 0))
    BlobStore(directory)
    assert {path.name for path in directory.iterdir()} == {new, "song.part"}


def test_what_is_no_blob_makes_no_room(tmp_path):
    """An operator's own file: it does not count, and it is not deleted."""
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    os.utime(tmp_path / "model.safetensors", (0, 0))
    store = BlobStore(tmp_path, max_bytes=len(CONTENT))
    store.add(SHA256, len(CONTENT), CHUNKS)
    assert {path.name for path in tmp_path.iterdir()} == {f"{SHA256}.safetensors", "model.safetensors"}


def put(store, content):
    sha256 = hashlib.sha256(content).hexdigest()
    store.add(sha256, len(content), [content])
    return sha256


def test_every_caller_has_blobs_of_its_own(store, tmp_path):
    alice, bob = store.of(Identity("alice")), store.of(Identity("bob"))
    put(alice, CONTENT)
    assert alice.find(SHA256) is not None
    assert bob.find(SHA256) is None
    chunks = iter(CHUNKS)
    bob.add(SHA256, len(CONTENT), chunks)
    assert list(chunks) == [], "what another has uploaded is uploaded again, or who has what could be found out"
    assert files(tmp_path) == ["alice", "bob"]
    assert store.of(Identity("alice")).find(SHA256) == alice.find(SHA256)


@pytest.mark.parametrize(
    "name", ["..", ".", "", "../alice", "/etc", "a/b", "a\x00b", "a\nb", "é" * 300, "C:\\x", "-rf", "~", "\udcff"]
)
def test_no_name_leads_out_of_the_directory(store, tmp_path, name):
    put(store.of(Identity(name)), CONTENT)
    (file,) = tmp_path.rglob("*.safetensors")
    assert file.parent.parent == tmp_path / "state" / "blobs"
    assert file.parent.name == directory_name(Identity(name))


def test_names_do_not_share_a_directory():
    names = ["a", "A", "a.", "a%2E", "a/", "a%2F", "", "%", "x" * 300, "x" * 301]
    assert len({directory_name(Identity(name)) for name in names}) == len(names)


def test_a_caller_has_room_for_so_much(store):
    alice = store.of(Identity("alice", Limits(max_upload_bytes=2500)))
    first, second = put(alice, b"1" * 1000), put(alice, b"2" * 1000)
    with pytest.raises(QuotaError, match="keeps at most 2500 bytes of uploads for you; there are 2000, and 1000 more"):
        put(alice, b"3" * 1000)
    put(store.of(Identity("bob", Limits(max_upload_bytes=2500))), b"3" * 2500)
    long_ago = alice.find(first).stat().st_mtime - 25 * 3600
    os.utime(alice.find(first), (long_ago, long_ago))
    os.utime(alice.find(second), (long_ago - 1, long_ago - 1))
    assert alice.find(second), "which is a use"
    third = put(alice, b"3" * 1000)
    assert [alice.find(sha256) is not None for sha256 in (first, second, third)] == [False, True, True]


def test_what_is_under_way_counts(store):
    alice = store.of(Identity("alice", Limits(max_upload_bytes=2500)))

    def and_meanwhile():
        with pytest.raises(QuotaError):
            put(alice, b"2" * 1000)
        yield b"1" * 2000

    alice.add(hashlib.sha256(b"1" * 2000).hexdigest(), 2000, and_meanwhile())
    put(alice, b"3" * 500)
    with pytest.raises(ProtocolError):
        alice.add(SHA256, 0, [b"x"])
    put(store.of(Identity("alice", Limits(max_upload_bytes=3500))), b"2" * 1000)  # the limits of a token may change


def test_who_has_no_limit_has_the_server_s(tmp_path):
    store = BlobStore(tmp_path, max_bytes=100)
    with pytest.raises(QuotaError):
        put(store.of(Identity("alice")), b"x" * 101)
    put(store.of(Identity("bob", Limits(max_upload_bytes=1000))), b"x" * 101)


def hostile(header, data=b"", header_bytes=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if header_bytes is None else header_bytes).to_bytes(8, "little") + header + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        b"\xff" * 100,
        hostile({}, header_bytes=1 << 62),
        hostile({}, header_bytes=MAX_HEADER_BYTES + 1),
        hostile(b" " * (MAX_HEADER_BYTES + 1)),
        hostile(b"[" * 100_000),
        hostile(b'{"a":' * 100_000),
        hostile({"a": entry(shape=[1 << 63, 1 << 63], offsets=(0, 0))}),
        hostile({"a": entry(shape=[0, 1 << 63], offsets=(0, 0))}),
        hostile({"a": entry(offsets=(0, 400))}, bytes(4)),
        hostile({"a": entry(), "b": entry()}, bytes(4)),
        hostile({"a": entry(dtype="C64", offsets=(0, 8))}, bytes(8)),
        hostile({"a": entry(dtype="F8_E4M3", offsets=(0, 1))}, bytes(1)),
        hostile({"a": entry(dtype="nonsense")}, bytes(4)),
        hostile(b'{"\xff": {}}'),
        b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix",  # a pickle
    ],
    ids=lambda content: str(content[:40]),
)
def test_files_that_are_no_safetensors(store, content):
    with pytest.raises(ProtocolError, match="blob"):
        read_blob(store.find(put(store, content)))
