"""The engine in this process: sessions are objects here, and one thread owns the device that all of them compute on."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch

from sft.errors import ProtocolError, SessionLostError
from sft.tensors.stream import StoredTensor, safetensors_header, tensor_part
from sft.v1 import split_training_pb2 as pb
from sft_cloud.engine.engine import PIECE_BYTES, Contents, Handled
from sft_cloud.engine.opener import Opener
from sft_cloud.engine.turns import Gone, Paced, in_pieces
from sft_cloud.engine.worker import DeviceWorker
from sft_cloud.errors import PreconditionError
from sft_cloud.identity import Identity
from sft_cloud.session import Session, check_keeps, keep, made_whole

_TRAINING_SECONDS = 0.2
"""Between two messages of sessions that train."""


@dataclass(frozen=True)
class _Live:
    session: Session
    request: pb.OpenSessionRequest = field(repr=False)
    """As it was opened with, keys and all."""
    owner: Identity
    listed: dict[bool, list[StoredTensor]]
    """What a download reads, of the weights and of the optimizer's state, until the session is told something else: to
    list them anew for each part would take longer than to read them."""


class InProcessEngine:
    """See `sft_cloud.engine.engine.Engine`.

    What waits for the device looks its session up there: whoever held on to one while waiting would keep its memory
    after its end.
    """

    def __init__(self, opener: Opener, capacity: int, threads: int | None = None) -> None:
        """`capacity`: how much work may wait for the device; `threads`: how many torch computes with, None is its own
        choice.
        """
        self.device = str(opener.device)
        self._opener = opener
        self._checkpoints = opener.checkpoints
        self._worker = DeviceWorker(opener.device, capacity, threads)
        self._sessions: dict[str, _Live] = {}
        self._opening: dict[str, Gone] = {}
        self._trains, self._trained_at = False, -_TRAINING_SECONDS

    def open(self, session_id: str, request: pb.OpenSessionRequest, owner: Identity) -> pb.OpenSessionResponse:
        """See Engine."""
        gone = self._opening[session_id] = Gone()
        try:
            with Paced(self._worker.run, self._is_training) as paced:
                opened = self._opener.open(request, owner, paced.run, gone)
        finally:
            del self._opening[session_id]
        if request.only_check or not isinstance(opened, Session):
            return pb.OpenSessionResponse(missing_blobs=[] if isinstance(opened, Session) else opened)
        self._sessions[session_id] = _Live(opened, request, owner, {})
        kept = opened.kept
        return pb.OpenSessionResponse(
            session_id=session_id,
            next_step=opened.next_step,
            keeps_activations=kept is not None,
            kept=0 if kept is None else kept.count,
        )

    def handle(self, session_id: str, message: pb.EdgeMessage, remembered_bytes: int) -> Handled:
        """See Engine. Rows that are kept are read and written in the caller's thread."""
        live = self._find(session_id)
        kept, owner, next_step = live.session.kept, live.owner, live.session.next_step
        codes = live.session.half.codes
        del live
        try:
            if check_keeps(message, kept, codes):
                assert kept is not None
                with made_whole(message, kept, self._opener.budget, owner, codes) as (whole, lacks):
                    handled = self._handle(session_id, whole, remembered_bytes, lacks)
                    del whole
                if handled.error is None:
                    keep(message, kept, codes)
            else:
                handled = self._handle(session_id, message, remembered_bytes)
        except ProtocolError as error:
            return Handled(pb.CloudMessage(), error, next_step, 0.0, 0.0)
        if kept is not None and kept.is_full:
            handled.answer.keeps_only = kept.count
        return handled

    def _handle(self, session_id: str, message: pb.EdgeMessage, remembered_bytes: int, lacks: str = "") -> Handled:
        asked = time.perf_counter()
        loads = message.HasField("load_state")

        def pieces() -> Generator[None, None, Handled]:
            live, began = self._find(session_id), time.perf_counter()
            live.listed.clear()
            self._trains = not loads
            session = live.session
            # Neither the error nor what holds it may be a variable here: its traceback would hold them in a circle.
            try:
                answer = yield from session.handle_in_pieces(message, remembered_bytes, blob, lacks)
                return Handled(answer, None, session.next_step, began - asked, time.perf_counter() - began)
            except Exception as error:
                nothing = pb.CloudMessage()
                return Handled(nothing, error, session.next_step, began - asked, time.perf_counter() - began)
            finally:
                if not loads:
                    self._trains, self._trained_at = False, time.monotonic()

        if not loads:
            blob = None
            return in_pieces(self._worker.run, pieces())
        # Of any size, and all of it at once: it is read here, and loaded as weights are that a session begins with.
        with Paced(self._worker.run, self._is_training) as paced:
            session = self._find(session_id).session
            try:
                blob = session.read_blob(message)
            except Exception as error:
                return Handled(pb.CloudMessage(), error, session.next_step, 0.0, 0.0)
            finally:
                del session
                torch.empty(0)  # where it may rest
            return in_pieces(paced.run, pieces())

    def keep_answers(self, session_id: str, size: int) -> None:
        """See Engine."""
        self._find(session_id).session.keep_answers(size)

    def contents(self, session_id: str, optimizer_state: bool) -> Contents:
        """See Engine."""

        def work() -> Contents:
            live = self._find(session_id)
            _check_whole(live.session)
            stored = _listed(live, optimizer_state)
            return Contents(
                live.session.version, [len(safetensors_header(stored)), *(tensor.size() for tensor in stored)]
            )

        return self._worker.run(work)

    def read(self, session_id: str, optimizer_state: bool, index: int, start: int, version: int) -> bytes:
        """See Engine."""

        def work() -> bytes:
            live = self._find(session_id)
            _check_whole(live.session)
            if live.session.version != version:
                raise PreconditionError(
                    "the session trained on while its weights were read; download them between two steps"
                )
            stored = _listed(live, optimizer_state)
            if not index:
                return safetensors_header(stored)[start : start + PIECE_BYTES]
            return tensor_part(stored[index - 1].read(), start, PIECE_BYTES)

        return self._worker.run(work)

    def save(self, session_id: str) -> pb.CheckpointSaved:
        """See Engine. In the caller's thread: the disk keeps nobody else waiting."""
        live = self._find(session_id)
        if self._checkpoints is None or not live.request.run_id:
            raise PreconditionError("this session was opened without a run_id, or this server saves no checkpoints")
        return self._checkpoints.save(live.session, live.request, live.owner, self._worker.run)

    def keep(self, session_id: str, steps: Sequence[int]) -> None:
        """See Engine."""
        live = self._find(session_id)
        if self._checkpoints is not None:
            self._checkpoints.keep(live.session, live.request, live.owner, steps)

    def give_up(self, session_id: str) -> None:
        """See Engine."""
        gone = self._opening.get(session_id)
        if gone is not None:
            gone.goes()

    def close(self, session_id: str) -> None:
        """See Engine."""
        self._sessions.pop(session_id, None)

    def shutdown(self) -> None:
        """See Engine."""
        self._worker.shutdown()

    def _is_training(self) -> bool:
        return self._trains or time.monotonic() - self._trained_at < _TRAINING_SECONDS

    def _find(self, session_id: str) -> _Live:
        live = self._sessions.get(session_id)
        if live is None:
            raise SessionLostError("there is no such session on this server; it has ended, or was never opened")
        return live


def _check_whole(session: Session) -> None:
    if session.is_loading:
        raise PreconditionError("the session's weights are being replaced; download them between two steps")


def _listed(live: _Live, optimizer_state: bool) -> list[StoredTensor]:
    """On the worker's thread."""
    if optimizer_state not in live.listed:
        session = live.session
        live.listed[optimizer_state] = (
            session.stored_optimizer_state() if optimizer_state else session.stored_parameters()
        )
    return live.listed[optimizer_state]
