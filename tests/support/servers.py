"""Servers of this process, for tests: on a free port of this machine, and on its CPU with one thread."""

from __future__ import annotations

from pathlib import Path

from sft_cloud.access.protection import Access
from sft_cloud.observability.audit import AuditLog
from sft_cloud.observability.observer import NOBODY, Observer
from sft_cloud.options import LimitOptions, ServeOptions
from sft_cloud.server import CloudServer


def start_server(
    state_dir: Path,
    max_sessions: int = 4,
    limits: LimitOptions | None = None,
    access: Access | None = None,
    observer: Observer = NOBODY,
    audit: AuditLog | None = None,
    **options: object,
) -> CloudServer:
    """`options`: fields of ServeOptions. Without `limits` a caller may ask as fast as a test does."""
    values = {"port": 0, "device": "cpu", "threads": 1, "state_dir": state_dir, "max_sessions": max_sessions}
    serving = ServeOptions(**{**values, **options})  # type: ignore[arg-type]
    return CloudServer(serving, limits or LimitOptions(calls_per_second=10_000), access or Access(), observer, audit)
