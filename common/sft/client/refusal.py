"""What the status with which a server answered means to a client: the part that holds for every call.

UNAUTHENTICATED                                  AccessError, with the server's sentence; StaleAccessError where token
                                                 or certificate come from files, which can be renewed
PERMISSION_DENIED                                AccessError, with the server's sentence
UNIMPLEMENTED                                    ProtocolError: not an sft-cloud server
RESOURCE_EXHAUSTED                               ServerFullError, with the server's sentence
RESOURCE_EXHAUSTED, a message over gRPC's limit  ProtocolError
FAILED_PRECONDITION, INVALID_ARGUMENT            ProtocolError, with the server's sentence

A proxy on the way may answer in HTTP alone, for which gRPC has a status of its own choice:

413                                              ProtocolError, with what to set
429; 408, 500, 502, 503, 504                     ServerFullError; ServerUnavailableError: it may be well in a moment
401, 403, 407, 511                               AccessError
other statuses, redirections among them          ProtocolError: gRPC does not come through there
"""

from __future__ import annotations

import re
from typing import Optional

import grpc

from sft.client.credentials import TOKEN_VARIABLE, Credentials
from sft.errors import (
    AccessError,
    LinkError,
    ProtocolError,
    ServerFullError,
    ServerUnavailableError,
    StaleAccessError,
)
from sft.wire.protocol import SERVICE

_HTTP = re.compile(r"Received http2 header with status: ([0-9]{3})")
"""gRPC's words for an answer that is none of gRPC's."""


def refusal(code: grpc.StatusCode, details: str, address: str, credentials: Credentials) -> Optional[LinkError]:
    """None for a status that means something else from call to call."""
    of_proxy = proxy_refusal(details, address)
    if of_proxy is not None:
        return of_proxy
    if code == grpc.StatusCode.UNAUTHENTICATED:
        advice = f"; no token was shown: give {credentials.option('token_file')} or set {TOKEN_VARIABLE}"
        kind = StaleAccessError if credentials.can_change else AccessError
        return kind(f"{address} does not let us in: {details}{'' if credentials.has_token else advice}")
    if code == grpc.StatusCode.PERMISSION_DENIED:
        return AccessError(f"{address} refuses: {details}")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(not_ours(address))
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" not in details:
        return ServerFullError(f"{address} has no room: {details}")
    if code in (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
    ):
        return ProtocolError(f"{address} refuses: {details}")
    return None


def proxy_refusal(details: str, address: str) -> Optional[LinkError]:
    """What a proxy has answered in the place of the server; None where the server did, or nobody."""
    found = _HTTP.search(details)
    if not found:
        return None
    status, who = int(found[1]), f"a proxy on the way to {address}"
    if status == 413:
        return ProtocolError(
            f"{who} takes no more than so many bytes of a call (HTTP 413): lift that limit, with nginx by "
            "`client_max_body_size 0;` (docs/proxies.md)"
        )
    if status == 429:
        return ServerFullError(f"{who} takes no more calls for now (HTTP 429)")
    if status in (408, 500, 502, 503, 504):
        return ServerUnavailableError(f"{who} gets no answer from a server behind it (HTTP {status})")
    if status in (401, 403, 407, 511):
        return AccessError(f"{who} does not let us through (HTTP {status}): ask whoever runs it")
    return ProtocolError(
        f"{who} does not pass gRPC on (HTTP {status}): it needs a route by HTTP/2 for /{SERVICE}/ (docs/proxies.md)"
    )


def not_ours(address: str) -> str:
    """The sentence for whoever answers and is something else."""
    return f"{address} answers, but it is not an sft-cloud server"
