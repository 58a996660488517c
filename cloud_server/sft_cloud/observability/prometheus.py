"""Figures for Prometheus: what is counted, under which names, and the port where they are read.

docs/observability.md lists them. What a tenant is called comes from the operator's token file and certificates, so the
number of series is bounded by these; nothing that an edge makes up becomes a label.
"""

from __future__ import annotations

import socket
import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from sft.errors import UsageError
from sft.v1 import split_training_pb2 as pb
from sft.version import __version__
from sft.wire.protocol import PROTOCOL_VERSION
from sft_cloud.observability.metrics import Metrics, Sessions

_PREFIX = "sft_cloud"

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Bounds of the histograms: from a message that finds an idle worker to a queue of edges behind a large model."""


class PrometheusMetrics(Metrics):
    """Counts in a registry of its own, so that several servers in a process do not add up."""

    def __init__(self, device: torch.device) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._sessions_opened = self._counter("sessions_opened", "Sessions that were opened.")
        self._sessions_resumed = self._counter("sessions_resumed", "Sessions that went on from a checkpoint.")
        self._sessions_closed = self._counter("sessions_closed", "Sessions that ended.")
        self._reconnects = self._counter("reconnects", "Streams that took the place of another one of their session.")
        self._messages = self._counter("messages", "Messages of streams that were answered.", "kind")
        self._repeated = self._counter("repeated_messages", "Messages that came again, and were answered from memory.")
        self._steps = self._counter("steps", "Steps that were taken.")
        self._skipped = self._counter("steps_skipped", "Steps that were undone for want of memory.")
        self._received = self._counter("received_bytes", "Bytes of messages that came by streams.")
        self._sent = self._counter("sent_bytes", "Bytes of the answers to them.")
        self._uploads = self._counter("uploads", "Blobs that were stored.")
        self._upload_bytes = self._counter("upload_bytes", "Bytes of blobs that were stored.")
        self._downloads = self._counter("downloads", "Downloads of weights or optimizer states.")
        self._download_bytes = self._counter("download_bytes", "Bytes of downloads.")
        self._checkpoints = self._counter("checkpoints", "Checkpoints that were saved.")
        self._checkpoint_bytes = self._counter("checkpoint_bytes", "Bytes of checkpoints that were saved.")
        self._checkpoint_failures = self._counter("checkpoint_failures", "Checkpoints that could not be written.")
        self._rejects = self._counter("rejects", "Calls that were refused or failed.", "method", "code", "reason")
        self._waits = self._histogram("queue_wait_seconds", "How long work waited for the device.")
        self._work = self._histogram("work_seconds", "How long the device worked on a piece of work.")
        info = Gauge(f"{_PREFIX}_info", "Always 1.", ("version", "protocol", "device"), registry=self.registry)
        info.labels(__version__, str(PROTOCOL_VERSION), str(device)).set(1)
        if device.type == "cuda":
            memory = Gauge(f"{_PREFIX}_device_memory_bytes", "Memory that tensors take.", registry=self.registry)
            memory.set_function(lambda: torch.cuda.memory_allocated(device))

    def watch_sessions(self, sessions: Sessions, limit: int) -> None:
        self.registry.register(_Sessions(sessions))
        Gauge(f"{_PREFIX}_sessions_limit", "Sessions that there may be.", registry=self.registry).set(limit)

    def watch_certificate(self, expires: Callable[[], float | None]) -> None:
        gauge = Gauge(f"{_PREFIX}_certificate_expires_unix_seconds", "When it does.", registry=self.registry)
        gauge.set_function(lambda: expires() or 0.0)

    def opened(self, tenant: str, resumed: bool) -> None:
        self._sessions_opened.labels(tenant).inc()
        if resumed:
            self._sessions_resumed.labels(tenant).inc()

    def attached(self, tenant: str, again: bool) -> None:
        if again:
            self._reconnects.labels(tenant).inc()

    def closed(self, tenant: str) -> None:
        self._sessions_closed.labels(tenant).inc()

    def worked(self, tenant: str, waited_seconds: float, worked_seconds: float) -> None:
        self._waits.labels(tenant).observe(waited_seconds)
        self._work.labels(tenant).observe(worked_seconds)

    def answered(
        self,
        tenant: str,
        message: pb.EdgeMessage,
        answer: pb.CloudMessage,
        sizes: tuple[int, int],
        steps: int = 0,
        repeated: bool = False,
    ) -> None:
        self._messages.labels(tenant, message.WhichOneof("body") or "none").inc()
        self._received.labels(tenant).inc(sizes[0])
        self._sent.labels(tenant).inc(sizes[1])
        if repeated:
            self._repeated.labels(tenant).inc()
            return  # what it did was counted when it was done
        self._steps.labels(tenant).inc(steps)
        if answer.HasField("step_skipped"):
            self._skipped.labels(tenant).inc()
        elif answer.checkpoint_saved.error:
            self._checkpoint_failures.labels(tenant).inc()
        elif answer.HasField("checkpoint_saved"):
            self._checkpoints.labels(tenant).inc()
            self._checkpoint_bytes.labels(tenant).inc(answer.checkpoint_saved.total_bytes)

    def uploaded(self, tenant: str, total_bytes: int) -> None:
        self._uploads.labels(tenant).inc()
        self._upload_bytes.labels(tenant).inc(total_bytes)

    def downloaded(self, tenant: str, total_bytes: int) -> None:
        self._downloads.labels(tenant).inc()
        self._download_bytes.labels(tenant).inc(total_bytes)

    def refused(self, tenant: str, method: str, code: str, reason: str) -> None:
        self._rejects.labels(tenant, method, code, reason).inc()

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", what, ("tenant", *labels), registry=self.registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", what, ("tenant",), buckets=_SECONDS, registry=self.registry)


class _Sessions(Collector):
    """Read from the sessions themselves: counted up and down, the figures would drift with the first mistake."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def collect(self) -> Iterator[Metric]:
        open_now, attached = self._families()
        sessions = list(self._sessions())
        for family, tenants in (
            (open_now, [tenant for tenant, _ in sessions]),
            (attached, [tenant for tenant, has_stream in sessions if has_stream]),
        ):
            for tenant, count in sorted(Tally(tenants).items()):
                family.add_metric([tenant], count)
            yield family

    @staticmethod
    def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily]:
        return (
            GaugeMetricFamily(f"{_PREFIX}_sessions", "Sessions that are open.", labels=("tenant",)),
            GaugeMetricFamily(f"{_PREFIX}_streams", "Sessions that a stream has now.", labels=("tenant",)),
        )


class MetricsPort:
    """Serves a registry over HTTP, in threads of its own, from construction to `close`."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        """`port` 0 takes a free one. Raises UsageError when it cannot bind."""

        class Server(ThreadingWSGIServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        try:
            self._server: WSGIServer = make_server(host, port, make_wsgi_app(registry), Server, _Quiet)
        except OSError as error:
            raise UsageError(
                f"cannot serve metrics on {host} port {port}: {error.strerror}; choose another --metrics-port or "
                "--metrics-host"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Returns when nobody listens any more."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Quiet(WSGIRequestHandler):
    timeout = 10.0
    """Seconds for which a client may be silent; its thread ends then."""

    def log_message(self, format: str, *args: object) -> None:
        """A scrape is no event for the log."""
