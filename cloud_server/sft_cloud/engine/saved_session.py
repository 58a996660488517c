"""What of a session is in a checkpoint, and a session made from one.

A session between two steps is its parameters, its optimizer's state and settings, and the number of the next step.
Dropout is drawn anew from the seed for every micro-batch, so there are no generators to keep; no codec keeps anything
from one message to the next.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from sft.errors import CheckpointError, ProtocolError, StorageError
from sft.models.weights import load_in_pieces
from sft.optim.state import checked_state, group_settings, set_group_settings, state_in_pieces, stored_state
from sft.tensors.stream import StoredTensor, copied, in_memory, safetensors_chunks, safetensors_size
from sft.v1 import split_training_pb2 as pb
from sft_cloud.engine.same_run import SESSION, check_same_run
from sft_cloud.engine.turns import in_pieces
from sft_cloud.engine.worker import Run, at_once
from sft_cloud.errors import PreconditionError
from sft_cloud.identity import Identity
from sft_cloud.session import Session
from sft_cloud.storage import CheckpointStore, Part, Saved, check_sha256

NET_2, OPTIMIZER, SETTINGS = "net_2.safetensors", "optimizer.safetensors", "settings.json"

_MAX_OFFERED = 1000


class Checkpoints:
    """Sessions to and from a store."""

    def __init__(self, store: CheckpointStore, max_bytes: int | None = None) -> None:
        """`max_bytes` of all checkpoints of one owner, whose token says nothing of it."""
        self._store = store
        self._max_bytes = max_bytes

    def save(self, session: Session, request: pb.OpenSessionRequest, owner: Identity, run: Run) -> pb.CheckpointSaved:
        """Writes a session that `owner` has opened with `request`, in the caller's thread; nobody may change it
        meanwhile. The device is touched in `run`.

        Raises StorageError; earlier checkpoints are then as they were. Activations that are kept are left out, once and
        for all, where there is no room for them a second time.
        """
        parts = run(lambda: parts_of(session, request, run))
        kept = session.kept.parts() if session.kept is not None else {}
        try:
            saved = self._save(session, request, owner, {**parts, **kept})
        except StorageError as error:
            if session.kept is None or not kept:
                raise
            saved = self._save(session, request, owner, parts)
            session.kept.leave_out(error)
        if session.kept is not None:
            session.kept.were_saved(saved.files)
        return pb.CheckpointSaved(
            id=pb.CheckpointId(step=saved.step, sha256=saved.sha256), total_bytes=saved.total_bytes
        )

    def _save(
        self, session: Session, request: pb.OpenSessionRequest, owner: Identity, parts: Mapping[str, Part]
    ) -> Saved:
        self._check_quota(owner, sum(part.total_bytes for part in parts.values()))
        return self._store.run(owner.name, request.run_id).save(session.next_step, parts)

    def keep(self, session: Session, request: pb.OpenSessionRequest, owner: Identity, steps: Iterable[int]) -> None:
        """Deletes the other steps of the session's run. Raises StorageError.

        Only those that this session can have known of: its edge may long have gone on at another server that has the
        same store, and have saved there what is newer.
        """
        self._store.run(owner.name, request.run_id).keep(steps, session.next_step)

    def _check_quota(self, owner: Identity, size: int) -> None:
        limit = self._max_bytes if owner.limits.max_upload_bytes is None else owner.limits.max_upload_bytes
        if limit is None:
            return
        held = self._store.held_bytes(owner.name)
        if held + size > limit:
            raise StorageError(
                f"your checkpoints take {held} bytes, this one would take {size} more, and all of them together may "
                f"take {limit}; a lower --save-total-limit, or fewer runs, need less"
            )

    @contextmanager
    def find(self, request: pb.OpenSessionRequest, owner: Identity) -> Iterator[dict[str, Path]]:
        """The files of the newest step that a request offers to resume from and that is here whole, for the block.

        Raises PreconditionError where there is none, or it is of another run than the one that is asked for.
        """
        if len(request.resume_from) > _MAX_OFFERED:
            raise ProtocolError(f"resume_from holds {len(request.resume_from)} steps; at most {_MAX_OFFERED} are read")
        wanted = [(offered.step, check_sha256(offered.sha256)) for offered in request.resume_from]
        with self._store.run(owner.name, request.run_id).newest_of(wanted) as files:
            if files is None:
                steps = ", ".join(str(step) for step, _ in sorted(wanted)[-5:])
                raise PreconditionError(
                    f"this server has no whole checkpoint of the run at a step that the edge has (the newest: {steps})"
                )
            check_same_run(files, request)
            yield files


def parts_of(session: Session, request: pb.OpenSessionRequest, run: Run = at_once) -> dict[str, Part]:
    """The files of a checkpoint but for kept activations. Tensors are read, each in `run`, as the files are written."""
    settings = json.dumps({"next_step": session.next_step, "groups": group_settings(session.optimizer)}).encode()
    parameters = session.half.all_parameters()

    def part(tensors: Iterable[StoredTensor]) -> Part:
        there = [_read_in(run, copied(tensor)) for tensor in tensors]
        return Part(safetensors_size(there), lambda: safetensors_chunks(there))

    told = pb.OpenSessionRequest()
    told.CopyFrom(request)
    told.ClearField("keep_key")  # which is in memory alone
    return {
        NET_2: part(in_memory(dict(parameters))),
        OPTIMIZER: part(stored_state(session.optimizer, parameters)),
        SETTINGS: Part(len(settings), lambda: [settings]),
        SESSION: Part(told.ByteSize(), lambda: [told.SerializeToString(deterministic=True)]),
    }


def restore(session: Session, files: Mapping[str, Path]) -> None:
    """As `restore_in_pieces`, in one piece."""
    in_pieces(at_once, restore_in_pieces(session, files))


def restore_in_pieces(session: Session, files: Mapping[str, Path]) -> Generator[None, None, None]:
    """Puts back what `parts_of` wrote, into a session that has not begun; others may compute where it yields.

    Raises CheckpointError and ProtocolError where the files are of another model. The session is then worth nothing.
    """
    optimizer = session.optimizer
    try:
        parameters = session.half.all_parameters()
        yield from load_in_pieces(parameters, load_file(files[NET_2]))
        state = checked_state(optimizer, parameters, load_file(files[OPTIMIZER]))
        yield
        copied_state: dict[str, Any] = {}
        yield from state_in_pieces(state, copied_state)
        optimizer.load_state_dict(copied_state)
        yield
        settings = json.loads(files[SETTINGS].read_bytes())
        set_group_settings(optimizer, settings["groups"])
        session.next_step = int(settings["next_step"])
    except (KeyError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"the cloud's half of the checkpoint is none of this release ({error})") from error


def _read_in(run: Run, tensor: StoredTensor) -> StoredTensor:
    return tensor._replace(read=lambda: run(tensor.read))
