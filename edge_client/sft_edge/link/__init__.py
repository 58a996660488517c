"""The edge's end of one session, and the way there: the only room that sees gRPC."""

from sft_edge.link.answers import check_codecs, check_mixed
from sft_edge.link.download import NUMBERS, checked_state, checked_weights, could_be_state
from sft_edge.link.grpc_transport import GrpcTransport, transport_of
from sft_edge.link.link import Blob, Left, Link, PendingReply
from sft_edge.link.meter import Meter, on_link
from sft_edge.link.pace import Pace
from sft_edge.link.reliable_stream import TRANSIENT
from sft_edge.link.request import model_fields, offer, session_request
from sft_edge.link.retries import GivenUpError, Retries, RetryPolicy, Wake, retry_policy_of
from sft_edge.link.transport import Transport

__all__ = [
    "NUMBERS",
    "TRANSIENT",
    "Blob",
    "GivenUpError",
    "GrpcTransport",
    "Left",
    "Link",
    "Meter",
    "Pace",
    "PendingReply",
    "Retries",
    "RetryPolicy",
    "Transport",
    "Wake",
    "check_codecs",
    "check_mixed",
    "checked_state",
    "checked_weights",
    "could_be_state",
    "model_fields",
    "offer",
    "on_link",
    "retry_policy_of",
    "session_request",
    "transport_of",
]
