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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import torch
from grpc_reflection.v1alpha import reflection
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers.utils import logging as transformers_logging

from sft.cli.devices import find_device
from sft.errors import SFTError, UsageError
from sft.v1 import split_training_pb2_grpc as pb_grpc
from sft.wire.protocol import SERVER_OPTIONS, SERVICE
from sft_cloud.access import Access
from sft_cloud.admission import AdmissionInterceptor, Deadlines, Quotas
from sft_cloud.engine import Checkpoints, InProcessEngine, Opener, TransformersOpener, WeightsFinder
from sft_cloud.observability import NOBODY, AuditLog, Observer, observing, open_observer
from sft_cloud.options import LimitOptions, MetricsOptions
from sft_cloud.rpc import CallInterceptor
from sft_cloud.service import SERVICE_NAME as HEALTH
from sft_cloud.service import SESSION_TIMEOUT_SECONDS, Entry, Health, Registry, SplitTrainingService, log_closed
from sft_cloud.session import MemoryBudget, default_budget
from sft_cloud.storage import BlobStore, CheckpointStore

GRACE_SECONDS = 3.0
"""How long calls may take to end once the server stops."""

_LOOK_SECONDS = 0.05
"""Between two looks at whether all sessions are saved."""

SESSIONS_SECONDS = 1.0
"""Between two looks at which sessions have waited for their edge too long."""

WAITS_SECONDS = 1.0
"""Between two looks at which calls have waited for the other side too long."""

IDENTITIES_SECONDS = 10.0
"""Between two looks at whose token or certificate is no longer good: how much longer than its identity a call may last
in which nothing happens."""

_SPARE_THREADS = 8
"""Beside one for each session's stream: for unary calls, uploads, downloads, health checks and reflection."""

_OPEN = Access()

_log = logging.getLogger(__name__)


class CloudServer:
    """Everything that serves, in one process; what `sft-cloud serve` runs."""

    def __init__(
        self,
        host: str,
        port: int,
        device: torch.device,
        state_dir: Path,
        model_dir: Path | None,
        max_sessions: int,
        threads: int | None = None,
        make_opener: Callable[[BlobStore], Opener] | None = None,
        on_close: Callable[[Entry, str], None] = lambda entry, reason: None,
        has_flags: bool = True,
        session_timeout_seconds: float = SESSION_TIMEOUT_SECONDS,
        access: Access = _OPEN,
        observer: Observer = NOBODY,
        checkpoint_store: str | Path | None = None,
        limits: LimitOptions | None = None,
        audit: AuditLog | None = None,
    ) -> None:
        """Binds and starts. `port` 0 takes a free one. `make_opener`: for other models than the library's; `on_close`
        is told of every session that ends, and why; `has_flags`: whether host and port came from a command line, of
        which errors then speak; `access`: TLS, and who is let in; `observer` is told what happens;
        `checkpoint_store`: a directory or URL, by default below `state_dir`; `limits`: what each caller may take;
        `audit`: where who did what is written down. Raises UsageError when it cannot bind,
        StorageError.
        """
        dashes = "--" if has_flags else ""
        _check_bindable(host, port, dashes)
        limits = LimitOptions() if limits is None else limits
        audit = AuditLog(None) if audit is None else audit
        calls = max_sessions + _SPARE_THREADS
        store = BlobStore(state_dir / "blobs", limits.max_upload_bytes)
        # Without a model directory, names are still not looked up as paths: they come from edges.
        weights = WeightsFinder(state_dir / "models" if model_dir is None else model_dir, limits.download_models)
        self.quotas = Quotas(max_sessions, limits.opens_per_minute)
        self.deadlines = Deadlines(limits.stall_timeout, limits.idle_timeout)
        self.admission = AdmissionInterceptor(self.quotas, self.deadlines, audit)
        self.calls = CallInterceptor(access.identify)
        self._executor = ThreadPoolExecutor(calls, thread_name_prefix="call")
        self._server = grpc.server(
            self._executor,
            interceptors=[
                self.calls,
                *observing(observer),
                *([access.interceptor] if access.interceptor else []),
                self.admission,
            ],
            options=SERVER_OPTIONS,
            maximum_concurrent_rpcs=calls,
        )
        try:
            if access.credentials is None:
                self.port = self._server.add_insecure_port(_address(host, port))
            else:
                self.port = self._server.add_secure_port(_address(host, port), access.credentials)
        except RuntimeError as error:
            raise UsageError(
                f"cannot listen on {_address(host, port)}; choose another {dashes}host or {dashes}port"
            ) from error
        self.address = _address(host, self.port)
        """`host:port`, with the port that was taken."""
        self.device = device
        self.memory = MemoryBudget(default_budget(device) if limits.memory_limit is None else limits.memory_limit)
        checkpoints: Checkpoints | None = None  # of a script's model none are kept
        if make_opener:
            opener = make_opener(store)
        else:
            checkpoints = Checkpoints(
                CheckpointStore(checkpoint_store or state_dir / "checkpoints"), limits.max_upload_bytes
            )
            opener = TransformersOpener(device, store, weights, checkpoints, self.memory)
        # Each call waits for at most one piece of work, so the queue holds whatever is admitted.
        self.engine = InProcessEngine(device, opener, checkpoints, calls, threads)

        def closed(entry: Entry, reason: str) -> None:
            self.engine.close(entry.session_id)
            log_closed(entry, reason, self.sessions.age(entry))
            audit.write("closed", entry.owner.name, "-", session=entry.label, reason=reason)
            observer.metrics.closed(entry.owner.name)
            on_close(entry, reason)

        self.sessions = Registry(max_sessions, closed, session_timeout_seconds=session_timeout_seconds)
        observer.metrics.watch_sessions(
            lambda: [(entry.owner.name, entry.stream is not None) for entry in self.sessions.entries()], max_sessions
        )
        if access.credentials is not None:
            observer.metrics.watch_certificate(access.certificate_expires)
        self.service = SplitTrainingService(self.engine, store, self.sessions, observer)
        pb_grpc.add_SplitTrainingServicer_to_server(self.service, self._server)
        self._health = Health(("", SERVICE), self.deadlines)
        self._health.add_to(self._server)
        names = (SERVICE, HEALTH, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self._server.start()
        self._stopping = threading.Event()
        looks = [
            ("sessions", self.sessions.reap, SESSIONS_SECONDS),
            ("waits", self.deadlines.look, WAITS_SECONDS),
        ]
        if access.interceptor is not None:
            looks.append(("identities", access.interceptor.end_stale_calls, IDENTITIES_SECONDS))
        self._threads = [
            threading.Thread(target=repeat, args=(look, seconds, self._stopping), name=name, daemon=True)
            for name, look, seconds in looks
        ]
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
            entry.stream is not None and entry.request.run_id and entry.saves == before.get(entry.session_id, 0)
            for entry in self.sessions.entries()
        ):
            if hurry.wait(_LOOK_SECONDS):
                return

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Takes no new call, lets running steps finish, and returns when nothing runs any more."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._health.stop_serving()
        self.service.drain()
        self._server.stop(grace_seconds).wait()
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
    host: str,
    port: int,
    device: str,
    state_dir: Path,
    model_dir: Path | None,
    max_sessions: int,
    threads: int | None,
    exit_with_stdin: bool,
    session_timeout_seconds: float,
    access: Access,
    audit: AuditLog,
    limits: LimitOptions,
    metrics_options: MetricsOptions,
    checkpoint_store: str | None,
    grace_seconds: float,
) -> None:
    """Serves until SIGTERM or SIGINT, or the end of standard input if `exit_with_stdin`. Main thread only.

    Edges then have `grace_seconds` to save their checkpoints, until a second signal, or the end of standard input.

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
    if exit_with_stdin:
        threading.Thread(target=_wait_for_end_of_stdin, args=(stop, hurry), daemon=True).start()
    found = find_device(device)
    observed = ExitStack()
    observer, metrics_url = observed.enter_context(open_observer(metrics_options, found))
    server = CloudServer(
        host,
        port,
        found,
        state_dir,
        model_dir,
        max_sessions,
        threads,
        session_timeout_seconds=session_timeout_seconds,
        access=access,
        checkpoint_store=checkpoint_store,
        observer=observer,
        limits=limits,
        audit=audit,
    )
    try:
        protection = {"tls": access.credentials is not None, "everybody": access.interceptor is None}
        _log.info("serving", extra={"fields": {"address": server.address, "device": str(server.device), **protection}})
        ready = {"event": "serving", "address": server.address, "device": str(server.device)}
        if metrics_url:
            ready["metrics"] = metrics_url
        sys.stdout.write(json.dumps(ready) + "\n")
        sys.stdout.flush()
        stop.wait()
        _log.info("stopping")
        server.wait_for_checkpoints(grace_seconds, hurry)
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


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


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
        raise SFTError(f"cannot listen on {_address(host, port)}: {error.strerror}; {advice}") from error
