"""Figures for Prometheus: what is counted, and under which names.

docs/observability.md lists them. What a tenant is called comes from the operator's token file and certificates, so the
number of series is bounded by these; nothing that an edge makes up becomes a label. Every counter of a tenant is there,
at 0, before the first thing that it counts: an increase from nothing to 1 is none for Prometheus.
"""

from __future__ import annotations

import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sft.v1 import split_training_pb2 as pb
from sft.version import __version__
from sft.wire.protocol import PROTOCOL_VERSION
from sft_cloud.memory import MemoryBudget
from sft_cloud.observability.memory_figures import MemoryFigures
from sft_cloud.observability.metrics import (
    KINDS,
    METHODS,
    NO_SUCH_METHOD,
    REFUSALS,
    Metrics,
    Sessions,
    kind_of,
    refusal_of,
)

_PREFIX = "sft_cloud"

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Bounds of the histograms: from a message that finds an idle worker to a queue of edges behind a large model."""


class PrometheusMetrics(Metrics):
    """Counts in a registry of its own, so that several servers in a process do not add up."""

    def __init__(self, device: torch.device) -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._tenants: set[str] = set()
        self._counters: list[Counter] = []
        self._expected = _Expected(self)  # the first to be asked in a scrape, so that what it adds is in this one
        self.registry.register(self._expected)
        ProcessCollector(registry=self.registry)
        self._sessions_opened = self._counter("sessions_opened", "Sessions that were opened.")
        self._sessions_resumed = self._counter("sessions_resumed", "Sessions that went on from a checkpoint.")
        self._sessions_closed = self._counter("sessions_closed", "Sessions that ended.")
        self._reconnects = self._counter("reconnects", "Streams that took the place of another one of their session.")
        self._sessions_refused = self._counter("sessions_refused", "Sessions that were not opened.", "reason")
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

    def watch_tenants(self, names: Callable[[], Iterable[str]]) -> None:
        self._expected.names = names
        for name in names():
            self.known(name)

    def known(self, tenant: str) -> None:
        with self._lock:
            if tenant in self._tenants:
                return
            self._tenants.add(tenant)
        for counter in self._counters:
            counter.labels(tenant)
        for kind in KINDS:
            self._messages.labels(tenant, kind)
        for reason in REFUSALS:
            self._sessions_refused.labels(tenant, reason)
        for method in (*METHODS.values(), NO_SUCH_METHOD):
            self._rejects.labels(tenant, method, "INTERNAL", "INTERNAL")

    def tenants(self) -> list[str]:
        """Who has called, or may."""
        with self._lock:
            return sorted(self._tenants)

    def watch_sessions(self, sessions: Sessions, limit: int) -> None:
        self.registry.register(_Sessions(sessions, self.tenants))
        Gauge(f"{_PREFIX}_sessions_limit", "Sessions that there may be.", registry=self.registry).set(limit)

    def watch_connections(self, held: Callable[[], int], ended: Callable[[], int]) -> None:
        gauge = Gauge(f"{_PREFIX}_connections", "Connections that are open.", registry=self.registry)
        gauge.set_function(held)
        self.registry.register(_Ended(ended))

    def watch_memory(self, memory: MemoryBudget) -> None:
        self.registry.register(MemoryFigures(_PREFIX, memory))

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
        self._messages.labels(tenant, kind_of(message)).inc()
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
        if method == "OpenSession":
            self._sessions_refused.labels(tenant, refusal_of(reason)).inc()

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        counter = Counter(f"{_PREFIX}_{name}", what, ("tenant", *labels), registry=self.registry)
        if not labels:
            self._counters.append(counter)
        return counter

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", what, ("tenant",), buckets=_SECONDS, registry=self.registry)


class _Expected(Collector):
    """Shows nothing itself: has the counters of everybody who may call be there."""

    def __init__(self, metrics: PrometheusMetrics) -> None:
        self._metrics = metrics
        self.names: Callable[[], Iterable[str]] = tuple

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        for name in self.names():
            self._metrics.known(name)
        return ()


class _Ended(Collector):
    """Read from who ends them."""

    def __init__(self, ended: Callable[[], int]) -> None:
        self._ended = ended

    def collect(self) -> Iterator[Metric]:
        what = "Connections that were ended as nobody was let in on them."
        yield CounterMetricFamily(f"{_PREFIX}_strangers_ended", what, value=self._ended())


class _Sessions(Collector):
    """Read from the sessions themselves: counted up and down, the figures would drift with the first mistake."""

    def __init__(self, sessions: Sessions, tenants: Callable[[], Iterable[str]]) -> None:
        self._sessions = sessions
        self._tenants = tenants

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def collect(self) -> Iterator[Metric]:
        open_now, attached = self._families()
        sessions = list(self._sessions())
        for family, tenants in (
            (open_now, [tenant for tenant, _ in sessions]),
            (attached, [tenant for tenant, has_stream in sessions if has_stream]),
        ):
            counts = Tally(tenants)
            for tenant in sorted({*self._tenants(), *counts}):
                family.add_metric([tenant], counts[tenant])
            yield family

    @staticmethod
    def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily]:
        return (
            GaugeMetricFamily(f"{_PREFIX}_sessions", "Sessions that are open.", labels=("tenant",)),
            GaugeMetricFamily(f"{_PREFIX}_streams", "Sessions that a stream has now.", labels=("tenant",)),
        )
