"""The seam between the service and where sessions live: an engine is asked in messages.

What crosses is ids, bytes, plain values and messages of the wire, never a tensor or a function: all of it can be
pickled, so that sessions may live in another process or in an actor on another machine. The first engine is in this
process: `sft_cloud.engine.in_process`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from sft.v1 import split_training_pb2 as pb
from sft_cloud.identity import Identity


class Handled(NamedTuple):
    """What became of a message that reached its session."""

    answer: pb.CloudMessage
    """Empty where there is an error."""

    error: Exception | None
    """For whoever asked to raise; the session is then as `Session.handle` says."""

    next_step: int
    """The first step of the session that is not committed."""

    waited_seconds: float
    """For the device."""

    worked_seconds: float
    """On the device."""


PIECE_BYTES = 4 << 20
"""What a download is read in: the device is held for one at a time, and so much is copied."""


class Contents(NamedTuple):
    """A file to be read from a session, part by part."""

    version: int
    """Of what it is made from; parts of two versions are of no use together."""

    sizes: list[int]
    """Bytes of the parts in their order: the head of a safetensors file, then one part a tensor."""


class Engine(Protocol):
    """Sessions by the ids that the service has drawn for them. Called in any thread, at the same time for different
    sessions; for one session, what changes it is called one after the other.

    Whatever names a session raises SessionLostError where it has ended, or never began, and what needs the device
    raises ServerFullError where too much waits for it, ServerUnavailableError after `shutdown`. An error that is a bug
    is logged where it happened: its traceback does not cross.

    Uploads do not cross either: the service and the engine look into one store of blobs, which both can reach.
    """

    @property
    def device(self) -> str:
        """Where sessions compute, for people."""

    def open(self, session_id: str, request: pb.OpenSessionRequest, owner: Identity) -> pb.OpenSessionResponse:
        """Makes a session by an id that no other call has, as the request of `owner` wants it, and says its next step;
        or makes none, and says which blobs are missing: always so for a request that only checks.

        Every field is checked, since anybody may have written it: raises PreconditionError for an edge of another
        protocol version and other SFTErrors for fields that make no sense.
        """

    def handle(self, session_id: str, message: pb.EdgeMessage, remembered_bytes: int) -> Handled:
        """Has a session do what a message asks. `remembered_bytes`: of earlier answers that are kept for its edge.

        The answer to a `save_checkpoint` says only that there is a whole step to save; see `save`.
        """

    def keep_answers(self, session_id: str, size: int) -> None:
        """What a session holds for its answers from now on, those that are remembered and the one on its way; less
        than before once that one has been sent. Raises NoMemoryError where more is not there.
        """

    def contents(self, session_id: str, optimizer_state: bool) -> Contents:
        """What a download of net_2, or of its optimizer's state, would read now."""

    def read(self, session_id: str, optimizer_state: bool, index: int, start: int, version: int) -> bytes:
        """At most PIECE_BYTES of one part of such a file, from `start` on, which is a multiple of that.

        Raises PreconditionError where the session is not of that version any more, and SessionLostError where it has
        ended since: a download does not keep it.
        """

    def save(self, session_id: str) -> pb.CheckpointSaved:
        """Writes a checkpoint of a session that is between two steps and stays there meanwhile.

        The device is not held while files are written. Raises StorageError, earlier checkpoints are then as they were;
        PreconditionError where none are kept.
        """

    def keep(self, session_id: str, steps: Sequence[int]) -> None:
        """Deletes the checkpoints of the other steps of a session's run. Raises StorageError."""

    def give_up(self, session_id: str) -> None:
        """Whoever has `open` called has gone: what still waits for its turn raises ServerUnavailableError there."""

    def close(self, session_id: str) -> None:
        """Ends a session and frees what it holds; of one that is worked on, when that is done. Twice does nothing, nor
        does an id of no session. Raises nothing where the engine can be reached."""

    def shutdown(self) -> None:
        """Lets running work finish, fails what waits with ServerUnavailableError, and returns."""
