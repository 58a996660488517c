"""Bearer tokens: `sft_<id>_<secret>` for whoever calls, and a file that knows them without their secrets.

The file is JSON, one object a token. Of the secret, 256 bits from the system's generator, there is the SHA-256: a
guess at it costs as much as a guess at the secret, so a slow hash would add nothing. Commands change the file under a
lock and write it whole; a running server looks at each call whether it has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sft.errors import StorageError, UsageError
from sft_cloud.access.secret_files import read_file, signature, write_file, written_by_others
from sft_cloud.access.watched_files import WatchedFiles
from sft_cloud.identity import ANONYMOUS, Identity, Limits

_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_TEXT = re.compile(r"sft_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_ID = re.compile(r"[0-9a-f]{12}")
_NOBODY = hashlib.sha256(secrets.token_bytes(32)).hexdigest()

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Token:
    """What is known of a token. Times are in Unix seconds."""

    id: str
    name: str
    """Whose it is. A name may have several tokens, so that one can take another's place without a gap."""

    sha256: str
    created: float
    expires: float | None = None
    revoked: float | None = None
    sees_all: bool = False
    limits: Limits = field(default_factory=Limits)

    @property
    def identity(self) -> Identity:
        """Whom the token lets in."""
        return Identity(self.name, self.limits, self.expires, self.sees_all, self.id)

    def state(self, now: float) -> str:
        """`valid`, `expired` or `revoked`."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "valid"


def make_limits(values: Mapping[str, Any]) -> Limits:
    """From names and values, of which those of `models` are any sequence. Raises TypeError for a name that is none."""
    fitting: dict[str, Any] = {name: tuple(value) if name == "models" else value for name, value in values.items()}
    return Limits(**fitting)


def largest_limit(name: str) -> int:
    """What a limit can be: as much as the wire's numbers hold."""
    return 2**32 - 1 if name in ("max_sessions", "max_split_rank") else 2**63


def check_name(name: str) -> str:
    """`name`, if a caller can be called so. Raises ValueError."""
    if not _NAME.fullmatch(name) or name == ANONYMOUS.name:
        raise ValueError(
            f"{name[:80]!r} cannot be a caller's name: at most 64 letters, digits and . _ @ -, beginning with a letter "
            f"or a digit, and not {ANONYMOUS.name!r}"
        )
    return name


class TokenFile:
    """The file, for the commands."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock

    def read(self) -> dict[str, Token]:
        """Every token by its id, in the order in which they were made. Raises UsageError for a bad or missing file."""
        content = read_file(self.path, "token file")
        try:
            document = json.loads(content)
            if document["version"] != _VERSION:
                raise ValueError(f"version {document['version']} is none that this release knows")
            tokens = [_from_json(entry) for entry in document["tokens"]]
            found = {token.id: token for token in tokens}
            if len(found) < len(tokens):
                raise ValueError("two tokens have the same id")
        # Whatever JSON there can be in it: a list for an object, a number that no clock knows, brackets without end.
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise UsageError(
                f"token file {self.path} makes no sense ({type(error).__name__}: {error}); "
                "bring back a copy of it, or make a new one with `sft-cloud token create`"
            ) from error
        return found

    def create(self, name: str, limits: Limits, lifetime_seconds: float | None, sees_all: bool) -> tuple[Token, str]:
        """A new token, and the text that lets its owner in, which is nowhere else. Makes the file if need be.

        Raises ValueError for a bad name, UsageError, StorageError.
        """
        check_name(name)
        now = self._clock()
        secret = secrets.token_urlsafe(32)
        with self._changing() as tokens:
            identifier = secrets.token_hex(6)
            token = Token(
                identifier,
                name,
                hashlib.sha256(secret.encode()).hexdigest(),
                now,
                None if lifetime_seconds is None else now + lifetime_seconds,
                sees_all=sees_all,
                limits=limits,
            )
            tokens[identifier] = token
        return token, f"sft_{identifier}_{secret}"

    def revoke(self, chosen: Callable[[Token], bool]) -> list[Token]:
        """Revokes those that are chosen and not revoked yet, and returns them. Raises UsageError, StorageError."""
        now = self._clock()
        with self._changing(must_exist=True) as tokens:
            revoked = [replace(token, revoked=now) for token in tokens.values() if chosen(token) and not token.revoked]
            tokens.update({token.id: token for token in revoked})
        return revoked

    @contextmanager
    def _changing(self, must_exist: bool = False) -> Iterator[dict[str, Token]]:
        """What the block makes of the tokens is written, while no other process changes them."""
        lock = self.path.with_name(self.path.name + ".lock")
        try:
            lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(f"cannot write {lock}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # given back when the file is closed
            tokens = self.read() if must_exist or self.path.exists() else {}
            yield tokens
            document = {"version": _VERSION, "tokens": [_to_json(token) for token in tokens.values()]}
            write_file(self.path, (json.dumps(document, indent=2) + "\n").encode())
        finally:
            os.close(descriptor)


class LiveTokens:
    """The tokens of a running server: what the file says now or, where it makes no sense, what it said last."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises UsageError where the file cannot be read at the start."""
        self._path = path
        self._file = WatchedFiles(
            lambda: signature(path), TokenFile(path).read, "the tokens of before go on counting", clock=clock
        )
        self._lock = threading.Lock()
        if written_by_others(path):
            _log.warning("others may write the token file, and so let themselves in", extra=_about(path))

    def find(self, text: str) -> Token | None:
        """The token that this text is, whatever its state; None when it is none."""
        match = _TEXT.fullmatch(text)
        token = self.get(match[1]) if match else None
        # As much work for an id that there is not, so that the time tells nothing of which there are.
        known = token.sha256 if token else _NOBODY
        sent = hashlib.sha256((match[2] if match else "").encode()).hexdigest()
        return token if hmac.compare_digest(sent, known) else None

    def get(self, identifier: str) -> Token | None:
        """The token with this id."""
        return self._tokens().get(identifier)

    def names(self) -> set[str]:
        """Of everybody who has a token that is not revoked."""
        return {token.name for token in self._tokens().values() if token.revoked is None}

    def _tokens(self) -> dict[str, Token]:
        with self._lock:
            if self._file.changed():
                fields = {**_about(self._path)["fields"], "tokens": len(self._file.value)}
                _log.info("tokens read again", extra={"fields": fields})
            return self._file.value


def _about(path: Path) -> dict[str, Any]:
    return {"fields": {"file": str(path)}}


def _to_json(token: Token) -> dict[str, Any]:
    limits = {name: value for name, value in asdict(token.limits).items() if value not in (None, ())}
    entry = {**asdict(token), "limits": limits}
    for name in _TIMES:
        entry[name] = None if entry[name] is None else datetime.fromtimestamp(entry[name], timezone.utc).isoformat()
    return entry


def _from_json(entry: dict[str, Any]) -> Token:
    values = dict(entry)
    for name in _TIMES:
        values[name] = None if values[name] is None and name != "created" else _seconds(values[name])
    if not isinstance(values["sees_all"], bool) or not re.fullmatch(r"[0-9a-f]{64}", values["sha256"]):
        raise ValueError("sees_all must be true or false, and sha256 64 hexadecimal digits")
    if not _ID.fullmatch(values["id"]):
        raise ValueError("id must be 12 hexadecimal digits")
    check_name(values["name"])
    return Token(**{**values, "limits": _limits(values["limits"])})


def _seconds(text: str) -> float:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:  # which would be read in the time zone of this machine
        raise ValueError(f"time {text} has no time zone")
    seconds = time.timestamp()
    datetime.fromtimestamp(seconds, timezone.utc)  # which lists show; not every year there is in one zone is one there
    return seconds


def _limits(values: dict[str, Any]) -> Limits:
    """Raises ValueError, TypeError for a name that is no limit."""
    for name, value in values.items():
        kinds = (int, float) if name == "steps_per_second" else int
        is_number = isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value <= largest_limit(name)
        if name == "steps_per_second":  # by which is divided
            is_number = is_number and value > 0
        is_patterns = isinstance(value, (list, tuple)) and all(isinstance(pattern, str) for pattern in value)
        if not (is_patterns if name == "models" else is_number):
            raise ValueError(f"limit {name} cannot be {value!r}")
    return make_limits(values)


_TIMES = ("created", "expires", "revoked")
LIMIT_NAMES = tuple(limit.name for limit in fields(Limits))
"""Of every limit that a token can have."""
