"""What the server holds in memory, as figures for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sft_cloud.memory import MemoryBudget

_PROCESS = "process"
"""The kind of what the server took before its first caller."""


class MemoryFigures(Collector):
    """Read from the budget itself, so that every kind is there at 0 from the start."""

    def __init__(self, prefix: str, memory: MemoryBudget) -> None:
        self._prefix = prefix
        self._memory = memory

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        memory = self._memory
        limit = GaugeMetricFamily(f"{self._prefix}_memory_limit_bytes", "That may be held.", labels=("of",))
        limit.add_metric(["process" if memory.host is None else "device"], memory.limit_bytes)
        if memory.host is not None:
            limit.add_metric(["process"], memory.host.limit_bytes)
        yield limit
        held = GaugeMetricFamily(f"{self._prefix}_memory_held_bytes", "That are held.", labels=("kind",))
        held.add_metric([_PROCESS], (memory.host or memory).process_bytes)
        for kind, size in memory.held().items():
            held.add_metric([kind.value], size)
        yield held
        what = "Refusals because there was no memory."
        refused = CounterMetricFamily(f"{self._prefix}_memory_refusals", what, labels=("kind",))
        for kind, count in memory.refused().items():
            refused.add_metric([kind.value], count)
        yield refused
