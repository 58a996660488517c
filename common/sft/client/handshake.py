"""Why a TLS handshake fails, in words for the user: gRPC says only that it did.

A second connection is made with Python's own ssl, and what goes wrong on it is told.
"""

from __future__ import annotations

import socket
import ssl
from typing import NamedTuple, Optional

from sft.client.credentials import Credentials

_NO_TLS = ("WRONG_VERSION_NUMBER", "UNEXPECTED_MESSAGE", "HTTP_REQUEST", "RECORD_LAYER_FAILURE")
_CUT = ("UNEXPECTED_EOF_WHILE_READING", "")
"""The connection ended, which may have any reason."""


def why_no_handshake(host: str, port: int, credentials: Credentials, timeout_seconds: float) -> Optional[str]:
    """A sentence that follows the address, or None where nothing is wrong with TLS."""
    try:
        with socket.create_connection((host, port), timeout_seconds) as plain:
            if not credentials.encrypted:
                return _why_not_plaintext(plain, host, credentials)
            return _why_not_encrypted(plain, host, credentials)
    except OSError:  # no connection, which is not for here to say
        return None


class TlsLook(NamedTuple):
    """What was agreed on."""

    version: str
    """Such as TLSv1.3."""
    expires_unix_seconds: float
    """When the server's certificate does."""


def look_at_tls(host: str, port: int, credentials: Credentials, timeout_seconds: float) -> Optional[TlsLook]:
    """None where no TLS comes about that may be trusted."""
    try:
        plain = socket.create_connection((host, port), timeout_seconds)
        with plain, _verified(credentials).wrap_socket(plain, server_hostname=_name(host)) as encrypted:
            expires = str((encrypted.getpeercert() or {})["notAfter"])
            return TlsLook(str(encrypted.version()), float(ssl.cert_time_to_seconds(expires)))
    except OSError:
        return None


def _why_not_plaintext(plain: socket.socket, host: str, credentials: Credentials) -> Optional[str]:
    try:
        _unverified().wrap_socket(plain, server_hostname=_name(host)).close()
    except OSError:
        return None
    ca, tls = credentials.option("tls_ca"), credentials.option("tls", "true" if credentials.dashes else "True")
    return f"speaks TLS: name its CA with {ca}, or add {tls} where the system knows the CA"


def _why_not_encrypted(plain: socket.socket, host: str, credentials: Credentials) -> Optional[str]:
    try:
        context = _verified(credentials)
    except ssl.SSLError:
        return "cannot be called: the certificates and the key given do not go together, or are torn"
    try:
        with context.wrap_socket(plain, server_hostname=_name(host)) as encrypted:
            if encrypted.selected_alpn_protocol() != "h2":
                return "speaks TLS, but it is not an sft-cloud server"
            # The server judges our certificate only now. gRPC's greets whom it takes, and hangs up without a word on
            # others; another kind of server may say why.
            if encrypted.recv(1):
                return None
    except ssl.SSLCertVerificationError as error:
        return _why_not_trusted(error, host, credentials)
    except ssl.SSLError as error:
        reason = error.reason or ""
        if reason in _NO_TLS:
            tls = credentials.option("tls", "false" if credentials.dashes else "False")
            return (
                f"does not speak TLS: start it with a certificate, or add {tls} on a network where everybody may read "
                "along"
            )
        if "CERTIFICATE" not in reason and "UNKNOWN_CA" not in reason:
            return None if reason in _CUT else f"and this machine cannot agree on TLS ({reason or error})"
    except OSError:
        return None
    if credentials.certificate_chain is None:
        cert, key = credentials.option("tls_cert"), credentials.option("tls_key")
        return f"asks for a client certificate: give {cert} and {key}"
    return (
        "does not accept the client certificate: it has expired, comes from another CA, or is not a client's; ask for "
        "a new one"
    )


def _why_not_trusted(error: ssl.SSLCertVerificationError, host: str, credentials: Credentials) -> str:
    said = error.verify_message.rstrip(".")
    if error.verify_code == 10:
        return "has a certificate that has expired: it needs a new one; or this machine's clock is wrong"
    if error.verify_code == 9:
        return "has a certificate that is not valid yet: is this machine's clock right?"
    if error.verify_code in (62, 64):  # hostname, IP address
        return f"has a certificate for other names than {host}: call it by one of those, or make one with --host {host}"
    if error.verify_code == 26:
        return "has a certificate that is not for servers: give it the one that `sft-cloud certs init` calls server.pem"
    if error.verify_code in (18, 19, 20, 21):
        return f"has a certificate of a CA that is not known here: name its CA with {credentials.option('tls_ca')}"
    return f"has a certificate that cannot be trusted: {said}"


def _verified(credentials: Credentials) -> ssl.SSLContext:
    roots = credentials.root_certificates
    context = ssl.create_default_context(cadata=None if roots is None else roots.decode("ascii", "replace"))
    context.set_alpn_protocols(["h2"])
    if credentials.certificate_files is not None:
        cert, key = credentials.certificate_files
        context.load_cert_chain(str(cert), str(key), password="")  # nosec B106 # or it would ask on the terminal
    return context


def _name(host: str) -> str:
    """What a certificate has to say: no certificate names an interface."""
    return host.partition("%")[0]


def _unverified() -> ssl.SSLContext:
    """To look at a server that nothing is sent to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context
