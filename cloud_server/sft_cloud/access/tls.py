"""The server's certificate, taken anew without a restart when its files change."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from sft.errors import UsageError
from sft_cloud.access.secret_files import read_file, signature
from sft_cloud.access.watched_files import WatchedFiles

_log = logging.getLogger(__name__)


class Pair(NamedTuple):
    """A certificate with its key that was found to belong together, and the CA of clients."""

    chain: bytes
    key: bytes
    client_ca: bytes | None
    expires_unix_seconds: float


class ServerTls:
    """What `grpc.server` needs to speak TLS, 1.2 or later."""

    def __init__(
        self,
        cert: Path,
        key: Path,
        client_ca: Path | None,
        dashes: str = "",
        clock: Callable[[], float] = time.time,
        retry_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`dashes`: `--` where files were named by flags, of which errors then speak. Raises UsageError."""
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._dashes = dashes
        self._lock = threading.Lock()
        # Half of a change that is under way is an error, too: its second half is noticed as a change of its own.
        self._files = WatchedFiles(self._look, self._read, "the certificate of before stays in use", retry_clock)
        expires = self.expires_unix_seconds
        if clock() >= expires:
            day = datetime.fromtimestamp(expires, timezone.utc).date().isoformat()
            _log.warning("the server's certificate has expired: edges will refuse it", extra={"fields": {"on": day}})

    @property
    def expires_unix_seconds(self) -> float:
        """When the certificate in use expires."""
        return self._files.value.expires_unix_seconds

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            self.changed,  # type: ignore[arg-type]  # None is "nothing new", which the stubs do not know
            require_client_authentication=self._client_ca is not None,
        )

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What is new since the last call; gRPC asks at every handshake. A bad pair leaves the old one in use."""
        with self._lock:
            if not self._files.changed():
                return None
            day = datetime.fromtimestamp(self.expires_unix_seconds, timezone.utc).date().isoformat()
            _log.info("certificate read again", extra={"fields": {"expires": day}})
            return self._configuration()

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        pair = self._files.value
        return grpc.ssl_server_certificate_configuration([(pair.key, pair.chain)], pair.client_ca)

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(None if path is None else signature(path) for path in (self._cert, self._key, self._client_ca))

    def _read(self) -> Pair:
        chain, client_ca = read_file(self._cert, self._name("cert")), None
        certificate = self._certificates("cert", self._cert, chain)[0]
        key = read_file(self._key, self._name("key"))
        try:
            private = load_pem_private_key(key, None)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise UsageError(f"{self._name('key')} {self._key} is no private key in PEM form") from error
        except TypeError as error:
            raise UsageError(f"{self._name('key')} {self._key} has a passphrase; write it without") from error
        if _public_bytes(private.public_key()) != _public_bytes(certificate.public_key()):
            raise UsageError(f"{self._name('key')} {self._key} is not the key of {self._name('cert')} {self._cert}")
        if self._client_ca is not None:
            client_ca = read_file(self._client_ca, self._name("client-ca"))
            self._certificates("client-ca", self._client_ca, client_ca)
        return Pair(chain, key, client_ca, certificate.not_valid_after_utc.timestamp())

    def _certificates(self, name: str, path: Path, content: bytes) -> list[x509.Certificate]:
        try:
            return x509.load_pem_x509_certificates(content)
        except ValueError as error:
            raise UsageError(f"{self._name(name)} {path} holds no certificate in PEM form") from error

    def _name(self, name: str) -> str:
        return f"{self._dashes}tls-{name}" if self._dashes else f"tls_{name}".replace("-", "_")


def _public_bytes(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
