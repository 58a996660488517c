"""What the service tells of its work, to nobody: `sft_cloud.observability.prometheus` has the one that counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import HEALTH_CHECK, HEALTH_WATCH, SERVICE
from sft_cloud.memory import MemoryBudget

UNKNOWN = "unknown"
"""The tenant of calls of which nobody knows who made them."""

METHODS = {
    **{f"/{SERVICE}/{method.name}": method.name for method in pb.DESCRIPTOR.services_by_name["SplitTraining"].methods},
    HEALTH_CHECK: "Check",
    HEALTH_WATCH: "Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "ServerReflectionInfo",
}
"""What becomes a label, by the path of the call: not what callers make up."""

NO_SUCH_METHOD = "none such"
"""The label of all other paths, which strangers try."""

_BODIES = [field.name for field in pb.EdgeMessage.DESCRIPTOR.oneofs_by_name["body"].fields]
KINDS = (*(name for name in _BODIES if name not in ("attach", "part", "close")), "commit", "weights")
"""What messages that are answered can ask for."""

_REFUSALS = {
    "NoMemoryError": "memory",
    "RESOURCE_EXHAUSTED": "memory",  # of a device that found none
    "ServerFullError": "places",
    "QuotaError": "limits",
    "AccessError": "limits",
    "UnauthenticatedError": "stranger",
    "FullOfAnswersError": "memory",
    "StorageError": "storage",
    "ServerUnavailableError": "stopping",
    "INTERNAL": "internal",
}
_BAD_REQUEST = "request"
REFUSALS = (*dict.fromkeys(_REFUSALS.values()), _BAD_REQUEST)
"""Why sessions are refused."""


def kind_of(message: pb.EdgeMessage) -> str:
    """What a message asks for: its body, or what rides on one without."""
    return message.WhichOneof("body") or ("commit" if message.HasField("commit") else "weights")


def refusal_of(reason: str) -> str:
    """Why a session was refused, by the name of the error's class, or gRPC's code where it was none of ours."""
    return _REFUSALS.get(reason, _BAD_REQUEST)


Sessions = Callable[[], Iterable[tuple[str, bool]]]
"""Gives the tenant of every session that is open, and whether a stream has it."""


class Metrics:
    """Is told what happens, from any thread; does nothing with it. `tenant` is the name of an identity."""

    def watch_tenants(self, names: Callable[[], Iterable[str]]) -> None:
        """`names`: of everybody who may call, as far as that is known; it may be asked at any time."""

    def known(self, tenant: str) -> None:
        """It has called; nothing has come of it yet."""

    def watch_sessions(self, sessions: Sessions, limit: int) -> None:
        """`sessions` may be asked at any time; `limit`: how many there may be."""

    def watch_connections(self, held: Callable[[], int], ended: Callable[[], int]) -> None:
        """`held`: connections now; `ended`: those of strangers that were ended; both may be asked at any time."""

    def watch_memory(self, memory: MemoryBudget) -> None:
        """`memory`: what the server may hold for its callers, and holds; it may be asked at any time."""

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
