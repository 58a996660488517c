"""The edge's halves of checkpoints: OUTPUT_DIR/checkpoint-STEP, each there whole or not at all.

    net_1.safetensors       all parameters of this side; with --mode local the whole model
    optimizer.safetensors   the state of its optimizer
    random.safetensors      the states of every generator of random numbers
    ledger.safetensors      bytes and seconds of every step
    kept.safetensors        what the cloud keeps, and the key to it, where it does: for the owner alone
    codec.safetensors       the tables of a codec that was fitted to this run's activations
    state.json              all the rest: see `content`
    manifest.json           hashes of these, and the hash of the cloud's manifest

A checkpoint is written under another name, beside. Renaming its directory is the moment in which it comes to be, for
both sides: docs/checkpoints.md says why a crash at any other moment loses nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from sft.errors import CheckpointError, StorageError, UsageError
from sft.files.whole import sync_directory
from sft.tensors.manifest import MANIFEST_FILE, Manifest, Measured, is_whole, read_manifest
from sft_edge.files import storage_errors, write_file

PREFIX = "checkpoint-"

KEPT = "kept.safetensors"


class EdgeCheckpoint(NamedTuple):
    """A directory that says that it is one."""

    directory: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Steps that were taken."""
        return self.manifest.step


def checkpoints_in(output_dir: Path) -> List[EdgeCheckpoint]:
    """Those of all runs, the newest first. What has no readable manifest, or not all its bytes, is none."""
    found = []
    for directory in output_dir.glob(f"{PREFIX}*") if output_dir.is_dir() else []:
        try:
            found.append(open_checkpoint(directory))
        except CheckpointError:
            continue
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def open_checkpoint(directory: Path) -> EdgeCheckpoint:
    """Raises CheckpointError where the directory holds none, or files are not as long as they should be."""
    path = directory / MANIFEST_FILE
    try:
        manifest = read_manifest(path.read_bytes(), str(path))
        sizes = {name: (directory / name).stat().st_size for name in manifest.files}
    except OSError as error:
        raise CheckpointError(f"{directory}: no whole checkpoint ({error.strerror}: {error.filename})") from error
    for name, entry in manifest.files.items():
        if sizes[name] != entry.total_bytes:
            raise CheckpointError(f"{directory}: {name} has {sizes[name]} bytes, not {entry.total_bytes}")
    return EdgeCheckpoint(directory, manifest)


def check_hashes(checkpoint: EdgeCheckpoint) -> None:
    """Reads all of it. Raises CheckpointError where a file is not the one that was written."""
    for name, entry in checkpoint.manifest.files.items():
        if not is_whole(checkpoint.directory / name, entry):
            raise CheckpointError(
                f"{checkpoint.directory}: {name} is not what was written; delete the directory, and an older "
                "checkpoint is taken"
            )


def write_checkpoint(
    output_dir: Path, run_id: str, step: int, other_half: Optional[str], files: Mapping[str, Iterable[bytes]]
) -> EdgeCheckpoint:
    """Writes one, in the place of one of ours of the same step. Raises StorageError; nothing is left behind then."""
    directory, partial = output_dir / f"{PREFIX}{step}", output_dir / f".{PREFIX}{step}.partial"
    if os.path.lexists(str(directory)) and own_manifest(directory) is None:
        raise StorageError(in_the_way(directory))
    replaced = output_dir / f".{PREFIX}{step}.replaced"
    with storage_errors(directory):
        for leftover in (partial, replaced):
            shutil.rmtree(str(leftover), ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        entries = {}
        for name, chunks in files.items():
            measured = Measured(chunks)
            write_file(partial / name, measured, 0o600 if name == KEPT else 0o666)
            entries[name] = measured.entry
        manifest = Manifest(run_id, step, entries, other_half)
        write_file(partial / MANIFEST_FILE, [manifest.to_bytes()])
        with storage_errors(directory):
            sync_directory(partial)
            if directory.exists():
                directory.rename(replaced)
            partial.rename(directory)
            sync_directory(output_dir)
    except BaseException:
        if replaced.exists() and not directory.exists():
            with contextlib.suppress(OSError):
                replaced.rename(directory)
        shutil.rmtree(str(partial), ignore_errors=True)
        raise
    shutil.rmtree(str(replaced), ignore_errors=True)
    return EdgeCheckpoint(directory, manifest)


def in_the_way(path: Path) -> str:
    """What to say of something in the place of a checkpoint."""
    return f"{path} is in the way: it is no checkpoint of a run of ours; move it, or name another --output-dir"


def remove_all_but(kept: Sequence[Path], output_dir: Path) -> None:
    """Deletes our other checkpoints, those of other runs, torn and unfinished ones included. Raises StorageError."""
    for directory in _numbered(output_dir):
        manifest = own_manifest(directory)
        if manifest is not None and directory not in kept:
            _remove(directory, manifest)
    for leftover in output_dir.glob(f".{PREFIX}*"):
        if re.fullmatch(rf"\.{PREFIX}\d+\.(partial|replaced)", leftover.name):
            shutil.rmtree(str(leftover), ignore_errors=True)


def remove_others(run_id: str, output_dir: Path) -> None:
    """Deletes the checkpoints of other runs of ours. Raises StorageError."""
    for directory in _numbered(output_dir):
        manifest = own_manifest(directory)
        if manifest is not None and manifest.run_id != run_id:
            _remove(directory, manifest)


def foreign(output_dir: Path) -> Dict[int, Path]:
    """By step: what is called as a checkpoint and is not ours. It is neither deleted nor written to."""
    return {int(path.name[len(PREFIX) :]): path for path in _numbered(output_dir) if own_manifest(path) is None}


def own_manifest(directory: Path) -> Optional[Manifest]:
    """Of a checkpoint that we wrote, torn or whole; None for what another program did, and for a link to one."""
    path = directory / MANIFEST_FILE
    if directory.is_symlink() or path.is_symlink():
        return None
    try:
        return read_manifest(path.read_bytes(), str(path))
    except (OSError, CheckpointError):
        return None


def _numbered(output_dir: Path) -> List[Path]:
    return [path for path in output_dir.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", path.name)]


def _remove(directory: Path, manifest: Manifest) -> None:
    with storage_errors(directory):
        for name in (*manifest.files, MANIFEST_FILE):  # it last: half of one is none, and is known for ours
            (directory / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody keeps something else in it
        directory.rmdir()


@contextmanager
def only_run_in(output_dir: Path) -> Iterator[None]:
    """Two runs in one directory would take each other's session and checkpoints: the second gets a UsageError.

    The directory is made where it is missing, and goes again when nothing is in it. Raises StorageError.
    """
    with storage_errors(output_dir):
        handle, was_made = _locked(output_dir)
    _locks.add(handle)
    try:
        yield
        was_made = False
    finally:
        if was_made:
            with contextlib.suppress(OSError):  # something is in it
                output_dir.rmdir()
        if handle in _locks:
            _locks.remove(handle)
            os.close(handle)


def _locked(output_dir: Path) -> Tuple[int, bool]:
    """The open directory, and whether it had to be made."""
    was_made = False
    while True:
        if not output_dir.is_dir():
            output_dir.mkdir(parents=True, exist_ok=True)
            was_made = True
        handle = os.open(str(output_dir), os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UsageError(f"--output-dir {output_dir}: another run is writing into it") from None
        except OSError:
            return handle, was_made  # a file system without locks
        if output_dir.is_dir() and os.path.samestat(os.fstat(handle), os.stat(str(output_dir))):
            return handle, was_made
        os.close(handle)  # of a directory that another run has removed meanwhile


_locks: Set[int] = set()
"""Of this process. A lock lives as long as any process has it open: one that loads data must not outlive the run."""


def _let_go_in_child() -> None:
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_let_go_in_child)
