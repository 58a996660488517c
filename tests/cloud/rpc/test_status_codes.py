"""Every error has its status code."""

import grpc
import pytest
import torch

from sft import errors
from sft_cloud.errors import FullOfAnswersError, PreconditionError, QuotaError, UnauthenticatedError
from sft_cloud.rpc.status_codes import MAX_DETAILS, ends_call, outcome, status_of

CODES = {
    PreconditionError: "FAILED_PRECONDITION",
    errors.ProtocolError: "INVALID_ARGUMENT",
    errors.UsageError: "INVALID_ARGUMENT",
    errors.CutError: "INVALID_ARGUMENT",
    errors.CheckpointError: "INVALID_ARGUMENT",
    errors.UnsupportedModelError: "INVALID_ARGUMENT",
    errors.TrainingError: "INVALID_ARGUMENT",
    errors.SessionLostError: "NOT_FOUND",
    QuotaError: "RESOURCE_EXHAUSTED",
    FullOfAnswersError: "RESOURCE_EXHAUSTED",
    errors.AccessError: "PERMISSION_DENIED",
    errors.ServerFullError: "RESOURCE_EXHAUSTED",
    errors.StorageError: "RESOURCE_EXHAUSTED",
    errors.ServerUnavailableError: "UNAVAILABLE",
}


@pytest.mark.parametrize("kind", CODES)
def test_our_errors_keep_their_sentence_on_one_line(kind):
    assert status_of(kind("what was wrong;\n what to do")) == (
        grpc.StatusCode[CODES[kind]],
        "what was wrong; what to do",
    )


def test_what_an_edge_sent_is_quoted_only_so_far_and_in_print():
    details = status_of(errors.ProtocolError("you sent \x00\x1b[31m " + "x" * 100_000))[1]
    assert len(details) == MAX_DETAILS
    assert details.startswith("you sent ??[31m xxx")
    assert details.endswith("xxx...")


def test_a_stranger_is_not_told_the_reason_that_the_log_has():
    error = UnauthenticatedError("who are you?", "a token of alice with the certificate of bob")
    assert status_of(error) == (grpc.StatusCode.UNAUTHENTICATED, "who are you?")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
    ],
)
def test_out_of_memory(error):
    code, details = status_of(error)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "smaller batches" in details


@pytest.mark.parametrize("error", [RuntimeError("a secret"), KeyError("a secret"), OSError("a secret")])
def test_the_unexpected_stays_here(error):
    assert status_of(error) == (grpc.StatusCode.INTERNAL, "internal error, see the server's log")


class Context:
    """Of a call that may have been ended already."""

    def __init__(self, code=None, details=None):
        self.ended = (code, details)

    def code(self):
        return self.ended[0]

    def details(self):
        return self.ended[1]

    def abort(self, code, details):
        self.ended = (code, details)
        raise Exception


def test_an_error_ends_the_call_once():
    """Whoever has ended it before knows better."""
    context = Context()
    with pytest.raises(Exception), ends_call(context), ends_call(context):  # noqa: B017, PT011
        raise errors.ServerFullError("no room")
    assert context.ended == (grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")
    assert outcome(context, KeyError("of no interest")) == context.ended
    assert outcome(Context(grpc.StatusCode.NOT_FOUND, b"none"), KeyError()) == (grpc.StatusCode.NOT_FOUND, "none")


def test_who_has_gone_is_told_nothing():
    context = Context()
    with pytest.raises(grpc.RpcError), ends_call(context):
        raise grpc.RpcError
    assert context.ended == (None, None)


def test_torch_s_own_words_for_no_memory_are_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert status_of(caught.value)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
