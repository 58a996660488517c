"""Watches the service's calls: figures for `Metrics`, spans for a tracer. The service knows no more of either.

Spans are made only where the edge traces: of a call under the span that gRPC's metadata name, of a message under the
one that the message names.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from sft.tracing import NO_SPAN, NO_TRACER, Tracer, Value, open_tracer
from sft.v1 import split_training_pb2 as pb
from sft_cloud.observability.metrics import Metrics, kind_of
from sft_cloud.options import MetricsOptions

if TYPE_CHECKING:
    import torch  # late: who makes a token does not wait for it


class Observer:
    """What the service tells of messages."""

    def __init__(self, metrics: Metrics | None = None, tracer: Tracer = NO_TRACER) -> None:
        self.metrics = metrics or Metrics()
        self.tracer = tracer

    def message(self, tenant: str, label: str, message: pb.EdgeMessage) -> Watch:
        """Watches a message until it is answered; `label` is that of its session."""
        return Watch(self, tenant, label, message)


NOBODY = Observer()
"""Where nobody wants to know."""


class Watch:
    """One message on its way through the service; a context manager."""

    def __init__(self, observer: Observer, tenant: str, label: str, message: pb.EdgeMessage) -> None:
        self._metrics, self._tracer = observer.metrics, observer.tracer
        self._tenant = tenant
        self._message = message
        self._span = NO_SPAN
        if self._tracer.active and message.trace_parent:
            attributes: dict[str, Value] = {"sft.tenant": tenant, "sft.session": label, "sft.step": message.step}
            attributes["sft.micro_batch"] = message.micro_batch
            self._span = self._tracer.server_span(kind_of(message), message.trace_parent, attributes)

    def worked(self, waited_seconds: float, worked_seconds: float, error: Exception | None) -> None:
        """The engine has done what the message asks, just now, or it ended with an error."""
        self._metrics.worked(self._tenant, waited_seconds, worked_seconds)
        if self._span.parent:
            over = time.time_ns()
            began = over - int(1e9 * worked_seconds)
            asked = began - int(1e9 * waited_seconds)
            self._tracer.past_span("wait for the device", self._span.parent, asked, began)
            what = "" if error is None else type(error).__name__
            self._tracer.past_span("work on the device", self._span.parent, began, over, what)

    def answered(self, answer: pb.CloudMessage, sizes: tuple[int, int], steps: int, repeated: bool) -> None:
        """See Metrics."""
        self._metrics.answered(self._tenant, self._message, answer, sizes, steps, repeated)
        if repeated:
            self._span.set("sft.repeated", True)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._span.end("" if error is None else type(error).__name__)


@contextmanager
def open_observer(options: MetricsOptions, device: torch.device) -> Iterator[tuple[Observer, str]]:
    """An observer for a server, and the address of its figures; an empty one where nobody reads them.

    Raises UsageError when the port cannot be bound.
    """
    with ExitStack() as stack:
        tracer = open_tracer("sft-cloud")
        stack.callback(tracer.close)
        if options.metrics_port is None:
            yield Observer(None, tracer), ""
            return
        from sft_cloud.observability.metrics_port import MetricsPort  # only here: a server without does not need them
        from sft_cloud.observability.prometheus import PrometheusMetrics

        metrics = PrometheusMetrics(device)
        port = MetricsPort(options.metrics_host, options.metrics_port, metrics.registry)
        stack.callback(port.close)
        yield Observer(metrics, tracer), port.url
