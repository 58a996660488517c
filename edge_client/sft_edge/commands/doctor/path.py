"""The way to a cloud as the operating system sees it: a name, an address, a connection, TLS, HTTP/2. No gRPC."""

from __future__ import annotations

import socket
import time
from typing import List, Tuple

from sft.client.credentials import Credentials, is_loopback
from sft.client.handshake import look_at_tls, why_no_handshake
from sft_edge.commands.doctor.finding import Finding, failed, ok, warning

CERTIFICATE_DAYS = 14.0
"""A certificate that ends sooner is worth a warning."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""How a client of HTTP/2 begins (RFC 9113, section 3.4), with empty SETTINGS."""

_FRAME_HEADER_BYTES, _SETTINGS = 9, 4

_SECONDS_A_DAY = 86400.0


class PathCheck:
    """Looks at one address, from the name upwards; a check whose ground is missing is not made."""

    def __init__(self, host: str, port: int, credentials: Credentials, timeout_seconds: float) -> None:
        """`host` without brackets."""
        self._host, self._port = host, port
        self._credentials = credentials
        self._timeout_seconds = timeout_seconds
        self.findings: List[Finding] = []

    def run(self, now: float) -> bool:
        """Whether there is a server of HTTP/2; `now` in seconds since 1970, for dates of certificates."""
        return self._resolve() and self._connect() and self._encrypt(now) and self._speak()

    def _resolve(self) -> bool:
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            said = getattr(error, "strerror", None) or str(error)
            advice = "check the spelling of --server, and this machine's DNS"
            return self._fails("address", f"{self._host}: {said}", advice)
        addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
        self.findings.append(ok("address", " ".join([f"{self._host} is", *addresses])))
        return True

    def _connect(self) -> bool:
        began = time.perf_counter()
        try:
            self._dial().close()
        except OSError as error:
            return self._fails("connection", *_why_not(error, self._port, self._timeout_seconds))
        self.findings.append(ok("connection", f"TCP in {1000 * (time.perf_counter() - began):.1f} ms"))
        return True

    def _encrypt(self, now: float) -> bool:
        what = self._host, self._port, self._credentials, self._timeout_seconds
        reason = why_no_handshake(*what)
        if reason is not None:
            found, _, advice = reason.partition(": ")
            return self._fails("encryption", f"the server {found}", advice or "check the port; see docs/security.md")
        if not self._credentials.encrypted:
            self.findings.append(self._plaintext())
            return True
        look = look_at_tls(*what)
        if look is None:
            advice = "does it speak TLS on this port? see the server's log"
            return self._fails("encryption", "the server does not finish the handshake", advice)
        self.findings.append(_certificate(look.version, look.expires_unix_seconds, now))
        return True

    def _plaintext(self) -> Finding:
        if is_loopback(self._host):
            return ok("encryption", "none; both ends are on this machine")
        return warning(
            "encryption",
            "none: whoever is on the way reads activations and labels, and can change them",
            "start the server with --tls-cert and --tls-key, and give --tls-ca here",
        )

    def _speak(self) -> bool:
        """Who is encrypted has agreed on HTTP/2 already."""
        if self._credentials.encrypted:
            return True
        try:
            with self._dial() as plain:
                answer = _first_frame(plain)
        except OSError:
            answer = b""
        if len(answer) == _FRAME_HEADER_BYTES and answer[3] == _SETTINGS:
            return True
        advice = "check the port; a proxy on the way must pass HTTP/2 on, or TCP as it is"
        return self._fails("HTTP/2", "something answers there, but not a server of gRPC", advice)

    def _fails(self, name: str, found: str, advice: str) -> bool:
        self.findings.append(failed(name, found, advice))
        return False

    def _dial(self) -> socket.socket:
        return socket.create_connection((self._host, self._port), self._timeout_seconds)


def _certificate(version: str, expires: float, now: float) -> Finding:
    days = (expires - now) / _SECONDS_A_DAY
    date = time.strftime("%Y-%m-%d", time.gmtime(expires))
    found = f"{version}; the server's certificate is good until {date}"
    if days < CERTIFICATE_DAYS:
        advice = "make the server a new one; it takes it without a restart"
        return warning("encryption", f"{found}, {max(days, 0.0):.1f} days from now", advice)
    return ok("encryption", found)


def _first_frame(connection: socket.socket) -> bytes:
    """The header of what the other end begins with: SETTINGS, from a server of HTTP/2. Less where it hangs up."""
    connection.sendall(_PREFACE)
    received = b""
    while len(received) < _FRAME_HEADER_BYTES:
        piece = connection.recv(_FRAME_HEADER_BYTES - len(received))
        if not piece:
            break
        received += piece
    return received


def _why_not(error: OSError, port: int, seconds: float) -> Tuple[str, str]:
    """What was found, and what to do about it."""
    if isinstance(error, ConnectionRefusedError):
        return f"nobody listens on port {port}", "is `sft-cloud serve` running there, with this --port?"
    if isinstance(error, socket.timeout):
        advice = f"a firewall may drop it: open TCP port {port}, or give a longer --connect-timeout"
        return f"no answer within {seconds:g} s", advice
    return error.strerror or str(error), "check the network of this machine, and the way to the server"
