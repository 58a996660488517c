"""`sft-cloud serve`."""

from __future__ import annotations

from sft.cli.options import parse
from sft_cloud.options import LimitOptions, MetricsOptions, ServeOptions, ServerAccess, check_together


def serve_command(prog: str, argv: list[str]) -> int:
    """Wait for edges and train their upper halves."""
    options, access_options, limits, metrics_options = parse(
        [ServeOptions, ServerAccess, LimitOptions, MetricsOptions], argv, prog, serve_command.__doc__
    )
    check_together(access_options, dashes="--")
    from sft_cloud.observability import set_up_logging
    from sft_cloud.server import serve  # late: torch takes seconds, and --help does not need it

    set_up_logging(options.log_level, options.log_format)
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
        access_options=access_options,
        checkpoint_store=options.checkpoint_store,
        grace_seconds=options.grace,
        metrics_options=metrics_options,
    )
    return 0
