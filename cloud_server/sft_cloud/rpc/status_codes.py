"""From the errors of this project to gRPC's status codes: the only place on the cloud where that happens.

    what happened                                                       status code
    ProtocolError, UsageError, CutError, CheckpointError,               INVALID_ARGUMENT
      UnsupportedModelError, TrainingError: the request makes no sense;
      TooLargeError: it could never fit
    PreconditionError: another protocol version, a message out of       FAILED_PRECONDITION
      order
    GapError: a message before this one got lost; StreamTakenError:     ABORTED
      another stream has the session
    SessionLostError: no such session, or it has ended;                 NOT_FOUND
      NoSuchServiceError: a health check of something else
    UnauthenticatedError: no identity, or it is no longer good          UNAUTHENTICATED
    AccessError: a known caller, but this is not for it                 PERMISSION_DENIED
    ServerFullError, QuotaError, StorageError, out of memory: no room;  RESOURCE_EXHAUSTED
      FullOfAnswersError: until the edge has taken some
    ServerUnavailableError: the server is shutting down                 UNAVAILABLE
    anything else, logged here with its traceback                       INTERNAL

A stream that waits for its edge when the server stops ends with CANCELLED or UNAVAILABLE. What the edge makes of a code
is for the edge's own table to say.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from sft.errors import (
    AccessError,
    ProtocolError,
    ServerFullError,
    ServerUnavailableError,
    SessionLostError,
    SFTError,
    StorageError,
)
from sft_cloud.errors import (
    GapError,
    NoSuchServiceError,
    PreconditionError,
    StreamTakenError,
    TooLargeError,
    UnauthenticatedError,
    is_out_of_memory,
)

_log = logging.getLogger(__name__)

MAX_DETAILS = 1000
"""Characters of a sentence that leave the server: what an edge sent is quoted in some, and headers must stay small."""

_CODES: tuple[tuple[type[SFTError], grpc.StatusCode], ...] = (
    (PreconditionError, grpc.StatusCode.FAILED_PRECONDITION),
    (GapError, grpc.StatusCode.ABORTED),
    (StreamTakenError, grpc.StatusCode.ABORTED),
    (SessionLostError, grpc.StatusCode.NOT_FOUND),
    (NoSuchServiceError, grpc.StatusCode.NOT_FOUND),
    (UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (AccessError, grpc.StatusCode.PERMISSION_DENIED),
    (ServerFullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (StorageError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (ServerUnavailableError, grpc.StatusCode.UNAVAILABLE),
    (ProtocolError, grpc.StatusCode.INVALID_ARGUMENT),
    (SFTError, grpc.StatusCode.INVALID_ARGUMENT),
)


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status code and the one line that the edge gets; nothing of an unexpected error leaves the server."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, one_line(error)
    if is_out_of_memory(error):
        return (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "the cloud's device is out of memory; try smaller batches or another cut",
        )
    return grpc.StatusCode.INTERNAL, "internal error, see the server's log"


def one_line(error: Exception) -> str:
    """Its sentence, in printable characters and not without end."""
    text = " ".join(str(error).split())
    text = "".join(character if character.isprintable() else "?" for character in text[: MAX_DETAILS + 1])
    return text if len(text) <= MAX_DETAILS else text[: MAX_DETAILS - 3] + "..."


def ends_session(error: BaseException) -> bool:
    """Whether a session is of no more use after this error; otherwise its edge may come back to it."""
    goes_on = (GapError, AccessError, ServerFullError, ServerUnavailableError, StreamTakenError, TooLargeError)
    return isinstance(error, Exception) and not isinstance(error, (grpc.RpcError, *goes_on))


def outcome(context: Any, error: Exception) -> tuple[grpc.StatusCode, str]:
    """As `status_of`, but for a call that somebody has ended already: as that one said."""
    code, details = context.code(), context.details()
    if code is None:
        return status_of(error)
    return code, details.decode(errors="replace") if isinstance(details, bytes) else str(details)


@contextmanager
def ends_call(context: grpc.ServicerContext) -> Iterator[None]:
    """An error in the block ends the call with its status code; gRPC would send the text of any exception."""
    try:
        yield
    except grpc.RpcError:
        raise  # the other side has gone; there is nobody to tell
    except Exception as error:
        if context.code() is not None:  # type: ignore[attr-defined]  # missing in the stubs
            raise  # somebody has ended it already
        code, details = status_of(error)
        if code is grpc.StatusCode.INTERNAL:
            _log.exception("internal error")
        context.abort(code, details)
