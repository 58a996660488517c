"""From options and the environment to an observer, and the port where Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from sft.tracing import open_tracer
from sft_cloud.metrics_options import MetricsOptions
from sft_cloud.observing import Observer


@contextmanager
def observation(options: MetricsOptions, device: torch.device) -> Iterator[tuple[Observer, str]]:
    """An observer for a server, and the address of its figures; an empty one where nobody reads them.

    Raises UsageError when the port cannot be bound.
    """
    with ExitStack() as stack:
        tracer = open_tracer("sft-cloud")
        stack.callback(tracer.close)
        if options.metrics_port is None:
            yield Observer(None, tracer), ""
            return
        from sft_cloud.prometheus import MetricsPort, PrometheusMetrics  # only here: a server without does not need it

        metrics = PrometheusMetrics(device)
        port = MetricsPort(options.metrics_host, options.metrics_port, metrics.registry)
        stack.callback(port.close)
        yield Observer(metrics, tracer), port.url
