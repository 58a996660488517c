"""The server process: made, announced, and ended in order."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import grpc
from grpc_reflection.v1alpha import reflection
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers.utils import logging as transformers_logging

from sft.client.address import for_grpc, spelled_address
from sft.errors import SFTError, UsageError
from sft.v1 import split_training_pb2_grpc as pb_grpc
from sft.wire.protocol import SERVER_OPTIONS, SERVICE
from sft_cloud.access import Access
from sft_cloud.admission import (
    AdmissionInterceptor,
    ConnectionGuard,
    Deadlines,
    Pace,
    Quotas,
    Reception,
    Strangers,
    open_files_limit,
    room,
)
from sft_cloud.engine import Opener, make_opener, start_engine, uploads
from sft_cloud.observability import NOBODY, AuditLog, Observer, observing, open_observer
from sft_cloud.options import LimitOptions, MetricsOptions, ServeOptions
from sft_cloud.rpc import CallInterceptor
from sft_cloud.service import HEALTH_SERVICE, Checks, Entry, Health, Registry, SplitTrainingService, log_closed

GRACE_SECONDS = 3.0
"""How long calls may take to end once the server stops."""

_LOOK_SECONDS = 0.05
"""Between two looks at whether all sessions are saved."""

SPARE_THREADS = 12
"""On which health is checked, of which some wait, and calls are refused that are too many."""

SESSIONS_SECONDS = 1.0
"""Between two looks at which sessions have waited for their edge too long."""

WAITS_SECONDS = 1.0
"""Between two looks at which calls have waited for the other side too long."""

MEMORY_SECONDS = 10.0
"""Between two looks at whether the process has more memory than it holds for anybody."""

IDENTITIES_SECONDS = 10.0
"""Between two looks at whose token or certificate is no longer good: how much longer than its identity a call may last
in which nothing happens."""

_OPEN, _NO_LIMITS = Access(), LimitOptions()

_log = logging.getLogger(__name__)


class CloudServer:
    """Everything that serves, in one process; what `sft-cloud serve` runs."""

    def __init__(
        self,
        options: ServeOptions,
        limits: LimitOptions = _NO_LIMITS,
        access: Access = _OPEN,
        observer: Observer = NOBODY,
        audit: AuditLog | None = None,
        opener: Opener | None = None,
        on_close: Callable[[Entry, str], None] = lambda entry, reason: None,
        dashes: str = "--",
    ) -> None:
        """Binds and starts. `limits`: what each caller may take; `access`: TLS, and who is let in; `observer` is told
        what happens; `audit`: where who did what is written down; `opener`: for other models than the library's;
        `on_close` is told of every session that ends, and why; `dashes`: `--` where host and port are flags, of which
        errors then speak. Raises UsageError when it cannot bind, StorageError.
        """
        host, port = options.host, options.port
        _check_bindable(host, port, dashes)
        audit = AuditLog(None) if audit is None else audit
        opener = make_opener(options, limits) if opener is None else opener
        self.memory = opener.budget
        """What all that it holds for its callers has to fit into."""
        self.connections = ConnectionGuard(room(open_files_limit()))
        self.quotas = Quotas(options.max_sessions, limits.opens_per_minute, options.max_calls)
        self.deadlines = Deadlines(limits.stall_timeout, limits.idle_timeout)
        self.pace = Pace(limits.calls_per_second)
        self.admission = AdmissionInterceptor(
            self.connections, self.quotas, self.deadlines, audit, self.memory, self.pace
        )
        self.calls = CallInterceptor(access.identify)
        # Calls of known callers take a thread each; how many there may be the quotas say, on one of those to spare.
        threads = options.max_calls + SPARE_THREADS
        self._executor = Reception(threads, self.pace, self.connections, access.identify)
        if access.interceptor is not None:
            access.interceptor.refuse_on(Strangers(self._executor.later))
        self._server = grpc.server(
            self._executor,
            interceptors=[
                self.calls,
                *observing(observer),
                *([access.interceptor] if access.interceptor else []),
                self.admission,
            ],
            options=[*SERVER_OPTIONS, ("grpc.max_allowed_incoming_connections", self.connections.room.most)],
        )
        try:
            if access.credentials is None:
                self.port = self._server.add_insecure_port(for_grpc(spelled_address(host, port)))
            else:
                self.port = self._server.add_secure_port(for_grpc(spelled_address(host, port)), access.credentials)
        except RuntimeError as error:
            raise UsageError(
                f"cannot listen on {spelled_address(host, port)}; choose another {dashes}host or {dashes}port"
            ) from error
        self.address = spelled_address(host, self.port)
        """`host:port`, with the port that was taken."""
        self.connections.watch(self.port)
        self.engine = start_engine(options, opener)

        def closed(entry: Entry, reason: str) -> None:
            with ExitStack() as told:  # the last first, and each whatever another raises
                told.callback(on_close, entry, reason)
                told.callback(observer.metrics.closed, entry.owner.name)
                told.callback(audit.write, "closed", entry.owner.name, "-", session=entry.label, reason=reason)
                told.callback(log_closed, entry, reason, self.sessions.age(entry))
                told.callback(self.engine.close, entry.session_id)

        self.sessions = Registry(
            options.max_sessions,
            options.session_timeout,
            closed,
            detached_timeout_seconds=options.detached_timeout,
        )
        observer.metrics.watch_sessions(
            lambda: [(entry.owner.name, entry.has_edge) for entry in self.sessions.entries()],
            options.max_sessions,
        )
        observer.metrics.watch_memory(self.memory)
        observer.metrics.watch_tenants(access.names)
        # Of certificates nobody knows how many there are.
        self.memory.shared_if(lambda: len(set(access.names())) != 1)
        observer.metrics.watch_connections(lambda: self.connections.held, lambda: self.connections.ended)
        if access.credentials is not None:
            observer.metrics.watch_certificate(access.certificate_expires)
        self.service = SplitTrainingService(
            self.engine,
            uploads(options, limits),
            self.sessions,
            observer,
            self.memory,
            self.pace.rest,
            Checks(self.admission.check_left, self.quotas.seconds_to_wait, access.still_valid),
        )
        pb_grpc.add_SplitTrainingServicer_to_server(self.service, self._server)
        self._health = Health(("", SERVICE), self.deadlines, self.pace.check)
        self._health.add_to(self._server)
        names = (SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self._server.start()
        self._stopping = threading.Event()
        looks = [
            ("sessions", self.sessions.reap, SESSIONS_SECONDS),
            ("waits", self.deadlines.look, WAITS_SECONDS),
            ("memory", self.memory.tidy, MEMORY_SECONDS),
        ]
        if access.interceptor is not None:
            looks.append(("identities", access.interceptor.end_stale_calls, IDENTITIES_SECONDS))
            access.interceptor.tell(lambda peer, reason: self.connections.refused(peer))
        self._threads = [
            threading.Thread(target=repeat, args=(look, seconds, self._stopping), name=name, daemon=True)
            for name, look, seconds in looks
        ]
        guard = threading.Thread(target=self.connections.run, args=(self._stopping,), name="connections", daemon=True)
        self._threads.append(guard)
        for thread in self._threads:
            thread.start()

    def wait_for_checkpoints(self, seconds: float, hurry: threading.Event) -> None:
        """Has every edge that is connected save a checkpoint, so that it loses nothing when the server stops.

        It has done so once it says that it keeps the step: until then its own half may not be written.

        Returns when all that can have done so, after so many seconds, or with `hurry`. No session is opened any more.
        """
        before = {entry.session_id: entry.saves for entry in self.sessions.entries()}
        self.service.stopping.set()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(
            entry.has_edge and entry.request.run_id and entry.saves == before.get(entry.session_id, 0)
            for entry in self.sessions.entries()
        ):
            if hurry.wait(_LOOK_SECONDS):
                return

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Takes no new call, lets running steps finish, and returns when nothing runs any more."""
        self._stopping.set()
        self.connections.hurry()
        for thread in self._threads:
            thread.join()
        self._health.stop_serving()
        self.service.drain()
        self._server.stop(grace_seconds).wait()
        self._health.shutdown()
        self.engine.shutdown()
        self._executor.shutdown()


def repeat(work: Callable[[], object], seconds: float, stop: threading.Event) -> None:
    """Works every so many seconds until `stop`, in a thread of the caller's. An error is logged, and ends nothing."""
    while not stop.wait(seconds):
        try:
            work()
        except Exception:
            _log.exception("something went wrong in the background; it is tried again", extra={"fields": {}})


def serve(
    options: ServeOptions, limits: LimitOptions, metrics_options: MetricsOptions, access: Access, audit: AuditLog
) -> None:
    """Serves until SIGTERM or SIGINT, or the end of standard input if the options say so. Main thread only.

    Edges then have the options' `grace` to save their checkpoints, until a second signal, or the end of standard input.

    Prints one line of JSON on standard output when it is ready: `event`, `address`, `device`, and `metrics` where there
    are some.
    """
    # The libraries' own handlers and progress bars would break the form of the log.
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    disable_progress_bars()
    stop, hurry = threading.Event(), threading.Event()

    def on_signal(*_: object) -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    if options.exit_with_stdin:
        threading.Thread(target=_wait_for_end_of_stdin, args=(stop, hurry), daemon=True).start()
    opener, observed = make_opener(options, limits), ExitStack()
    observer, metrics_url = observed.enter_context(open_observer(metrics_options, opener.device))
    server = CloudServer(options, limits, access, observer, audit, opener)
    try:
        protection = {"tls": access.credentials is not None, "everybody": access.interceptor is None}
        _log.info(
            "serving", extra={"fields": {"address": server.address, "device": server.engine.device, **protection}}
        )
        ready = {"event": "serving", "address": server.address, "device": server.engine.device}
        if metrics_url:
            ready["metrics"] = metrics_url
        sys.stdout.write(json.dumps(ready) + "\n")
        sys.stdout.flush()
        stop.wait()
        _log.info("stopping")
        server.wait_for_checkpoints(options.grace, hurry)
    finally:
        server.stop()
        observed.close()


def _wait_for_end_of_stdin(stop: threading.Event, hurry: threading.Event) -> None:
    # Not through sys.stdin: its lock would be held when the interpreter ends.
    with contextlib.suppress(OSError):  # closed from the start
        while os.read(0, 4096):
            pass
    hurry.set()  # whose child this is has gone, and was its only edge
    stop.set()


def _check_bindable(host: str, port: int, dashes: str) -> None:
    """Tries the address with a plain socket, whose errors say more than gRPC's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise UsageError(f"{dashes}host {host}: {error.strerror}") from error
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        advice = f"choose another {dashes}port, or 0 for a free one" if taken else "choose another"
        raise SFTError(f"cannot listen on {spelled_address(host, port)}: {error.strerror}; {advice}") from error
