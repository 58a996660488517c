"""The threads of a server, on which a call begins when it is its caller's turn; until then it takes none."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from grpc._cython import cygrpc  # type: ignore[attr-defined]

from sft_cloud.admission.connections import ConnectionGuard, network
from sft_cloud.admission.pace import REFUSAL_SECONDS, Pace, Turn
from sft_cloud.admission.quotas import TokenBucket
from sft_cloud.admission.sockets import peer_of
from sft_cloud.rpc import Identify

STRANGERS_PER_SECOND = 50.0
"""Refused at once; of those who come beside them so many wait a second for it:"""

MAX_STRANGERS = 64

_log = logging.getLogger(__name__)


class Reception(ThreadPoolExecutor):
    """gRPC hands it every call of a known caller, and every health check."""

    def __init__(self, threads: int, pace: Pace, connections: ConnectionGuard, identify: Identify) -> None:
        super().__init__(threads, thread_name_prefix="call")
        self._pace = pace
        self._connections = connections
        self._identify = identify
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []  # a heap
        self._numbers = itertools.count()
        self._is_over = False
        self._clock = threading.Thread(target=self._run, name="reception", daemon=True)
        self._clock.start()

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See Executor."""
        event = next((one for one in args if hasattr(one, "invocation_metadata") and hasattr(one, "call")), None)
        if event is None:
            return super().submit(work, *args, **kwargs)
        call = _Arrived(event)
        who = self._who(call)
        turn, done = self._pace.call(who), Future[Any]()
        if turn is None:
            # Each costs the server a little even so: who goes on so is left without a connection.
            self._connections.hang_up(call.peer(), who)
            event.call.cancel()
            _finish(done, lambda: None)
            return done
        if not turn.seconds:
            try:
                return super().submit(work, *args, **kwargs)
            except RuntimeError as error:  # no thread can be started: raised here, it would end the server
                event.call.cancel()
                done.set_exception(error)
                return done
        self.later(turn.seconds, lambda: self._begin(event, done, who, turn, partial(work, *args, **kwargs)))
        return done

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See Executor."""
        with self._changed:
            self._is_over = True
            self._changed.notify()
        self._clock.join()
        super().shutdown(wait, cancel_futures=cancel_futures)

    def _who(self, call: _Arrived) -> Hashable:
        try:
            return self._identify(call).name  # type: ignore[arg-type]  # as much of a context as it needs
        except Exception:  # a health check; or what the call itself will say: here it would end the server
            peer = peer_of(call.peer())
            return (network(peer[0]) if peer else "",)

    def _begin(self, event: Any, done: Future[Any], who: Hashable, turn: Turn, work: Callable[[], Any]) -> None:
        def begun() -> None:
            with self._pace.begins(who, turn):
                _finish(done, work)

        try:
            super().submit(begun)
        except RuntimeError:  # likewise
            with self._pace.begins(who, turn):
                event.call.cancel()

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        """Has it done then, on a thread on which nothing may wait."""
        with self._changed:
            waits = (time.monotonic() + seconds, next(self._numbers), work)
            heapq.heappush(self._waiting, waits)
            if self._waiting[0] is waits:  # otherwise that thread would be woken for nothing
                self._changed.notify()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                work()
            except Exception:  # others wait for this thread
                _log.exception("a call that has waited could not begin")

    def _next(self) -> Callable[[], None] | None:
        """What is due, once it is; None in the end."""
        with self._changed:
            while not self._is_over:
                seconds = self._waiting[0][0] - time.monotonic() if self._waiting else None
                if seconds is not None and seconds <= 0:
                    return heapq.heappop(self._waiting)[-1]
                self._changed.wait(seconds)
        return None


class Strangers(ThreadPoolExecutor):
    """Where strangers are refused: at once, or a second later where many come, who then wait before they come again."""

    def __init__(self, later: Callable[[float, Callable[[], None]], None]) -> None:
        """`later`: see Reception."""
        super().__init__(1)
        self._later = later
        self._lock = threading.Lock()
        self._bucket = TokenBucket(STRANGERS_PER_SECOND, STRANGERS_PER_SECOND, time.monotonic())
        self._waiting = 0

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See Executor."""
        with self._lock:
            now = time.monotonic()
            is_early = not self._bucket.seconds_until(1, now)
            if is_early:
                self._bucket.take(1, now)
            waits = not is_early and self._waiting < MAX_STRANGERS
            self._waiting += waits
        done: Future[Any] = Future()
        if waits:
            self._later(REFUSAL_SECONDS, lambda: self._refuse(done, partial(work, *args, **kwargs)))
        else:
            _finish(done, partial(work, *args, **kwargs))
        return done

    def _refuse(self, done: Future[Any], work: Callable[[], Any]) -> None:
        with self._lock:
            self._waiting -= 1
        _finish(done, work)


class _Arrived:
    """What is known of a call before it has a thread, under the names of gRPC's context."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def invocation_metadata(self) -> Any:
        return self._event.invocation_metadata

    def auth_context(self) -> Any:
        found = cygrpc.auth_context(self._event.call) or {}
        return {name.decode() if isinstance(name, bytes) else name: values for name, values in found.items()}

    def peer(self) -> str:
        return bytes(self._event.call.peer()).decode()


def _finish(done: Future[Any], work: Callable[[], Any]) -> None:
    try:
        done.set_result(work())
    except Exception as error:
        done.set_exception(error)
