"""Sessions whose edges have left: what they have left to do is done without them, and the answers wait."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from sft.errors import SessionLostError
from sft.v1 import split_training_pb2 as pb
from sft_cloud.errors import NoMemoryError
from sft_cloud.identity import Identity
from sft_cloud.memory import Kind, MemoryBudget
from sft_cloud.service.mailbox import Mailbox
from sft_cloud.service.registry import Entry, Registry, StreamHandle

_log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """By which `Absent` has a session's next message answered."""

    next: Callable[[str, Identity], pb.EdgeMessage | None]
    answer: Callable[[str, Identity, StreamHandle, pb.EdgeMessage], pb.CloudMessage]
    failed: Callable[[str, Identity, StreamHandle, Exception], None]


class Absent:
    """A thread for each of those sessions, until its edge is back or all is done. Safe to use from several threads."""

    def __init__(self, sessions: Registry, asked: Asked, memory: MemoryBudget) -> None:
        """`memory`: what is left to do is charged to."""
        self._sessions = sessions
        self._memory = memory
        self._asked = asked
        self._lock = threading.Lock()
        self._ends: set[threading.Event] = set()
        self._is_over = False

    def leave(self, entry: Entry, message: pb.EdgeMessage) -> pb.CloudMessage:
        """Keeps what an edge leaves to do, in the place of what it left before. Raises ProtocolError."""
        answer = pb.CloudMessage(step=message.step, micro_batch=message.micro_batch)
        answer.detached.detached_timeout_seconds = self._sessions.detached_timeout_seconds
        charge = self._memory.charge(Kind.MESSAGES, 0, entry.owner)
        try:
            charge.resize(message.ByteSize())
            left = Mailbox(message, charge.release)
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

    def go_on(self, session_id: str, owner: Identity) -> None:
        """The session has no stream: does what its edge has left, if it has left anything, unless a stream takes it."""
        over = threading.Event()
        stream = StreamHandle(over.set)
        with self._lock:
            if self._is_over or not self._sessions.attach_absent(session_id, owner, stream):
                return
            self._ends.add(over)
        threading.Thread(target=self._run, args=(session_id, owner, stream, over), name="absent", daemon=True).start()

    def stop(self) -> None:
        """Each stops after the message it is at."""
        with self._lock:
            self._is_over = True
            for over in self._ends:
                over.set()

    def _run(self, session_id: str, owner: Identity, stream: StreamHandle, over: threading.Event) -> None:
        rate = owner.limits.steps_per_second
        try:
            while not over.is_set() and (message := self._asked.next(session_id, owner)) is not None:
                answer = self._asked.answer(session_id, owner, stream, message)
                if answer.HasField("step_skipped"):
                    _log.info("a step was undone: the session waits for its edge", extra={"fields": _named(session_id)})
                    break
                if rate and message.HasField("commit"):
                    over.wait(1 / rate)
        except Exception as error:
            self._asked.failed(session_id, owner, stream, error)
        finally:
            with self._lock:
                self._ends.discard(over)
            with suppress(SessionLostError):  # it has ended
                self._sessions.detach(self._sessions.get(session_id, owner), stream)


def _named(session_id: str) -> dict[str, str]:
    return {"session": session_id[:8]}
