"""The cloud's halves of checkpoints.

    OWNER/RUN_ID/STEP-NONCE/net_2.safetensors       all parameters, those that are not trained included
                            optimizer.safetensors
                            settings.json           of the optimizer's groups
                            session.pb              the request that opened the session
                            kept-N.bin              activations that are kept, encrypted: one after the other
                            manifest.json           written last

What is whole is never written to again: a step that is saved once more gets another nonce. So there is no moment in
which a checkpoint that an edge counts on is not whole. What an older one has already may be the same file. The owner
is in the path: nobody resumes another's run.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sft.errors import CheckpointError, ProtocolError, StorageError
from sft.files.temporary import TemporaryDirectory
from sft.tensors.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    Measured,
    is_run_id,
    read_manifest,
)
from sft.tensors.manifest import is_whole as file_is_whole
from sft_cloud.identity import Identity
from sft_cloud.storage.blobs import directory_name
from sft_cloud.storage.files import Files, open_files

_log = logging.getLogger(__name__)


class Held(NamedTuple):
    """A file of a checkpoint that is whole."""

    name: str
    """In the store."""
    entry: FileEntry


class Part(NamedTuple):
    """A file of a checkpoint before it is written."""

    total_bytes: int
    chunks: Callable[[], Iterable[bytes]]
    held: Held | None = None
    """The same in an older checkpoint, if that is still there: then it is not written again."""


class Saved(NamedTuple):
    """A checkpoint that is whole."""

    step: int
    sha256: str
    """Of its manifest."""
    total_bytes: int
    files: Mapping[str, Held]


class CheckpointStore:
    """All runs of everybody. Safe to use from several threads, and by several servers at once."""

    def __init__(self, place: str | Path) -> None:
        """A directory, or a URL that fsspec knows. Raises UsageError, StorageError."""
        self._files = open_files(str(place))

    def try_out(self) -> None:
        """Writes, reads and deletes a small file. Raises StorageError, in a sentence for the operator."""
        self._files.try_out()

    def run(self, owner: str, run_id: str) -> RunCheckpoints:
        """Those of one run. `owner` is the name of whom it belongs to. Raises ProtocolError for an odd id."""
        if not is_run_id(run_id):
            raise ProtocolError("run_id must be 32 lower-case hexadecimal digits")
        return RunCheckpoints(self._files, f"{directory_name(Identity(owner))}/{run_id}", run_id)

    def held_bytes(self, owner: str) -> int:
        """Of all checkpoints of all runs of one owner. Raises StorageError."""
        directory, held = directory_name(Identity(owner)), 0
        for run_id in self._files.children(directory):
            for name in self._files.children(f"{directory}/{run_id}"):
                data = self._files.read(f"{directory}/{run_id}/{name}/{MANIFEST_FILE}", MAX_MANIFEST_BYTES)
                with contextlib.suppress(CheckpointError):  # what cannot be read does not count, nor can it be resumed
                    held += 0 if data is None else read_manifest(data, name).total_bytes
        return held


class RunCheckpoints:
    """The steps of one run."""

    def __init__(self, files: Files, directory: str, run_id: str) -> None:
        self._files = files
        self._directory = directory
        self._run_id = run_id

    def save(self, step: int, parts: Mapping[str, Part]) -> Saved:
        """Writes one. Raises StorageError; what was there stays, and nothing of the new one does."""
        self._files.check_room(sum(part.total_bytes for part in parts.values() if part.held is None))
        name = f"{step}-{secrets.token_hex(4)}"
        directory, entries = f"{self._directory}/{name}", {}
        try:
            for file_name, part in parts.items():
                path = f"{directory}/{file_name}"
                if part.held is not None and self._files.share(part.held.name, path):
                    entries[file_name] = part.held.entry
                else:
                    entries[file_name] = self._write(path, part.chunks())
            manifest = Manifest(self._run_id, step, entries)
            sha256 = self._write(f"{directory}/{MANIFEST_FILE}", [manifest.to_bytes()]).sha256
        except BaseException:
            with contextlib.suppress(StorageError):
                self._remove(directory)
            raise
        held = {file_name: Held(f"{directory}/{file_name}", entry) for file_name, entry in entries.items()}
        return Saved(step, sha256, manifest.total_bytes, held)

    @contextmanager
    def newest_of(self, wanted: Sequence[tuple[int, str]]) -> Iterator[dict[str, Path] | None]:
        """The newest of these steps, given with the hashes of their manifests, that is here whole; None if none is.

        Gives its files, as files of this machine for as long as the block lasts. Raises StorageError.
        """
        with TemporaryDirectory("sft-checkpoint-aside-") as aside:
            for step, sha256 in sorted(wanted, reverse=True):
                files = self._find(step, sha256, Path(aside))
                if files is not None:
                    yield files
                    return
            yield None

    def keep(self, steps: Iterable[int], newest: int) -> None:
        """Deletes all other steps up to `newest`. Raises StorageError; what is left over goes another time."""
        kept = set(steps)
        for name in self._files.children(self._directory):
            step = _step_of(name)
            if step not in kept and 0 <= step <= newest:
                self._remove(f"{self._directory}/{name}")

    def _write(self, name: str, chunks: Iterable[bytes]) -> FileEntry:
        measured = Measured(chunks)
        self._files.write(name, measured)
        return measured.entry

    def _find(self, step: int, sha256: str, aside: Path) -> dict[str, Path] | None:
        for name in self._files.children(self._directory):
            if _step_of(name) != step:
                continue
            data = self._files.read(f"{self._directory}/{name}/{MANIFEST_FILE}", MAX_MANIFEST_BYTES)
            if data is None or hashlib.sha256(data).hexdigest() != sha256:
                continue
            try:
                manifest = read_manifest(data, f"checkpoint {name}")
            except CheckpointError as error:
                _log.warning("checkpoint not readable", extra={"fields": {"step": step, "reason": str(error)}})
                continue
            if (manifest.run_id, manifest.step) != (self._run_id, step):
                continue
            files = self._fetch(name, manifest, aside)
            if files is not None:
                return files
            _log.warning("checkpoint not whole", extra={"fields": {"step": step}})
        return None

    def _fetch(self, name: str, manifest: Manifest, aside: Path) -> dict[str, Path] | None:
        found = {}
        for file_name, entry in manifest.files.items():
            path = self._files.copy_here(f"{self._directory}/{name}/{file_name}", aside / f"{name}-{file_name}")
            if path is None or not file_is_whole(path, entry):
                return None
            found[file_name] = path
        return found

    def _remove(self, directory: str) -> None:
        self._files.remove(f"{directory}/{MANIFEST_FILE}")  # first: then it is no checkpoint any more
        self._files.remove(directory)


def _step_of(name: str) -> int:
    """-1 for what is none of ours."""
    match = re.fullmatch(r"(\d{1,18})-[0-9a-f]{8}", name)
    return int(match[1]) if match else -1
