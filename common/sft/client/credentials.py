"""How a client shows who it is, and knows the server: options, and the files they name.

Imports nothing heavy, so that `--help` is quick; `channel` makes a gRPC channel of it.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Callable, Mapping, NamedTuple, Optional, Tuple

from sft.cli.options import spelled
from sft.client.address import ip_of, split_address
from sft.errors import UsageError

TOKEN_VARIABLE = "SFT_TOKEN"  # nosec B105 # the name of a secret, not one
"""Environment variable with the token, where no file of it is named."""

ROOTS_VARIABLE = "SSL_CERT_FILE"
"""Environment variable with the name of a file of CAs, which counts in the place of the system's."""

RENEWAL_SECONDS = 60.0
"""How long to try for with files of token and certificate that the server does not take: they may be being renewed."""

_SYSTEM_ROOTS = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Alpine
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # openSUSE
    "/etc/ssl/cert.pem",  # macOS
)

_log = logging.getLogger(__name__)


@dataclass
class ClientOptions:
    """The server, and who we are."""

    server: Optional[str] = None
    """HOST:PORT of a running `sft-cloud serve`"""

    tls: Optional[bool] = None
    """whether calls are encrypted; without it they are, except to this machine itself, and there too with another
    --tls option"""

    tls_ca: Optional[Path] = None
    """PEM file of the CA that the server's certificate must come from; without it the system's"""

    tls_cert: Optional[Path] = None
    """PEM file with a client certificate, for servers that ask for one"""

    tls_key: Optional[Path] = None
    """PEM file with the private key of --tls-cert"""

    token_file: Optional[Path] = None
    """file with the token that lets us in; without it the environment variable SFT_TOKEN counts"""

    insecure: bool = False
    """send the token although calls are not encrypted"""


class _Files(NamedTuple):
    """PEM, of whichever there is."""

    roots: Optional[bytes] = None
    chain: Optional[bytes] = None
    key: Optional[bytes] = None


_NO_FILES = _Files()


@dataclass(frozen=True)
class Credentials:
    """What a channel needs; made by `read_credentials`."""

    encrypted: bool = False
    root_certificates: Optional[bytes] = None
    """PEM; None leaves it to gRPC's own list."""

    certificate_chain: Optional[bytes] = None
    """Of the client, PEM."""

    private_key: Optional[bytes] = None
    certificate_files: Optional[Tuple[Path, Path]] = None
    """Where chain and key come from, for who takes them from files only."""

    read_token: Callable[[], Optional[str]] = lambda: None
    """The token as it is now: a file is read anew for each call."""

    dashes: str = "--"
    """As options are spelled where these came from, for errors."""

    read_files: Callable[[], _Files] = lambda: _NO_FILES
    """What the files of certificates say now. Raises UsageError."""

    can_change: bool = False
    """Whether token or certificate come from files, which somebody may renew while a run is on."""

    def renewed(self) -> Credentials:
        """With certificates as the files have them now; as before where they cannot be read, as while being written."""
        try:
            files = self.read_files()
        except UsageError:
            return self
        return replace(self, root_certificates=files.roots, certificate_chain=files.chain, private_key=files.key)

    def metadata(self) -> Tuple[Tuple[str, str], ...]:
        """For every call."""
        token = self.read_token()
        return () if token is None else (("authorization", f"Bearer {token}"),)

    def option(self, field: str, value: str = "FILE") -> str:
        """How the user gives an option: `--tls-ca FILE` on a command line, `tls_ca=FILE` in a script."""
        return f"{spelled(field, self.dashes)} {value}" if self.dashes else f"{field}={value}"

    @property
    def has_token(self) -> bool:
        """Whether there is one to show."""
        return self.read_token() is not None

    def __repr__(self) -> str:
        """Without the secrets."""
        return f"Credentials(encrypted={self.encrypted}, certificate={self.certificate_chain is not None})"


PLAINTEXT = Credentials()
"""No encryption and no token: for a cloud of one's own on this machine."""


def read_credentials(
    options: ClientOptions, dashes: str = "--", environment: Mapping[str, str] = os.environ
) -> Credentials:
    """What the options mean for their server. `dashes`: `--` where they are flags.

    Raises UsageError for a server that is no HOST:PORT, for files that cannot be read, for options that do not go
    together, and for a token that would cross the network for everybody to read.
    """

    def name(field: str) -> str:
        return spelled(field, dashes)

    server = options.server
    if server is None:
        given = [field.name for field in fields(ClientOptions) if getattr(options, field.name) != field.default]
        if given:
            raise UsageError(f"{name(given[0])} needs {name('server')}")
        return PLAINTEXT
    if (options.tls_cert is None) != (options.tls_key is None):
        raise UsageError(f"{name('tls_cert')} and {name('tls_key')} belong together; give both")
    named = [field for field in ("tls_ca", "tls_cert") if getattr(options, field) is not None]
    if options.tls is False and named:
        raise UsageError(f"{name(named[0])} is for encrypted calls; leave out {name('tls')} false")
    here = is_loopback(split_address(server, name("server")).host)
    encrypted = options.tls if options.tls is not None else bool(named) or not here
    read_token = _token_reader(options.token_file, name("token_file"), environment)
    if read_token() is not None and not encrypted and not here and not options.insecure:
        raise UsageError(
            f"the token would cross the network to {server} for everybody to read: leave out {name('tls')} false, or "
            f"add {name('insecure')} where nobody else is on that network"
        )
    if not encrypted:
        return Credentials(read_token=read_token, dashes=dashes, can_change=options.token_file is not None)
    names = (options.tls_cert, options.tls_key) if options.tls_cert and options.tls_key else None
    if options.tls_key is not None:
        _warn_of_readers(options.tls_key)

    def read_files() -> _Files:
        chain = _read_pem(options.tls_cert, name("tls_cert"), "CERTIFICATE")
        key = _read_pem(options.tls_key, name("tls_key"), "PRIVATE KEY")
        roots = _system_roots(environment) if options.tls_ca is None else None
        return _Files(_read_pem(options.tls_ca, name("tls_ca"), "CERTIFICATE") or roots, chain, key)

    can_change = options.token_file is not None or names is not None
    return Credentials(True, *read_files(), names, read_token, dashes, read_files, can_change)


def is_loopback(host: str) -> bool:
    """Whether it is this machine, as far as its text tells: what a name means is for others to say."""
    if host == "localhost":
        return True
    ip = ip_of(host)
    return ip is not None and ip.is_loopback


def _token_reader(file: Optional[Path], what: str, environment: Mapping[str, str]) -> Callable[[], Optional[str]]:
    if file is None:
        token = environment.get(TOKEN_VARIABLE)
        checked = None if not token else _check_token(token, f"the environment variable {TOKEN_VARIABLE}")
        return lambda: checked
    _warn_of_readers(file)

    last = [_read_token(file, what)]  # now, rather than at the first call

    def read_again() -> str:
        with suppress(UsageError):  # perhaps it is being written; the token of before counts as long as it does
            last[0] = _read_token(file, what)
        return last[0]

    return read_again


def _read_token(file: Path, what: str) -> str:
    try:
        return _check_token(file.read_text(encoding="utf-8-sig"), f"{what} {file}")  # as Notepad writes it
    except OSError as error:
        raise UsageError(f"{what} {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {file} holds no token: it is no UTF-8 text") from error


def _check_token(text: str, where: str) -> str:
    """Without the line's end. Never says the text, which may be a secret from somewhere else."""
    token = text.strip()
    if not re.fullmatch(r"[!-~]{1,512}", token):
        raise UsageError(f"{where} holds no token: it is one word, as `sft-cloud token create` prints it")
    return token


def _read_pem(path: Optional[Path], what: str, kind: str) -> Optional[bytes]:
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror}") from error
    if not re.search(rb"-----BEGIN [A-Z ]*" + kind.encode() + rb"-----", content):
        raise UsageError(f"{what} {path} holds no {kind.lower()} in PEM form")
    if b"ENCRYPTED" in content:
        raise UsageError(f"{what} {path} has a passphrase; write it without")
    return content


def _warn_of_readers(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # reading says it
    if mode & 0o077:
        _log.warning("%s can be read by others on this machine: chmod 600 it", path)


def _system_roots(environment: Mapping[str, str]) -> Optional[bytes]:
    """gRPC's own list is that of its release; the system's is kept up to date, and knows a company's CA.

    Raises UsageError for a file that the environment names and that is none: whom it was to keep out would be let in.
    """
    named = environment.get(ROOTS_VARIABLE)
    if named:
        return _read_pem(Path(named), f"the environment variable {ROOTS_VARIABLE}:", "CERTIFICATE")
    for name in _SYSTEM_ROOTS:
        if os.path.isfile(name):
            with open(name, "rb") as file:
                return file.read()
    return None
