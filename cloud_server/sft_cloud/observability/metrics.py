"""What the service tells of its work, to nobody: `sft_cloud.observability.prometheus` has the one that counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sft.v1 import split_training_pb2 as pb

UNKNOWN = "unknown"
"""The tenant of calls of which nobody knows who made them."""


Sessions = Callable[[], Iterable[tuple[str, bool]]]
"""Gives the tenant of every session that is open, and whether a stream has it."""


class Metrics:
    """Is told what happens, from any thread; does nothing with it. `tenant` is the name of an identity."""

    def watch_sessions(self, sessions: Sessions, limit: int) -> None:
        """`sessions` may be asked at any time; `limit`: how many there may be."""

    def watch_certificate(self, expires: Callable[[], float | None]) -> None:
        """`expires` says when the server's certificate does, in Unix seconds; it may be asked at any time."""

    def opened(self, tenant: str, resumed: bool) -> None:
        """A session was opened; `resumed` from a checkpoint."""

    def attached(self, tenant: str, again: bool) -> None:
        """A stream took a session; `again`: another stream had it before."""

    def closed(self, tenant: str) -> None:
        """A session ended, for whatever reason."""

    def worked(self, tenant: str, waited_seconds: float, worked_seconds: float) -> None:
        """The worker did a piece of work, after it had waited in the queue."""

    def answered(
        self,
        tenant: str,
        message: pb.EdgeMessage,
        answer: pb.CloudMessage,
        sizes: tuple[int, int],
        steps: int = 0,
        repeated: bool = False,
    ) -> None:
        """A message of a stream was answered.

        `sizes`: bytes of the message and of its answer, which take long to count twice; `steps`: how many steps were
        taken with it; `repeated`: it came before, and was answered from memory.
        """

    def uploaded(self, tenant: str, total_bytes: int) -> None:
        """A blob was stored."""

    def downloaded(self, tenant: str, total_bytes: int) -> None:
        """Weights or an optimizer's state were sent, whole."""

    def refused(self, tenant: str, method: str, code: str, reason: str) -> None:
        """A call ended with a status code other than OK; `reason` is the name of the error's class."""
