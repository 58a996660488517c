"""Sessions whose edges have left: what they have left to do is done without them, and the answers wait."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from sft.errors import ServerFullError, SessionLostError, SFTError
from sft.v1 import split_training_pb2 as pb
from sft_cloud.errors import FullOfAnswersError, NoMemoryError, StreamTakenError, UnauthenticatedError
from sft_cloud.identity import Identity
from sft_cloud.memory import Kind, MemoryBudget
from sft_cloud.rpc import ends_session, one_line
from sft_cloud.service.mailbox import Mailbox
from sft_cloud.service.registry import Entry, Registry, StreamHandle

PAUSE_SECONDS = 10.0
"""Until a message is tried again for which there was no room."""

_log = logging.getLogger(__name__)


class Checks(NamedTuple):
    """What a message passes that comes by a call, for those that an edge has left; each is told whose they are."""

    form: Callable[[Identity, bytes], object] = lambda owner, data: None
    """Of one, before it is parsed. Raises ProtocolError."""
    seconds_to_wait: Callable[[Identity], float] = lambda owner: 0.0
    """Counts a step, and says how long it has to wait before it is taken."""
    still_valid: Callable[[Identity], bool] = lambda owner: True
    """Whether the owner would be let in now."""


_NO_CHECKS = Checks()


class Absent:
    """A thread for each of those sessions, until its edge is back or all is done. Safe to use from several threads."""

    def __init__(
        self,
        sessions: Registry,
        answer: Callable[[str, Identity, StreamHandle, pb.EdgeMessage], pb.CloudMessage],
        memory: MemoryBudget,
        checks: Checks = _NO_CHECKS,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        """`answer`: by which a session's message is answered for the stream that has it; `memory`: what is left to do
        is charged to; `wait`: for an event, at most so many seconds.
        """
        self._sessions = sessions
        self._answer = answer
        self._memory = memory
        self._checks = checks
        self._wait = wait
        self._lock = threading.Lock()
        self._at_work: set[StreamHandle] = set()
        self._is_over = False

    def leave(self, entry: Entry, message: pb.EdgeMessage) -> pb.CloudMessage:
        """Keeps what an edge leaves to do, in the place of what it left before. Raises ProtocolError."""
        answer = pb.CloudMessage(step=message.step, micro_batch=message.micro_batch)
        answer.detached.detached_timeout_seconds = self._sessions.detached_timeout_seconds
        charge = self._memory.charge(Kind.MESSAGES, 0, entry.owner)
        try:
            charge.resize(message.ByteSize())
            left = Mailbox(message, partial(self._checks.form, entry.owner), charge.release)
        except NoMemoryError as error:
            charge.release()
            answer.detached.error = str(error)
            return answer
        except BaseException:
            charge.release()
            raise
        if entry.left is not None:
            entry.left.close()
        entry.left = left
        return answer

    def answers(self, session_id: str, owner: Identity, stream: StreamHandle) -> Iterator[pb.CloudMessage]:
        """Those to what is left, one after the other, until the stream is over.

        None comes after that of a step that was undone: what is left then would be answered so, too. Raises what
        `answer` raises, SessionLostError, UnauthenticatedError.
        """
        with self._lock:
            self._at_work.add(stream)
            if self._is_over:
                stream.over.set()
        try:
            while not stream.over.is_set() and (message := self._next(session_id, owner)) is not None:
                if not self._checks.still_valid(owner):
                    raise UnauthenticatedError("the token or the certificate that it was left with is no longer good")
                seconds = self._checks.seconds_to_wait(owner) if message.HasField("commit") else 0.0
                if seconds and self._wait(stream.over, seconds):
                    return
                answer = self._answer(session_id, owner, stream, message)
                if answer.HasField("step_skipped"):
                    reason = answer.step_skipped.reason
                    _log.info(
                        "a step was undone: nothing more of what an edge has left is done",
                        extra=_of(session_id, reason),
                    )
                    self._drop(session_id, owner)
                yield answer
        finally:
            with self._lock:
                self._at_work.discard(stream)

    def go_on(self, session_id: str, owner: Identity) -> None:
        """The session has no stream: does what its edge has left, if it has left anything, unless a stream takes it."""
        stream = StreamHandle(is_absent=True)
        with self._lock:
            if self._is_over or not self._sessions.attach_absent(session_id, owner, stream):
                return
        threading.Thread(target=self._run, args=(session_id, owner, stream), name="absent", daemon=True).start()

    def stop(self) -> None:
        """Each stops after the message it is at."""
        with self._lock:
            self._is_over = True
            for stream in self._at_work:
                stream.over.set()

    def _run(self, session_id: str, owner: Identity, stream: StreamHandle) -> None:
        try:
            self._work(session_id, owner, stream)
        except (SessionLostError, StreamTakenError):
            pass  # it has ended, or its edge is back
        except Exception as error:
            ours = isinstance(error, SFTError)
            reason = one_line(error) if ours else "internal error"
            _log.warning("what an edge has left is done no more", exc_info=not ours, extra=_of(session_id, reason))
            if ends_session(error) or isinstance(error, UnauthenticatedError):
                self._sessions.end(session_id, stream, reason)
        finally:
            with suppress(SessionLostError):  # it has ended
                self._sessions.detach(self._sessions.get(session_id, owner), stream)

    def _work(self, session_id: str, owner: Identity, stream: StreamHandle) -> None:
        is_told = False
        while True:
            try:
                for _ in self.answers(session_id, owner, stream):
                    is_told = False
                return
            except FullOfAnswersError:
                raise
            except ServerFullError as error:  # others take what there is; a message that was refused has not come
                if not is_told:
                    _log.warning(
                        "no room for what an edge has left; tried again", extra=_of(session_id, one_line(error))
                    )
                is_told = True
            if self._wait(stream.over, PAUSE_SECONDS):
                return

    def _next(self, session_id: str, owner: Identity) -> pb.EdgeMessage | None:
        entry = self._sessions.get(session_id, owner)
        with entry.lock:
            left = entry.left
            return None if left is None else left.after(entry.messages.last_number)

    def _drop(self, session_id: str, owner: Identity) -> None:
        entry = self._sessions.get(session_id, owner)
        with entry.lock:
            if entry.left is not None:
                entry.left.close()


def _of(session_id: str, reason: str) -> dict[str, dict[str, str]]:
    return {"fields": {"session": session_id[:8], "reason": reason}}
