"""What the status with which a server answered means to a client: the part that holds for every call.

UNAUTHENTICATED                                  AccessError, with the server's sentence; StaleAccessError where token
                                                 or certificate come from files, which can be renewed
PERMISSION_DENIED                                AccessError, with the server's sentence
UNIMPLEMENTED                                    ProtocolError: not an sft-cloud server
RESOURCE_EXHAUSTED                               ServerFullError, with the server's sentence
RESOURCE_EXHAUSTED, a message over gRPC's limit  ProtocolError
FAILED_PRECONDITION, INVALID_ARGUMENT            ProtocolError, with the server's sentence
"""

from __future__ import annotations

from typing import Optional

import grpc

from sft.client.credentials import TOKEN_VARIABLE, Credentials
from sft.errors import AccessError, LinkError, ProtocolError, ServerFullError, StaleAccessError


def refusal(code: grpc.StatusCode, details: str, address: str, credentials: Credentials) -> Optional[LinkError]:
    """None for a status that means something else from call to call."""
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


def not_ours(address: str) -> str:
    """The sentence for whoever answers and is something else."""
    return f"{address} answers, but it is not an sft-cloud server"
