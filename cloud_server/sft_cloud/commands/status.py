"""`sft-cloud status`: what a running server says of itself, and of its sessions to whom they concern."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass

from sft.cli.durations import Duration
from sft.cli.options import above_zero, parse
from sft.client.channel import open_channel
from sft.client.credentials import ClientOptions, read_credentials
from sft.client.inquiry import Inquiry
from sft.printable import format_bytes
from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import CLIENT_OPTIONS


@dataclass
class StatusOptions(ClientOptions):
    """Which server is asked, and how."""

    server: str | None = "127.0.0.1:50051"
    """HOST:PORT of a running `sft-cloud serve`"""

    timeout: Duration = Duration("10s")
    """how long to wait for the answer"""

    json: bool = False
    """write the answer as JSON"""

    def __post_init__(self) -> None:
        """Raises UsageError."""
        above_zero(self, "timeout")


def status_command(prog: str, argv: list[str]) -> int:
    """Ask a running server what it is and which sessions it has."""
    (options,) = parse([StatusOptions], argv, prog, status_command.__doc__)
    address, credentials = str(options.server), read_credentials(options)
    with open_channel(address, credentials, CLIENT_OPTIONS) as channel:
        status = Inquiry(channel, address, options.timeout, credentials).status()
    sys.stdout.write(as_json(status) if options.json else as_text(status, address))
    return 0


def as_json(status: pb.StatusResponse) -> str:
    """Under the names of the .proto, everything there is."""
    return json.dumps(_fields(status), indent=2) + "\n"


def as_text(status: pb.StatusResponse, address: str) -> str:
    """A few lines, and a table of the sessions, of a status that was `tidied`."""
    lines = [
        f"{address}: sft-cloud {status.package_version}, protocol {status.protocol_version}, on {status.device}, "
        f"up for {_duration(status.uptime_seconds)}" + (", stopping" if status.stopping else ""),
        f"{status.open_sessions} of {status.max_sessions} sessions; "
        f"one outlives its stream for {_duration(status.session_timeout_seconds)}",
        f"you are {status.caller}" + _until(status.token_expires_unix_seconds),
    ]
    if status.sessions:
        lines += ["", *_table(status)]
    return "\n".join(lines) + "\n"


_COLUMNS = ("session", "owner", "model", "rank", "step", "age", "idle", "received", "sent", "stream")
_LEFT = ("session", "owner", "model", "stream")


def _table(status: pb.StatusResponse) -> list[str]:
    rows = [_COLUMNS, *(_row(session) for session in status.sessions)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return [
        "  ".join(
            cell.ljust(width) if name in _LEFT else cell.rjust(width)
            for name, cell, width in zip(_COLUMNS, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _row(session: pb.SessionStatus) -> tuple[str, ...]:
    return (
        session.label,
        session.owner,
        session.model_name or "-",
        str(session.split_rank or "-"),
        str(session.next_step),
        _duration(session.age_seconds),
        _duration(session.idle_seconds),
        format_bytes(session.bytes_received),
        format_bytes(session.bytes_sent),
        "yes" if session.attached else "no",
    )


def _until(unix_seconds: float) -> str:
    if not unix_seconds:
        return ""
    return f", until {time.strftime('%Y-%m-%d %H:%M', time.gmtime(unix_seconds))} UTC"


def _duration(seconds: float) -> str:
    return str(Duration(round(seconds)))


def _fields(message: pb.StatusResponse | pb.SessionStatus | pb.CallerLimits) -> dict[str, object]:
    values: dict[str, object] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.name == "sessions":
            value = [_fields(session) for session in value]
        elif field.name in ("models", "missing_features"):
            value = list(value)
        elif field.name == "limits":
            value = _fields(value)
        values[field.name] = value
    return values
