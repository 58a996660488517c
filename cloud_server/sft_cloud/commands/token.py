"""The command line `sft-cloud token`: who is let in, and with what limits."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from sft.cli.durations import Duration
from sft.cli.options import above_zero, at_least, flag, parse
from sft.cli.run import run
from sft.errors import UsageError
from sft.printable import printable
from sft_cloud.access import LIMIT_NAMES, Token, TokenFile, check_name, largest_limit, make_limits
from sft_cloud.identity import Limits

_DEFAULT_LIFETIME = Duration("90d")

MAX_LIFETIME = Duration("36525d")
"""Whatever is added to it, calendars still have the day."""


@dataclass(frozen=True)
class CreateOptions:
    """The token."""

    tokens: Path
    """the token file; made where there is none"""

    name: str
    """whose it is: sessions, uploads and checkpoints belong to the name. A name may have several tokens"""

    expires: Duration = _DEFAULT_LIFETIME
    """how long it is good for; 0s for ever"""

    max_sessions: int | None = None
    """sessions at a time"""

    max_split_rank: int | None = None
    """largest rank of a cut; that of --mode sl is the model's width"""

    models: list[str] = field(default_factory=list)
    """patterns, such as bert-*, one of which a model's name has to match; without them any model"""

    steps_per_second: float | None = None
    """mean over a few seconds; who is faster waits"""

    max_bytes_per_day: int | None = None
    """of streams and uploads, both ways, in one day of UTC"""

    max_upload_bytes: int | None = None
    """of all blobs that the server keeps for the name, and as many of checkpoints"""

    max_memory: int | None = None
    """bytes of the server's memory, for all that the name holds at a time; without it, what leaves others theirs"""

    sees_all: bool = False
    """sees the sessions of others in `sft-cloud status`"""

    def __post_init__(self) -> None:
        """Raises UsageError."""
        try:
            check_name(self.name)
        except ValueError as error:
            raise UsageError(f"--name: {error}") from error
        at_least(self, 0, "expires", "max_sessions", "max_split_rank", "max_bytes_per_day", "max_upload_bytes")
        at_least(self, 1, "max_memory")
        above_zero(self, "steps_per_second")
        if self.expires > MAX_LIFETIME:
            raise UsageError(f"--expires must be {MAX_LIFETIME} (a hundred years) or less; 0s is for ever")
        for name in LIMIT_NAMES:
            if name != "models" and (getattr(self, name) or 0) > largest_limit(name):
                raise UsageError(f"{flag(name)} must be {largest_limit(name)} or less; without it there is no limit")

    @property
    def limits(self) -> Limits:
        """As the server keeps them."""
        return make_limits({name: getattr(self, name) for name in LIMIT_NAMES})


@dataclass(frozen=True)
class ListOptions:
    """The list."""

    tokens: Path
    """the token file"""

    json: bool = False
    """write the list as JSON"""


@dataclass(frozen=True)
class RevokeOptions:
    """What is revoked."""

    tokens: Path
    """the token file"""

    id: str | None = None
    """the token with this id, its second part: sft_ID_..."""

    name: str | None = None
    """instead of --id: every token of this name"""

    def __post_init__(self) -> None:
        """Raises UsageError."""
        if (self.id is None) == (self.name is None):
            raise UsageError("exactly one of --id and --name must be given")


def create(prog: str, argv: list[str]) -> int:
    """make a token, and print it: it is shown this once"""
    (options,) = parse([CreateOptions], argv, prog, create.__doc__)
    lifetime = float(options.expires) or None
    token, text = TokenFile(options.tokens).create(options.name, options.limits, lifetime, options.sees_all)
    sys.stdout.write(text + "\n")
    until = "for ever" if token.expires is None else f"until {_day(token.expires)}"
    sys.stderr.write(f"token {token.id} of {token.name}, good {until}: the line above is shown this once\n")
    return 0


def list_tokens(prog: str, argv: list[str]) -> int:
    """list tokens, their limits and whether they are good"""
    (options,) = parse([ListOptions], argv, prog, list_tokens.__doc__)
    now = time.time()
    tokens = TokenFile(options.tokens).read().values()
    rows = [_row(token, now) for token in tokens]
    if options.json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return 0
    columns = {name: [name, *(str(row[name] or "") for row in rows)] for name in ("id", "name", "state", "expires")}
    columns["limits"] = ["limits", *map(_limits_in_words, tokens)]
    widths = [max(map(len, cells)) for cells in columns.values()]
    for line in zip(*columns.values(), strict=True):
        sys.stdout.write("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() + "\n")
    return 0


def revoke(prog: str, argv: list[str]) -> int:
    """refuse a token, or all of a name, from now on; running servers notice"""
    (options,) = parse([RevokeOptions], argv, prog, revoke.__doc__)
    wanted: str = options.name or options.id

    def is_meant(token: Token) -> bool:
        return wanted == (token.id if options.name is None else token.name)

    file = TokenFile(options.tokens)
    meant = [token for token in file.read().values() if is_meant(token)]
    if not meant:
        raise UsageError(f"{options.tokens} has no token of {wanted}; `{prog.rsplit(' ', 1)[0]} list`")
    for token in file.revoke(is_meant):
        sys.stdout.write(f"revoked {token.id} of {token.name}\n")
    return 0


def token_command(prog: str, argv: list[str]) -> int:
    """Make, list and revoke the tokens that let edges in."""
    return run(prog, {"create": create, "list": list_tokens, "revoke": revoke}, argv)


def _row(token: Token, now: float) -> dict[str, object]:
    """What may be shown of a token: not even the hash of its secret."""
    return {
        "id": token.id,
        "name": token.name,
        "state": token.state(now),
        "created": _day(token.created),
        "expires": None if token.expires is None else _day(token.expires),
        "sees_all": token.sees_all,
        "limits": _limits(token),
    }


def _limits(token: Token) -> dict[str, object]:
    """Those that there are."""
    limits = {name: getattr(token.limits, name) for name in LIMIT_NAMES}
    return {name: value for name, value in limits.items() if value not in (None, ())}


def _limits_in_words(token: Token) -> str:
    words = [
        f"{name.replace('_', '-')}={','.join(value) if isinstance(value, tuple) else value}"
        for name, value in _limits(token).items()
    ]
    return printable(" ".join(words + (["sees-all"] if token.sees_all else [])))


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
