"""What a status means to whoever calls: the same, whichever call it was."""

from __future__ import annotations

from typing import Type

import grpc
import pytest

from sft.client.credentials import Credentials
from sft.client.refusal import refusal
from sft.errors import AccessError, LinkError, ProtocolError, ServerFullError, ServerUnavailableError, StaleAccessError

WITH_TOKEN = Credentials(read_token=lambda: "secret")


@pytest.mark.parametrize(
    ("code", "details", "kind", "message"),
    [
        ("UNAUTHENTICATED", "who?", AccessError, "there:1 does not let us in: who?"),
        ("PERMISSION_DENIED", "not you", AccessError, "there:1 refuses: not you"),
        ("UNIMPLEMENTED", "", ProtocolError, "there:1 answers, but it is not an sft-cloud server"),
        ("RESOURCE_EXHAUSTED", "all in use", ServerFullError, "there:1 has no room: all in use"),
        ("RESOURCE_EXHAUSTED", "Sent message larger than max", ProtocolError, "refuses: Sent message larger"),
        ("FAILED_PRECONDITION", "version 2", ProtocolError, "there:1 refuses: version 2"),
        ("INVALID_ARGUMENT", "shape", ProtocolError, "there:1 refuses: shape"),
    ],
)
def test_what_a_server_says_no_with(code: str, details: str, kind: Type[LinkError], message: str) -> None:
    error = refusal(grpc.StatusCode[code], details, "there:1", WITH_TOKEN)
    assert type(error) is kind
    assert message in str(error)
    assert "secret" not in str(error)


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [
        (413, ProtocolError, "client_max_body_size 0"),
        (429, ServerFullError, "for now"),
        (502, ServerUnavailableError, "gets no answer from a server behind it (HTTP 502)"),
        (503, ServerUnavailableError, "HTTP 503"),
        (504, ServerUnavailableError, "HTTP 504"),
        (403, AccessError, "HTTP 403"),
        (404, ProtocolError, "it needs a route by HTTP/2 for /sft.v1.SplitTraining/"),
        (405, ProtocolError, "HTTP 405"),
        (301, ProtocolError, "HTTP 301"),
        (415, ProtocolError, "HTTP 415"),
    ],
)
def test_what_a_proxy_says_no_with(status: int, kind: Type[LinkError], says: str) -> None:
    details = f"Received http2 header with status: {status}"
    for code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED):
        error = refusal(code, details, "there:1", WITH_TOKEN)
        assert type(error) is kind
        assert says in str(error)
        assert "there:1" in str(error)


def test_what_comes_from_files_may_be_renewed() -> None:
    error = refusal(grpc.StatusCode.UNAUTHENTICATED, "who?", "there:1", Credentials(can_change=True))
    assert type(error) is StaleAccessError


@pytest.mark.parametrize(("dashes", "advice"), [("--", "give --token-file FILE"), ("", "give token_file=FILE")])
def test_who_shows_no_token_is_told_how(dashes: str, advice: str) -> None:
    error = refusal(grpc.StatusCode.UNAUTHENTICATED, "who?", "there:1", Credentials(dashes=dashes))
    assert str(error) == f"there:1 does not let us in: who?; no token was shown: {advice} or set SFT_TOKEN"


@pytest.mark.parametrize("code", ["UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED", "UNKNOWN", "INTERNAL"])
def test_what_depends_on_the_call(code: str) -> None:
    assert refusal(grpc.StatusCode[code], "", "there:1", WITH_TOKEN) is None
