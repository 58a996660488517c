"""`sft-cloud serve`."""

from __future__ import annotations

from sft.cli.devices import check_device
from sft.cli.options import parse
from sft_cloud.options import LimitOptions, MetricsOptions, ServeOptions, ServerAccess, check_together


def serve_command(prog: str, argv: list[str]) -> int:
    """Wait for edges and train their upper halves."""
    options, access_options, limits, metrics_options = parse(
        [ServeOptions, ServerAccess, LimitOptions, MetricsOptions], argv, prog, serve_command.__doc__
    )
    check_together(access_options, dashes="--")
    check_device(options.device)
    from sft_cloud.access import make_access
    from sft_cloud.observability import AuditLog, set_up_logging

    set_up_logging(options.log_level, options.log_format)
    audit = AuditLog(limits.audit_log)
    access = make_access(
        access_options,
        options.host,
        on_refused=lambda peer, reason: audit.write("refused", "-", peer, code="UNAUTHENTICATED", reason=reason),
    )
    from sft_cloud.server import serve  # late: torch takes seconds, and nothing so far needs it

    serve(
        host=options.host,
        port=options.port,
        device=options.device,
        state_dir=options.state_dir,
        model_dir=options.model_dir,
        max_sessions=options.max_sessions,
        threads=options.threads,
        exit_with_stdin=options.exit_with_stdin,
        limits=limits,
        session_timeout_seconds=options.session_timeout,
        access=access,
        audit=audit,
        checkpoint_store=options.checkpoint_store,
        grace_seconds=options.grace,
        metrics_options=metrics_options,
    )
    return 0
