"""From options to what a server is protected with."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import grpc

from sft.client.credentials import is_loopback
from sft.errors import UsageError
from sft_cloud.access.authentication import Authentication
from sft_cloud.access.interceptor import AuthenticationInterceptor
from sft_cloud.access.tokens import LiveTokens
from sft_cloud.identity import ANONYMOUS, Identity
from sft_cloud.options import ServerAccess, check_exposure, check_together
from sft_cloud.rpc import Identify


@dataclass(frozen=True)
class Access:
    """How a server is reached, and by whom. Without arguments: by everybody, without encryption."""

    credentials: grpc.ServerCredentials | None = None
    """TLS; None for plaintext."""

    interceptor: AuthenticationInterceptor | None = None
    """Stands before every method; None where everybody is let in."""

    identify: Identify = lambda context: ANONYMOUS
    """Finds out who calls, once a call."""

    names: Callable[[], Iterable[str]] = lambda: (ANONYMOUS.name,)
    """Who may call, as far as that is known: holders of certificates are not before they do."""

    certificate_expires: Callable[[], float | None] = lambda: None
    """When the certificate in use expires, in Unix seconds; None without TLS."""

    still_valid: Callable[[Identity], bool] = lambda identity: True
    """Whether who was let in would be now."""


def make_access(
    options: ServerAccess,
    host: str,
    dashes: str = "--",
    on_refused: Callable[[str, str], None] = lambda peer, reason: None,
) -> Access:
    """What the options mean for a server on `host`; `dashes`: `--` where they are flags.

    `on_refused` is told the address of each stranger, and why it is one. Raises UsageError.
    """
    check_together(options, dashes)
    check_exposure(options, host, is_here_alone(host, dashes), dashes)
    tls = credentials = None
    if options.tls_cert is not None and options.tls_key is not None:
        from sft_cloud.access.tls import ServerTls  # only here: cryptography is not needed without

        tls = ServerTls(options.tls_cert, options.tls_key, options.tls_client_ca, dashes)
        credentials = tls.credentials()

    def certificate_expires() -> float | None:
        return None if tls is None else tls.expires_unix_seconds

    if options.tokens is None and options.tls_client_ca is None:
        return Access(credentials, certificate_expires=certificate_expires)
    tokens = None if options.tokens is None else LiveTokens(options.tokens)
    authentication = Authentication(tokens, needs_certificate=options.tls_client_ca is not None)
    interceptor = AuthenticationInterceptor(authentication, on_refused)
    names: Callable[[], Iterable[str]] = tuple if tokens is None else tokens.names
    return Access(
        credentials, interceptor, authentication.identify, names, certificate_expires, authentication.still_valid
    )


def is_here_alone(host: str, dashes: str = "") -> bool:
    """Whether only this machine reaches a server there. Raises UsageError for a host that is none."""
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{dashes}host {host}: {getattr(error, 'strerror', None) or 'no host name'}") from error
    return all(is_loopback(str(address[0]).partition("%")[0]) for *_, address in found)
