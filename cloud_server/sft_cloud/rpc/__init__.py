"""What rooms that see gRPC share of it: a call with its caller, the table of status codes, handlers around others."""

from sft_cloud.rpc.call import Call, CallInterceptor, Identify
from sft_cloud.rpc.handlers import Handler, around, at_once, behaviour_of, raw, remade
from sft_cloud.rpc.status_codes import ends_session, one_line, outcome

__all__ = [
    "Call",
    "CallInterceptor",
    "Handler",
    "Identify",
    "around",
    "at_once",
    "behaviour_of",
    "ends_session",
    "one_line",
    "outcome",
    "raw",
    "remade",
]
