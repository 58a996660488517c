"""What every room that sees gRPC shares of it: the table of status codes, and a handler around another."""

from sft_cloud.rpc.status_codes import ends_call, ends_session, status_of

__all__ = [
    "ends_call",
    "ends_session",
    "status_of",
]
