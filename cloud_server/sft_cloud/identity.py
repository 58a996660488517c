"""Who a caller is, and what is for it."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field

from sft.errors import AccessError


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

    max_memory: int | None = None
    """Bytes of the server's memory, for all that the caller holds at a time."""

    def sessions_of(self, of_server: int) -> int:
        """How many sessions a caller with these limits may have at a time, on a server that holds so many."""
        return of_server if self.max_sessions is None else min(self.max_sessions, of_server)

    def check_model_name(self, model_name: str) -> None:
        """Raises AccessError for a model that is not for this caller.

        The name is what the caller says: whoever uploads weights can give them any. It keeps the honest from mistakes,
        and everybody from having the server look for another model.
        """
        if self.models and not any(fnmatch.fnmatchcase(model_name, pattern) for pattern in self.models):
            if not model_name:
                raise AccessError(
                    f"your token is for models named {', '.join(self.models)}, and yours was not named: say its name "
                    "with --model-name, or model_name=..."
                )
            raise AccessError(
                f"model '{model_name[:80]}' is not among those that your token is for: {', '.join(self.models)}"
            )

    def check_rank(self, width: int) -> None:
        """`width` of what crosses the wire: the rank of a cut, or the model's width. Raises AccessError."""
        if self.max_split_rank is not None and width > self.max_split_rank:
            raise AccessError(
                f"what crosses the wire would be {width} wide; your token is for at most {self.max_split_rank}: choose "
                "a lower --split-rank"
            )


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
