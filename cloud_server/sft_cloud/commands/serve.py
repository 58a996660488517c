"""`sft-cloud serve`."""

from __future__ import annotations

from sft.cli.devices import check_device
from sft.cli.imports import imports
from sft.cli.options import parse
from sft_cloud.options import LimitOptions, MetricsOptions, ServeOptions, ServerAccess


def serve_command(prog: str, argv: list[str]) -> int:
    """Wait for edges and train their upper halves."""
    options, access_options, limits, metrics_options = parse(
        [ServeOptions, ServerAccess, LimitOptions, MetricsOptions], argv, prog, serve_command.__doc__
    )
    check_device(options.device)
    from sft_cloud.access import make_access  # late, as --help needs none of it
    from sft_cloud.observability import AuditLog, set_up_logging

    set_up_logging(options.log_level, options.log_format)
    audit = AuditLog(limits.audit_log)

    def refused(peer: str, reason: str) -> None:
        audit.write("refused", "-", peer, code="UNAUTHENTICATED", reason=reason)

    access = make_access(access_options, options.host, on_refused=refused)
    with imports():
        from sft_cloud.server import serve  # later still: torch takes seconds

    serve(options, limits, metrics_options, access, audit)
    return 0
