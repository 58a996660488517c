"""The way to a cloud as the operating system sees it: a name, an address, a connection, TLS, HTTP/2. No gRPC."""

from __future__ import annotations

import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Tuple

from sft_edge.findings import Finding, failed, ok, warning

CERTIFICATE_DAYS = 14.0
"""A certificate that ends sooner is worth a warning."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""How a client of HTTP/2 begins (RFC 9113, section 3.4), with empty SETTINGS."""

_FRAME_HEADER_BYTES, _SETTINGS = 9, 4

_SECONDS_A_DAY = 86400.0


@dataclass
class Tls:
    """With what a connection is encrypted."""

    ca: Optional[bytes] = None
    """Certificates to trust, PEM; None for the system's."""
    certificate: Optional[Path] = None
    """Our own, where the server wants one."""
    key: Optional[Path] = None


class PathCheck:
    """Looks at one address, from the name upwards; a check whose ground is missing is not made."""

    def __init__(self, host: str, port: int, tls: Optional[Tls], timeout_seconds: float) -> None:
        """`host` without brackets; `tls` None where nothing is to be encrypted."""
        self._host, self._port = host, port
        self._tls = tls
        self._timeout_seconds = timeout_seconds
        self.findings: List[Finding] = []

    def run(self, now: float) -> bool:
        """Whether there is a server of HTTP/2; `now` in seconds since 1970, for dates of certificates."""
        return self._resolve() and self._connect() and self._speak(now)

    def _resolve(self) -> bool:
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            said = getattr(error, "strerror", None) or str(error)
            self.findings.append(
                failed("address", f"{self._host}: {said}", "check the spelling of --server, and this machine's DNS")
            )
            return False
        addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
        self.findings.append(ok("address", " ".join([f"{self._host} is", *addresses])))
        return True

    def _connect(self) -> bool:
        began = time.perf_counter()
        try:
            self._dial().close()
        except OSError as error:
            self.findings.append(failed("connection", *_why_not(error, self._port, self._timeout_seconds)))
            return False
        self.findings.append(ok("connection", f"TCP in {1000 * (time.perf_counter() - began):.1f} ms"))
        return True

    def _speak(self, now: float) -> bool:
        if self._tls is None:
            return self._speak_plainly()
        try:
            context = _context(self._tls)
        except (OSError, ssl.SSLError) as error:
            said = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
            self.findings.append(failed("encryption", f"certificate files: {said}", "see --tls-ca and --tls-cert"))
            return False
        try:
            with self._dial() as plain, context.wrap_socket(plain, server_hostname=self._host) as encrypted:
                expires = _expiry(encrypted)
                version = encrypted.version()
                is_ours = encrypted.selected_alpn_protocol() == "h2"
                answer = _first_frame(encrypted)
        except (ssl.SSLError, OSError) as error:
            self.findings.append(failed("encryption", *_why_no_tls(error, self._host)))
            return False
        if is_ours and not answer:  # as gRPC does, without a word, where it does not like the client's certificate
            self.findings.append(failed("encryption", *_why_hung_up(self._tls)))
            return False
        self.findings.append(_certificate(version or "TLS", expires, now))
        return self._is_http_2(answer)

    def _speak_plainly(self) -> bool:
        try:
            with self._dial() as plain:
                answer = _first_frame(plain)
        except OSError:
            answer = b""
        if not answer and self._wants_tls():
            self.findings.append(
                failed("encryption", "none was asked for, but the server wants TLS", "give --tls-ca FILE, or --tls")
            )
            return False
        if is_loopback(self._host):
            self.findings.append(ok("encryption", "none; both ends are on this machine"))
        else:
            self.findings.append(
                warning(
                    "encryption",
                    "none: whoever is on the way reads activations and labels, and can change them",
                    "start the server with --tls-cert and --tls-key, and give --tls-ca here",
                )
            )
        return self._is_http_2(answer)

    def _is_http_2(self, answer: bytes) -> bool:
        speaks = len(answer) == _FRAME_HEADER_BYTES and answer[3] == _SETTINGS
        if not speaks:
            self.findings.append(
                failed(
                    "HTTP/2",
                    "something answers there, but not a server of gRPC",
                    "check the port; a proxy on the way must pass HTTP/2 on, or TCP as it is",
                )
            )
        return speaks

    def _wants_tls(self) -> bool:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only whether it answers in TLS
        context.set_alpn_protocols(["h2"])
        try:
            with self._dial() as plain, context.wrap_socket(plain, server_hostname=self._host):
                return True
        except (ssl.SSLError, OSError):
            return False

    def _dial(self) -> socket.socket:
        return socket.create_connection((self._host, self._port), self._timeout_seconds)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name alone."""
    return host in ("localhost", "::1") or host.startswith("127.")


def _context(tls: Tls) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=None if tls.ca is None else tls.ca.decode("ascii", "replace"))
    context.set_alpn_protocols(["h2"])
    if tls.certificate is not None:
        context.load_cert_chain(str(tls.certificate), None if tls.key is None else str(tls.key))
    return context


def _expiry(encrypted: ssl.SSLSocket) -> float:
    """When the server's certificate ends, in seconds since 1970."""
    certificate = encrypted.getpeercert() or {}
    return float(ssl.cert_time_to_seconds(str(certificate["notAfter"])))


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
        try:
            piece = connection.recv(_FRAME_HEADER_BYTES - len(received))
        except ConnectionError:
            break
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


_ADVICE = {
    # By OpenSSL's numbers of what was wrong with a certificate.
    9: "its time has not come: is this machine's clock right?",
    10: "make the server a new one; if it is good, this machine's clock is wrong",
    18: "give --tls-ca FILE with the certificate of the authority that made it",
    19: "give --tls-ca FILE with the certificate of the authority that made it",
    20: "give --tls-ca FILE with the certificate of the authority that made it",
    62: "the certificate is for other names: make one with `sft-cloud certs init --host NAME`, or use its name",
    64: "the certificate is for other addresses: make one with `sft-cloud certs init --host ADDRESS`, or use its name",
}


def _why_hung_up(tls: Tls) -> Tuple[str, str]:
    if tls.certificate is None:
        return "the server hung up: it wants a certificate of ours", "give --tls-cert and --tls-key"
    return (
        f"the server hung up: it does not accept our certificate {tls.certificate}",
        "it is expired, or of an authority that the server does not know: ask its operator for another",
    )


def _why_no_tls(error: OSError, host: str) -> Tuple[str, str]:
    if isinstance(error, ssl.SSLCertVerificationError):
        said = error.verify_message.rstrip(".")
        advice = _ADVICE.get(error.verify_code, "make the server another one, see docs/security.md")
        return f"the server's certificate is not accepted: {said}", advice
    reason = str(getattr(error, "reason", None) or "")
    if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason:
        return "the server wants a certificate of ours", "give --tls-cert and --tls-key"
    if "ALERT" in reason and ("CA" in reason or "CERTIFICATE" in reason):
        advice = "ask the server's operator for one of its authority that is not expired"
        return f"the server does not accept our certificate ({reason.lower().replace('_', ' ')})", advice
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER" in reason:
        return f"{host} does not speak TLS on this port", "start the server with --tls-cert, or leave TLS out here"
    if isinstance(error, socket.timeout):
        return "the server does not finish the handshake", "does it speak TLS on this port?"
    if isinstance(error, ConnectionError) or "EOF" in reason:
        return "the server hung up in the handshake", "does it speak TLS on this port, or want a certificate of ours?"
    return reason.lower().replace("_", " ") or str(error), "see docs/security.md"
