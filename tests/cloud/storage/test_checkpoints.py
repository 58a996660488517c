"""The cloud's store of checkpoints, on a directory and on an object store, without a session."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from sft.errors import ProtocolError, StorageError, UsageError
from sft.tensors.manifest import MANIFEST_FILE, Manifest
from sft_cloud.identity import Identity
from sft_cloud.storage import checkpoints as checkpoints_module
from sft_cloud.storage.blobs import directory_name
from sft_cloud.storage.checkpoints import CheckpointStore, Part, RunCheckpoints
from sft_cloud.storage.files import FsspecFiles, LocalFiles

RUN, OTHER_RUN = "0" * 32, "f" * 32


def parts(**files: bytes) -> dict[str, Part]:
    return {f"{name}.bin": Part(len(data), lambda data=data: [data]) for name, data in files.items()}


@pytest.fixture(params=["directory", "object store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "directory":
        yield str(tmp_path / "checkpoints")
        return
    memory = fsspec.filesystem("memory")
    bucket = f"memory://bucket-{secrets.token_hex(4)}"
    yield f"{bucket}/checkpoints"
    with contextlib.suppress(FileNotFoundError):
        memory.rm(bucket, recursive=True)


@pytest.fixture
def store(place: str) -> CheckpointStore:
    return CheckpointStore(place)


@pytest.fixture
def run(store: CheckpointStore) -> RunCheckpoints:
    return store.run("somebody", RUN)


def found(run: RunCheckpoints, *wanted: tuple[int, str]) -> dict[str, bytes] | None:
    with run.newest_of(wanted) as files:
        return None if files is None else {name: path.read_bytes() for name, path in files.items()}


def names(run: RunCheckpoints) -> list[str]:
    return run._files.children(run._directory)


def file_of(run: RunCheckpoints, step: int, name: str) -> str:
    (directory,) = [one for one in names(run) if one.startswith(f"{step}-")]
    return f"{run._directory}/{directory}/{name}"


def replace(run: RunCheckpoints, name: str, data: bytes) -> None:
    run._files.remove(name)
    run._files.write(name, [data])


def test_what_is_saved_is_found_again(run: RunCheckpoints, place: str) -> None:
    saved = run.save(10, parts(a=b"one", b=b"two" * 1000))
    assert (saved.step, saved.total_bytes) == (10, 3003)
    assert found(run, (10, saved.sha256)) == {"a.bin": b"one", "b.bin": b"two" * 1000}
    another_server = CheckpointStore(place).run("somebody", RUN)
    assert found(another_server, (10, saved.sha256)) == {"a.bin": b"one", "b.bin": b"two" * 1000}


def test_the_newest_of_those_that_are_wanted_is_taken(run: RunCheckpoints) -> None:
    saved = {step: run.save(step, parts(a=str(step).encode())).sha256 for step in (10, 30, 20)}
    assert found(run, *saved.items()) == {"a.bin": b"30"}
    assert found(run, (10, saved[10]), (20, saved[20])) == {"a.bin": b"20"}
    assert found(run, (40, "a" * 64), (10, saved[10])) == {"a.bin": b"10"}
    assert found(run, (20, saved[30])) is None
    assert found(run) is None


@pytest.mark.parametrize("what", ["changed", "cut", "lost", "manifest lost", "manifest changed"])
def test_what_is_not_whole_is_not_there(run: RunCheckpoints, what: str) -> None:
    old, new = run.save(10, parts(a=b"old")), run.save(20, parts(a=b"new", b=b"beside"))
    data, manifest = file_of(run, 20, "a.bin"), file_of(run, 20, MANIFEST_FILE)
    if what == "changed":
        replace(run, data, b"odd")
    elif what == "cut":
        replace(run, data, b"ne")
    elif what == "lost":
        run._files.remove(data)
    elif what == "manifest lost":
        run._files.remove(manifest)
    else:
        replace(run, manifest, (run._files.read(manifest, 1 << 20) or b"").replace(b'"step": 20', b'"step": 10'))
    assert found(run, (20, new.sha256), (10, old.sha256)) == {"a.bin": b"old"}


def test_a_manifest_of_another_run_or_step_does_not_count(run: RunCheckpoints, store: CheckpointStore) -> None:
    """Somebody has copied a directory."""
    run.save(10, parts(a=b"mine"))
    data = Manifest(OTHER_RUN, 10, {}).to_bytes()
    replace(run, file_of(run, 10, MANIFEST_FILE), data)
    assert found(run, (10, hashlib.sha256(data).hexdigest())) is None
    data = b"[" * 100_000
    replace(run, file_of(run, 10, MANIFEST_FILE), data)
    assert found(run, (10, hashlib.sha256(data).hexdigest())) is None


def test_a_file_that_an_older_one_has_is_not_written_again(run: RunCheckpoints) -> None:
    """It outlives that one; and where that is gone, it is written."""
    first = run.save(1, parts(a=b"one", b=b"two"))

    def never() -> list[bytes]:
        raise AssertionError("it was written again")

    second = run.save(2, {"a.bin": Part(3, never, first.files["a.bin"]), **parts(b=b"other")})
    run.keep([2], 2)
    assert found(run, (2, second.sha256)) == {"a.bin": b"one", "b.bin": b"other"}
    third = run.save(3, {"a.bin": Part(3, lambda: [b"one"], first.files["a.bin"])})
    assert found(run, (3, third.sha256)) == {"a.bin": b"one"}
    assert third.files["a.bin"].entry == first.files["a.bin"].entry


def test_a_step_that_is_saved_again_leaves_the_first_as_it_is(run: RunCheckpoints) -> None:
    first, second = run.save(10, parts(a=b"first")), run.save(10, parts(a=b"second"))
    assert found(run, (10, first.sha256)) == {"a.bin": b"first"}
    assert found(run, (10, second.sha256)) == {"a.bin": b"second"}


@pytest.mark.parametrize("breaks_in", ["a", "b"])
def test_a_save_that_breaks_off_leaves_nothing(run: RunCheckpoints, breaks_in: str) -> None:
    old = run.save(10, parts(a=b"old"))
    before = names(run)

    def broken() -> Iterator[bytes]:
        yield b"half of it"
        raise OSError(28, "No space left on device")

    new = {**parts(a=b"new", b=b"new"), f"{breaks_in}.bin": Part(1, broken)}
    with pytest.raises((StorageError, OSError), match="No space left on device"):
        run.save(20, new)
    assert names(run) == before
    assert found(run, (10, old.sha256)) == {"a.bin": b"old"}


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_server_that_dies_while_it_saves(
    run: RunCheckpoints, place: str, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many files, the manifest never among them: what is there counts for nothing, and goes with the next."""
    old = run.save(10, parts(a=b"old"))
    left, write = iter(range(written)), type(run._files).write

    class Died(BaseException):
        pass

    def dying(self, name, chunks):
        if next(left, None) is None:
            raise Died
        write(self, name, chunks)

    with monkeypatch.context() as patch:
        patch.setattr(type(run._files), "write", dying)
        patch.setattr(RunCheckpoints, "_remove", lambda self, directory: None)  # the dead do not tidy up
        with pytest.raises(Died):
            run.save(20, parts(a=b"new", b=b"new"))
    assert len([name for name in names(run) if name.startswith("20-")]) == (1 if written else 0)
    after = CheckpointStore(place).run("somebody", RUN)
    assert found(after, (20, "0" * 64), (10, old.sha256)) == {"a.bin": b"old"}
    after.keep([10], 99)
    assert [name.partition("-")[0] for name in names(after)] == ["10"]


def test_the_others_are_deleted(run: RunCheckpoints) -> None:
    saved = {step: run.save(step, parts(a=str(step).encode())).sha256 for step in (10, 20, 30)}
    run.keep([30, 10, 70], 99)
    assert [name.partition("-")[0] for name in names(run)] == ["10", "30"]
    assert found(run, *saved.items()) == {"a.bin": b"30"}
    assert found(run, (20, saved[20])) is None
    run.keep([], 99)
    assert names(run) == []
    run.keep([], 99)


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """An operator's notes, and a link to a checkpoint of another run."""
    store = CheckpointStore(tmp_path)
    run, other = store.run("somebody", RUN), store.run("somebody", OTHER_RUN)
    saved = other.save(10, parts(a=b"theirs"))
    run.save(20, parts(a=b"mine"))
    directory = tmp_path / run._directory
    (name,) = names(other)
    (directory / name).symlink_to(tmp_path / other._directory / name)
    (directory / "notes").mkdir()
    run.keep([], 99)
    assert names(run) == [name, "notes"]
    assert found(other, (10, saved.sha256)) == {"a.bin": b"theirs"}


def test_nobody_finds_the_run_of_another(store: CheckpointStore, run: RunCheckpoints) -> None:
    saved = run.save(10, parts(a=b"mine"))
    for owner in ("somebody else", "Somebody", "", ".", "..", "../somebody", "x/../somebody", "s" * 300):
        other = store.run(owner, RUN)
        assert found(other, (10, saved.sha256)) is None, owner
        other.keep([], 99)
    assert found(store.run("somebody", OTHER_RUN), (10, saved.sha256)) is None
    assert found(run, (10, saved.sha256)) == {"a.bin": b"mine"}


def test_owners_have_a_directory_each(store: CheckpointStore) -> None:
    owners = ["a", "A", ".", "..", "", "a/b", "a%2Fb", "é", "x" * 300, "x" * 301, "C:\\", "a\0b"]
    directories = {store.run(owner, RUN)._directory for owner in owners}
    assert len(directories) == len(owners)
    # As that of its uploads is called, so that who looks after the disk has one name to look for.
    assert directories == {f"{directory_name(Identity(owner))}/{RUN}" for owner in owners}
    for directory in directories:
        assert directory.count("/") == 1
        assert "." not in directory
        assert len(directory) < 250


@pytest.mark.parametrize("run_id", ["", "0" * 31, "0" * 33, "G" * 32, "A" * 32, "../" + "0" * 29, "0" * 31 + "\n"])
def test_a_run_id_that_is_none(store: CheckpointStore, run_id: str) -> None:
    with pytest.raises(ProtocolError, match="run_id must be 32 lower-case hexadecimal digits"):
        store.run("somebody", run_id)


def test_a_disk_that_is_known_to_be_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CheckpointStore(tmp_path).run("somebody", RUN)
    too_large = {"a.bin": Part(1 << 60, lambda: pytest.fail("it was begun"))}
    with pytest.raises(StorageError, match="the checkpoint needs 1,152,921,504,606,846,976"):
        run.save(10, too_large)
    assert names(run) == []


def test_a_directory_is_made_when_something_is_saved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    store.run("somebody", RUN).save(10, parts(a=b"one"))
    assert (tmp_path / "a" / "b" / "somebody").is_dir()


def test_a_place_that_can_be_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"--checkpoint-store .*file/below: .*file is no directory"):
        CheckpointStore(tmp_path / "file" / "below")
    with pytest.raises(UsageError, match=r"--checkpoint-store nosuch://\.\.\. cannot be used"):
        CheckpointStore("nosuch://user:secret@bucket/folder")


def test_a_url_of_files_is_a_directory(tmp_path: Path) -> None:
    assert isinstance(checkpoints_module.open_files(f"file://{tmp_path}"), LocalFiles)
    assert isinstance(checkpoints_module.open_files("memory://bucket"), FsspecFiles)


class Strange(Exception):
    """As some package for some store has it."""


def fail(*arguments: object, **settings: object) -> None:
    raise Strange("no route\nto secret@host")


def test_a_store_that_fails_tells_callers_nothing_and_the_log_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = FsspecFiles("memory://user:secret@bucket")
    monkeypatch.setattr(type(files._fs), "put_file", fail)
    with pytest.raises(StorageError, match=r"^the cloud's checkpoint store failed; whoever runs the cloud finds"):
        files.write("a/b", [b"x"])
    (record,) = caplog.records
    assert record.fields["reason"] == "Strange: no route to ***@host"  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["pipe_file", "cat_file", "rm_file"])
def test_a_store_is_tried_out(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    place = f"memory://bucket-{secrets.token_hex(4)}/folder"
    CheckpointStore(place).try_out()
    files = FsspecFiles(place)
    assert files.children("") == []
    monkeypatch.setattr(type(files._fs), method, fail)
    with pytest.raises(StorageError, match=r"^--checkpoint-store memory://\.\.\. does not take a small file: Strange"):
        files.try_out()


def test_a_store_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    files, goes_on = FsspecFiles("memory://bucket"), threading.Event()
    monkeypatch.setattr(type(files._fs), "pipe_file", lambda *_: goes_on.wait(30))
    monkeypatch.setattr("sft_cloud.storage.files._TRY_SECONDS", 0.01)
    with pytest.raises(StorageError, match=r"did not take a small file within 0\.01 s"):
        files.try_out()
    goes_on.set()


def test_no_bucket_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = f"bucket-{secrets.token_hex(4)}"
    files = FsspecFiles(f"memory://{bucket}")
    made: list[str] = []
    monkeypatch.setattr(type(files._fs), "makedirs", lambda self, path, exist_ok: made.append(path))
    for files._scheme in ("s3", "gs", "abfs", "memory"):
        files._make_parent(files._path("a/b"))
    assert made == [f"/{bucket}/a"]
    files._scheme = "s3"
    with pytest.raises(StorageError, match=f"there is no bucket {bucket}"):
        files.try_out()
    assert made == [f"/{bucket}/a"]


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def url_to_fs(url: str) -> None:
        try:
            raise ModuleNotFoundError("No module named 'aiobotocore'", name="aiobotocore")
        except ImportError as error:
            raise ImportError("Install s3fs to access S3") from error

    monkeypatch.setattr(fsspec.core, "url_to_fs", url_to_fs)
    says = r"s3://\.\.\. needs the package aiobotocore: pip install 'split-fine-tuning\[s3\]'"
    with pytest.raises(UsageError, match=says):
        CheckpointStore("s3://bucket")


def test_a_directory_that_cannot_be_written_in_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = CheckpointStore(tmp_path / "a")
    store.try_out()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    with pytest.raises(StorageError, match=r"^--checkpoint-store .*: cannot write in .*: No space left on device"):
        store.try_out()
