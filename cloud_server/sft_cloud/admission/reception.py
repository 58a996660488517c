"""The threads of a server, on which a call begins when it is its caller's turn; until then it takes none."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from grpc._cython import cygrpc  # type: ignore[attr-defined]

from sft_cloud.admission.connections import ConnectionGuard, network
from sft_cloud.admission.pace import Pace, Turn
from sft_cloud.admission.sockets import peer_of
from sft_cloud.errors import UnauthenticatedError
from sft_cloud.rpc import Identify


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
        turn = self._pace.call(who)
        if turn is None:
            # Each costs the server a little even so: who goes on so is left without a connection.
            self._connections.hang_up(call.peer())
            event.call.cancel()
            return _done(None)
        if not turn.seconds:
            return super().submit(work, *args, **kwargs)
        done: Future[Any] = Future()
        self._later(turn.seconds, lambda: self._begin(done, who, turn, partial(work, *args, **kwargs)))
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
        except UnauthenticatedError:  # a health check
            peer = peer_of(call.peer())
            return (network(peer[0]) if peer else "",)

    def _begin(self, done: Future[Any], who: Hashable, turn: Turn, work: Callable[[], Any]) -> None:
        def begun() -> None:
            self._pace.begin(who, turn)
            try:
                work()
            finally:
                done.set_result(None)

        super().submit(begun)

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        with self._changed:
            heapq.heappush(self._waiting, (time.monotonic() + seconds, next(self._numbers), work))
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._is_over:
                seconds = self._waiting[0][0] - time.monotonic() if self._waiting else None
                if seconds is None or seconds > 0:
                    self._changed.wait(seconds)
                else:
                    heapq.heappop(self._waiting)[-1]()


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


def _done(result: object) -> Future[Any]:
    done: Future[Any] = Future()
    done.set_result(result)
    return done
