"""What can go wrong on this side, beside what `sft.errors` has for both."""

from __future__ import annotations

from sft.errors import (
    AccessError,
    ProtocolError,
    ServerFullError,
    SFTError,
)


class PreconditionError(ProtocolError):
    """The message is sound, but not what may come now."""


class QuotaError(ServerFullError):
    """The caller has used up what is for it, for now."""


class NoSuchServiceError(SFTError):
    """Somebody asks for the health of a service that is not here."""


class FullOfAnswersError(ServerFullError):
    """As much of answers waits for an edge that has left as is remembered."""


class NoMemoryError(ServerFullError):
    """The memory for sessions is taken, or too little for this one."""


class TooLargeError(ProtocolError):
    """What was asked for could never fit; the session is as it was."""


class StreamTakenError(SFTError):
    """Another stream has the session now."""


class GapError(ProtocolError):
    """A message before this one is missing; sent again in order, both are welcome."""


class UnauthenticatedError(AccessError):
    """Who calls is not known here, or is not let in any more.

    The message is for the caller and does not tell which part was wrong; `reason`, for the log, does.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the machine, had no memory left."""
    import torch  # late: commands that touch no tensor know these errors, too

    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's CPU allocator
