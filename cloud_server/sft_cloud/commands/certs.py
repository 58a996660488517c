"""The command line `sft-cloud certs`."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from sft.cli.options import at_least, parse
from sft.cli.run import run
from sft.client.address import ip_of
from sft.errors import UsageError
from sft_cloud.access import check_name

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""In every server's certificate, so that it can be checked from its own machine."""

_RESERVED = ("ca", "server", "ca-key", "server-key")


@dataclass(frozen=True)
class InitOptions:
    """The certificates."""

    dir: Path
    """where they go: ca.pem, server.pem, CLIENT.pem, and the private key of each beside it, as NAME-key.pem"""

    host: list[str] = field(default_factory=list)
    """names and IP addresses by which edges call the server, beside localhost"""

    client: list[str] = field(default_factory=list)
    """callers to make client certificates for; where tokens are asked for, too, the names of the tokens"""

    days: int = 365
    """days until they expire; the CA lasts ten years, or as long as they if that is longer"""

    renew: bool = False
    """replace the server's certificate, and those of the clients named, where they exist; the CA stays, and without
    --host the server's names do, too"""

    def __post_init__(self) -> None:
        """Raises UsageError."""
        at_least(self, 1, "days")
        if self.days > 36500:
            raise UsageError(f"--days must be at most 36500, not {self.days}")
        for name in self.client:
            try:
                check_name(name)
            except ValueError as error:
                raise UsageError(f"--client: {error}") from error
            if name in _RESERVED or name.endswith("-key"):
                raise UsageError(f"--client {name}: that is the name of another file here; choose another")
        for host in self.host:
            # A name whose last part is a number is none (RFC 1123): it is an address with a slip in it.
            is_name = re.fullmatch(r"[A-Za-z0-9*._-]{1,253}", host) and not re.search(r"(^|\.)[0-9]+\.?$", host)
            if not is_name and ip_of(host) is None:
                raise UsageError(f"--host {host!r} is neither a name nor an IP address")


def init(prog: str, argv: list[str]) -> int:
    """make a private CA, a certificate for the server, and certificates for clients; what exists stays"""
    (options,) = parse([InitOptions], argv, prog, init.__doc__)
    from sft_cloud.access import authority as ca  # late: --help does not need cryptography

    server = ca.files_in(options.dir, "server")
    makes_server = options.renew or not server.exist
    hosts = [*options.host, *LOOPBACK]
    if server.exist and not options.host:
        hosts = ca.hosts_of(server)
    if options.host and not makes_server:
        raise UsageError(f"{server.cert} exists; --renew makes it anew, with these hosts")
    for name in options.client:
        if ca.files_in(options.dir, name).exist and not options.renew:
            raise UsageError(f"{options.dir / name}.pem exists; --renew makes it anew")
    authority = ca.Authority(options.dir, options.days)
    made = [authority.files] if authority.is_new else []
    if makes_server:
        made.append(authority.make_server(hosts, options.days))
    made += [authority.make_client(name, options.days) for name in options.client]
    for files in made:
        sys.stdout.write(f"{files.cert}\n{files.key}\n")
    if authority.is_new:
        sys.stderr.write(
            f"keep {authority.files.key} offline: it makes anyone a caller; give edges {authority.files.cert}\n"
        )
    return 0


def certs_command(prog: str, argv: list[str]) -> int:
    """Make certificates for a server and its edges."""
    return run(prog, {"init": init}, argv)
