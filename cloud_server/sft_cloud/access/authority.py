"""A private CA for a server and its edges: certificates for both, of elliptic curve keys on P-256.

The CA signs for one purpose each: a client's certificate cannot be shown as a server's, nor the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sft.client.address import ip_of
from sft.errors import UsageError
from sft_cloud.access.secret_files import PUBLIC, read_file, write_file

CA_DAYS = 3650
_CLOCKS = timedelta(hours=1)
"""How far the clock of a device may be behind."""


@dataclass(frozen=True)
class Files:
    """Where a certificate and its key are."""

    cert: Path
    key: Path

    @property
    def exist(self) -> bool:
        """Whether either does."""
        return self.cert.exists() or self.key.exists()


def files_in(directory: Path, name: str) -> Files:
    """`name`: `ca`, `server` or a client's."""
    return Files(directory / f"{name}.pem", directory / f"{name}-key.pem")


class Authority:
    """A CA whose files are in a directory."""

    def __init__(self, directory: Path, days: int = CA_DAYS, now: datetime | None = None) -> None:
        """Reads it, or makes it, for so many days at least, where there is none. `now`: the time it is.

        Raises UsageError, StorageError.
        """
        self._now = now or datetime.now(timezone.utc)
        self._directory = directory
        self.files = files_in(directory, "ca")
        self.is_new = not self.files.exist
        if self.is_new:
            self._key = ec.generate_private_key(ec.SECP256R1())
            self._certificate = self._sign_itself(max(CA_DAYS, days))
            _write(self.files, self._certificate, self._key)
            return
        try:
            self._certificate = x509.load_pem_x509_certificate(read_file(self.files.cert, "CA"))
            key = load_pem_private_key(read_file(self.files.key, "key of the CA"), None)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{self.files.cert} and {self.files.key} are no CA of `sft-cloud certs init`") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self._certificate.public_key():
            raise UsageError(f"{self.files.key} is not the key of {self.files.cert}")
        self._key = key

    def make_server(self, hosts: Sequence[str], days: int) -> Files:
        """A certificate for a server that edges call by these names and IP addresses. Raises UsageError."""
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        return self._make("server", hosts[0], ExtendedKeyUsageOID.SERVER_AUTH, days, names)

    def make_client(self, name: str, days: int) -> Files:
        """A certificate that shows a caller's name."""
        return self._make(name, name, ExtendedKeyUsageOID.CLIENT_AUTH, days, None)

    def _make(
        self,
        file_name: str,
        common_name: str,
        purpose: x509.ObjectIdentifier,
        days: int,
        names: x509.SubjectAlternativeName | None,
    ) -> Files:
        key = ec.generate_private_key(ec.SECP256R1())
        expires = self._now + timedelta(days=days)
        builder = (
            self._builder(common_name, key.public_key(), min(expires, self._certificate.not_valid_after_utc))
            .issuer_name(self._certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        files = files_in(self._directory, file_name)
        _write(files, builder.sign(self._key, hashes.SHA256()), key)
        return files

    def _sign_itself(self, days: int) -> x509.Certificate:
        return (
            self._builder("sft-cloud private CA", self._key.public_key(), self._now + timedelta(days=days))
            .issuer_name(_name("sft-cloud private CA"))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def _builder(self, common_name: str, key: ec.EllipticCurvePublicKey, expires: datetime) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(_name(common_name))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now - _CLOCKS)
            .not_valid_after(expires)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )


def hosts_of(files: Files) -> list[str]:
    """The names and addresses in a server's certificate. Raises UsageError."""
    try:
        certificate = x509.load_pem_x509_certificate(read_file(files.cert, "certificate"))
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound) as error:
        raise UsageError(f"{files.cert} is no certificate of a server: give --host") from error
    return [str(name.value) for name in names]


def _write(files: Files, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    # The key first: a server that reloads in between finds that the two do not fit, and waits for the second.
    write_file(files.key, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    write_file(files.cert, certificate.public_bytes(Encoding.PEM), PUBLIC)


def _general_name(host: str) -> x509.GeneralName:
    ip = ip_of(host)
    if ip is not None:  # without the interface, which is each machine's own
        return x509.IPAddress(ip)
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise UsageError(f"--host {host!r} is neither a name nor an IP address: {error}") from error


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _usage(**used: bool) -> x509.KeyUsage:
    every = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign "
        "encipher_only decipher_only"
    )
    return x509.KeyUsage(**{name: used.get(name, False) for name in every.split()})
