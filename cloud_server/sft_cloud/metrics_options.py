"""Where Prometheus finds the server's figures, as options. Imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass

from sft.errors import UsageError


@dataclass(frozen=True)
class MetricsOptions:
    """What Prometheus gets to see."""

    metrics_port: int | None = None
    """TCP port with figures for Prometheus, under /metrics; 0 takes a free one; without it nothing is counted"""

    metrics_host: str = "127.0.0.1"
    """address of that port. Whoever reaches it reads the figures, names of tenants among them"""

    def __post_init__(self) -> None:
        """Raises UsageError."""
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            raise UsageError(f"--metrics-port must be from 0 to 65535, not {self.metrics_port}")
