"""The port where Prometheus reads: a small HTTP server that strangers can neither fill nor have fill the log."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from socketserver import ThreadingTCPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import MetricsHandler

from sft.errors import UsageError
from sft_cloud.observability.log_limit import LogLimit

CONNECTIONS = 64
"""At a time. One more takes the place of the oldest: a scrape takes milliseconds, who holds on is not scraping."""

SECONDS = 10.0
"""After which a connection is ended, whatever it does."""

_ERRORS_PER_SECOND = 1
"""Lines of the log about scrapes that failed."""

_log = logging.getLogger(__name__)


class MetricsPort:
    """Serves a registry over HTTP, in threads of its own, from construction to `close`."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, seconds: float = SECONDS) -> None:
        """`port` 0 takes a free one; `seconds`: for a connection. Raises UsageError when it cannot bind."""
        try:
            self._server = _Server(host, port, MetricsHandler.factory(registry), seconds)
        except OSError as error:
            raise UsageError(
                f"cannot serve metrics on {host} port {port}: {error.strerror}; choose another --metrics-port or "
                "--metrics-host"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_address[1]}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Returns when nobody listens any more."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingTCPServer):
    """Ends connections that are too old or too many."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = CONNECTIONS

    def __init__(self, host: str, port: int, handler: Callable[..., Any], seconds: float) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._seconds = seconds
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}
        """When each began, the oldest first."""
        self._lines = LogLimit(_ERRORS_PER_SECOND, time.monotonic)
        super().__init__((host, port), handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        """See socketserver. The oldest connection makes room for one that is over the limit."""
        try:
            connection, address = super().get_request()
        except OSError:
            time.sleep(0.1)  # no file is left; the next look comes at once otherwise
            raise
        with self._lock:
            if len(self._open) >= CONNECTIONS:
                self._end(next(iter(self._open)))
            self._open[connection] = time.monotonic()
        return connection, address

    def service_actions(self) -> None:
        """See socketserver, which calls it twice a second."""
        oldest = time.monotonic() - self._seconds
        with self._lock:
            for connection in [one for one, began in self._open.items() if began < oldest]:
                self._end(connection)

    def shutdown_request(self, request: Any) -> None:
        """See socketserver: its thread is done with it."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """See socketserver. A connection that broke is no event; anything else is a line, now and then."""
        error = sys.exc_info()[1]
        left_out = None if isinstance(error, OSError) else self._lines.take()
        if left_out is not None:
            fields = {"reason": f"{type(error).__name__}: {error}"[:200], "left_out_before": left_out}
            _log.warning("a scrape failed", extra={"fields": fields})

    def _end(self, connection: socket.socket) -> None:
        # Not closed: its thread does that, once whatever it waits for has ended with an error.
        del self._open[connection]
        with suppress(OSError):  # the other side has gone
            connection.shutdown(socket.SHUT_RDWR)
