"""Who a caller is, and what is for it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """What one caller may do; None, or nothing listed, is no limit beside the server's own."""

    max_sessions: int | None = None
    """Sessions at a time."""

    max_split_rank: int | None = None
    """Largest rank of a cut; a full-width cut (sl) counts as the model's width."""

    models: tuple[str, ...] = ()
    """Shell patterns, one of which a model's name has to match."""

    steps_per_second: float | None = None
    """That are committed; a mean over a few seconds. Who is faster waits."""

    max_bytes_per_day: int | None = None
    """Of streams and uploads, both ways, in one day of UTC."""

    max_upload_bytes: int | None = None
    """Of all blobs that the server keeps for it, and as many of checkpoints."""


@dataclass(frozen=True)
class Identity:
    """A caller that was let in. Two callers are the same if their names are."""

    name: str
    limits: Limits = field(default_factory=Limits)
    expires_unix_seconds: float | None = None
    sees_all: bool = False
    """Whether it may ask for the sessions of others."""

    token_id: str | None = None
    """The token that let it in; None where a client certificate alone did."""


ANONYMOUS = Identity("anonymous")
"""Everybody, on a server without tokens or client certificates."""
