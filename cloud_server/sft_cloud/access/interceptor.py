"""Nobody reaches a method, reflection included, before it is known who calls; the health check is for everybody."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc

from sft.wire.protocol import HEALTH_CHECK
from sft_cloud.access.authentication import Authentication
from sft_cloud.errors import UnauthenticatedError
from sft_cloud.identity import Identity
from sft_cloud.observability import LogLimit
from sft_cloud.rpc import Call, Handler, at_once, behaviour_of, remade

OPEN_METHODS = (HEALTH_CHECK,)
"""What load balancers and containers ask; it says no more than whether the server serves, and sees to it itself that
strangers' requests hold nothing."""

REFUSALS_PER_SECOND = 10
"""Lines of the log about strangers; more are counted, and how many is said in the next one."""

_log = logging.getLogger(__name__)


class AuthenticationInterceptor(grpc.ServerInterceptor):
    """Refuses strangers with UNAUTHENTICATED, and ends calls whose caller is not let in any more."""

    def __init__(
        self,
        authentication: Authentication,
        on_refused: Callable[[str, str], None] = lambda peer, reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_refused` is told the peer's address and why, for an audit log."""
        self._authentication = authentication
        self._on_refused = [on_refused]
        self._lines = LogLimit(REFUSALS_PER_SECOND, clock)
        self._running: dict[Call, Identity] = {}
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """See grpc.ServerInterceptor."""
        if handler_call_details.method in OPEN_METHODS:
            return continuation(handler_call_details)
        try:
            self._authentication.identify_metadata(handler_call_details.invocation_metadata)
        except UnauthenticatedError as error:
            refusal = error
            # As a stream, whatever the method is: then not even one message is read.
            return grpc.stream_unary_rpc_method_handler(
                at_once(lambda _, call: self._refuse(call, refusal), self._threads)
            )
        handler = continuation(handler_call_details)
        return handler and self._guarded(handler)

    def tell(self, on_refused: Callable[[str, str], None]) -> None:
        """Somebody else wants to know, too, who is refused and why."""
        self._on_refused.append(on_refused)

    def refuse_on(self, threads: ThreadPoolExecutor) -> None:
        """Refuses strangers there; at once otherwise."""
        self._threads = threads

    def end_stale_calls(self) -> None:
        """Ends what runs for callers that would not be let in now, though it waits for them and nothing happens.

        One look; the server has it repeated.
        """
        with self._lock:
            running = list(self._running.items())
        for call, identity in running:
            if not self._authentication.still_valid(identity):
                call.cancel()

    def _guarded(self, handler: Handler) -> Handler:
        behaviour = behaviour_of(handler)

        def admitted(request: Any, call: Call) -> tuple[Identity, Any]:
            identity = self._admit(call)
            return identity, self._checked(request, identity) if handler.request_streaming else request

        def one_answer(request: Any, call: Call) -> Any:
            _, taken = admitted(request, call)
            return behaviour(taken, call)

        def many_answers(request: Any, call: Call) -> Iterator[Any]:
            identity, taken = admitted(request, call)
            for answer in behaviour(taken, call):
                if not self._authentication.still_valid(identity):
                    self._refuse(call, _ended(identity))
                yield answer
                del answer

        return remade(handler, one_answer, many_answers)

    def _admit(self, call: Call) -> Identity:
        try:
            identity = call.caller
        except UnauthenticatedError as error:
            self._refuse(call, error)
        with self._lock:
            self._running[call] = identity
        if not call.add_callback(lambda: self._forget(call)):
            self._forget(call)
        return identity

    def _forget(self, call: Call) -> None:
        with self._lock:
            self._running.pop(call, None)

    def _checked(self, messages: Iterator[Any], identity: Identity) -> Iterator[Any]:
        for message in messages:
            if not self._authentication.still_valid(identity):
                raise _ended(identity)
            yield message
            del message  # a stream that idles must not keep it

    def _refuse(self, call: Call, error: UnauthenticatedError) -> NoReturn:
        left_out = self._lines.take()
        if left_out is not None:
            fields = {
                "peer": call.peer(),
                "reason": error.reason,
                **({"left_out_before": left_out} if left_out else {}),
            }
            _log.info("caller refused", extra={"fields": fields})
        for on_refused in self._on_refused:
            on_refused(call.peer(), error.reason)
        raise error


def _ended(identity: Identity) -> UnauthenticatedError:
    return UnauthenticatedError(
        "the token or the certificate that this call began with has expired or was revoked",
        f"{identity.name} is not let in any more",
    )
