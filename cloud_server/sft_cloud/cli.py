"""The command line `sft-cloud`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sft.config import above_zero, at_least, parse, run
from sft.durations import Duration
from sft.errors import UsageError
from sft_cloud.access_options import AccessOptions, check_together
from sft_cloud.certs_command import certs_command
from sft_cloud.limit_options import LimitOptions
from sft_cloud.metrics_options import MetricsOptions
from sft_cloud.status_command import status_command
from sft_cloud.token_commands import token_command

_DEFAULT_STATE_DIR = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft-cloud"


@dataclass(frozen=True)
class ServeOptions:
    """Where the cloud listens, what it computes on, and where it keeps weights."""

    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 is every interface, which needs TLS and tokens, or --insecure"""

    port: int = 50051
    """TCP port; 0 takes a free one"""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes the first GPU there is"""

    threads: int | None = None
    """CPU threads that torch computes with (default: torch's own choice)"""

    model_dir: Path | None = None
    """directory of models, each under its name; looked into before the hub's cache, and before the hub with
    --download-models"""

    state_dir: Path = _DEFAULT_STATE_DIR
    """directory for the weights that edges upload, kept by content hash"""

    max_sessions: int = 16
    """edges that can train at once"""

    session_timeout: Duration = Duration("10m")
    """how long a session waits for its edge when the link has broken"""

    checkpoint_store: str | None = None
    """directory, or URL that fsspec knows, such as s3://bucket/folder, for the cloud's halves of checkpoints; without
    it `checkpoints` in --state-dir"""

    grace: Duration = Duration("30s")
    """how long edges may take to save their checkpoints when the server is told to stop"""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """least level that is logged"""

    log_format: Literal["text", "json"] = "text"
    """one line of text or one JSON object an event, on standard error"""

    exit_with_stdin: bool = False
    """stop when standard input ends: how a child process follows its parent, even one that was killed"""

    def __post_init__(self) -> None:
        """Raises UsageError."""
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port must be from 0 to 65535, not {self.port}")
        if not 1 <= self.max_sessions <= 1000:
            raise UsageError(f"--max-sessions must be from 1 to 1000, not {self.max_sessions}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads must be at least 1, not {self.threads}")
        above_zero(self, "session_timeout")
        at_least(self, 0, "grace")
        if self.model_dir is not None and not self.model_dir.is_dir():
            raise UsageError(f"--model-dir {self.model_dir}: no such directory")


def serve_command(prog: str, argv: list[str]) -> int:
    """Wait for edges and train their upper halves."""
    options, access_options, limits, metrics_options = parse(
        [ServeOptions, AccessOptions, LimitOptions, MetricsOptions], argv, prog, serve_command.__doc__
    )
    check_together(access_options, dashes="--")
    from sft_cloud.logs import set_up_logging
    from sft_cloud.serve import serve  # late: torch takes seconds, and --help does not need it

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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code of the process."""
    commands = {"serve": serve_command, "status": status_command, "token": token_command, "certs": certs_command}
    return run("sft-cloud", commands, argv)
