"""Every option of `sft-cloud serve`. Imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from sft.cli.durations import Duration
from sft.cli.options import above_zero, at_least, spelled
from sft.errors import UsageError


def _default_state_dir() -> Path:
    """Found when it is needed: who runs in a container may have no home directory. Raises UsageError."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft-cloud"
    except RuntimeError:
        raise UsageError("there is no home directory here to keep uploads in: give --state-dir") from None


SPARE_CALLS = 8
"""Beside one for each session's stream: for unary calls, uploads, downloads, health checks and reflection."""


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

    state_dir: Path = field(default_factory=_default_state_dir)
    """directory for the weights that edges upload, kept by content hash"""

    max_sessions: int = 16
    """edges that can train at once"""

    session_timeout: Duration = Duration("10m")
    """how long a session waits for its edge when the link has broken"""

    detached_timeout: Duration = Duration("24h")
    """how long the session of an edge that has left (`sft-edge train --detach`) waits for it when all is done"""

    checkpoint_store: str | None = field(default=None, metadata={"names_place": True})
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
        above_zero(self, "session_timeout", "detached_timeout")
        at_least(self, 0, "grace")
        if self.model_dir is not None and not self.model_dir.is_dir():
            raise UsageError(f"--model-dir {self.model_dir}: no such directory")

    @property
    def max_calls(self) -> int:
        """That run at a time: twice as many as one caller may have, so that it leaves some to others."""
        return 2 * (self.max_sessions + SPARE_CALLS)


_IDLE, _STALL = Duration("30m"), Duration("1m")


@dataclass(frozen=True)
class ServerAccess:
    """Who is let in, and how the way to the server is protected."""

    tls_cert: Path | None = None
    """PEM file with the server's certificate and what leads from it to its CA; with --tls-key calls are encrypted. A
    new pair is taken without a restart"""

    tls_key: Path | None = None
    """PEM file with the private key of --tls-cert"""

    tls_client_ca: Path | None = None
    """PEM file of the CA whose client certificates are asked for; a token then counts only with the certificate of its
    own name"""

    tokens: Path | None = None
    """file of `sft-cloud token create`: only who has a token in it is let in; what changes in it counts at once"""

    insecure: bool = False
    """listen on an address that other machines reach, although calls are not encrypted, or everybody is let in"""


def check_together(options: ServerAccess, dashes: str = "") -> None:
    """Raises UsageError for options that mean nothing without others. `dashes`: `--` where they are flags."""
    name = partial(spelled, dashes=dashes)
    if (options.tls_cert is None) != (options.tls_key is None):
        raise UsageError(f"{name('tls_cert')} and {name('tls_key')} belong together; give both")
    if options.tls_client_ca is not None and options.tls_cert is None:
        raise UsageError(f"{name('tls_client_ca')} needs {name('tls_cert')} and {name('tls_key')}")


def check_exposure(options: ServerAccess, host: str, is_loopback: bool, dashes: str = "") -> None:
    """Raises UsageError where strangers could reach the server, or read along, and nobody has said that they may."""
    name = partial(spelled, dashes=dashes)
    if is_loopback or options.insecure:
        return
    missing = []
    if options.tls_cert is None:
        missing.append(f"{name('tls_cert')} and {name('tls_key')} (make them with `sft-cloud certs init`)")
    if options.tokens is None and options.tls_client_ca is None:
        missing.append(f"{name('tokens')} (`sft-cloud token create`) or {name('tls_client_ca')}")
    if missing:
        raise UsageError(
            f"other machines can reach host {host or '(every interface)'}: give {', and '.join(missing)}; "
            f"or {name('insecure')}, where everybody who can reach it may use it and read along"
        )


@dataclass(frozen=True)
class LimitOptions:
    """What a caller may take of the server, beside the limits of its token, and how long the server waits for it."""

    idle_timeout: Duration = _IDLE
    """a stream on which the edge says nothing for so long is ended; its session lives on for --session-timeout"""

    stall_timeout: Duration = _STALL
    """how long a call waits for the other side in the middle of something: a first message, the next part of an upload,
    an answer to be read; large messages get a second more for every 8 KiB"""

    opens_per_minute: int = 120
    """requests to open a session that one caller may make in a minute"""

    calls_per_second: int = 100
    """calls that one caller may begin in a second, as a mean over three; more of them wait, and too many are refused"""

    max_upload_bytes: int | None = None
    """bytes of uploads kept for one caller whose token says nothing of it, and as many of checkpoints (default: what
    the disk holds)"""

    max_kept_bytes: int = 8 << 30
    """bytes of activations kept for one caller, encrypted, while its sessions last (--activations keep-on-cloud); with
    0 none are kept"""

    memory_limit: int | None = None
    """bytes that the whole process may take, or its tensors on a GPU (default: four fifths of what there is, of the
    container's)"""

    download_models: bool = False
    """fetch models from the hub when a caller names one that is not here; otherwise the caller uploads its weights"""

    only_torch_optimizers: bool = False
    """make no optimizers of other packages for scripts: by default also transformers', and those of lion-pytorch,
    schedulefree and bitsandbytes where they are installed"""

    audit_log: Path | None = None
    """file to which who did what is added, one JSON object a line"""

    def __post_init__(self) -> None:
        """Raises UsageError."""
        above_zero(self, "idle_timeout", "stall_timeout")
        at_least(self, 1, "opens_per_minute", "calls_per_second", "max_upload_bytes", "memory_limit")
        at_least(self, 0, "max_kept_bytes")


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
