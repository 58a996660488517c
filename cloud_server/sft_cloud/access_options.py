"""Who may reach the server, as options. Imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sft.errors import UsageError


@dataclass(frozen=True)
class AccessOptions:
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


def check_together(options: AccessOptions, dashes: str = "") -> None:
    """Raises UsageError for options that mean nothing without others. `dashes`: `--` where they are flags."""
    name = _spelling(dashes)
    if (options.tls_cert is None) != (options.tls_key is None):
        raise UsageError(f"{name('tls_cert')} and {name('tls_key')} belong together; give both")
    if options.tls_client_ca is not None and options.tls_cert is None:
        raise UsageError(f"{name('tls_client_ca')} needs {name('tls_cert')} and {name('tls_key')}")


def check_exposure(options: AccessOptions, host: str, is_loopback: bool, dashes: str = "") -> None:
    """Raises UsageError where strangers could reach the server, or read along, and nobody has said that they may."""
    name = _spelling(dashes)
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


def _spelling(dashes: str) -> Callable[[str], str]:
    return lambda field: dashes + field.replace("_", "-") if dashes else field
