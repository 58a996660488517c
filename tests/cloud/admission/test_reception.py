"""Strangers are refused at once where they are few, and late where they are many."""

import grpc
import pytest
from support.calls import SECONDS, refusal

from sft.v1 import split_training_pb2 as pb
from sft_cloud.access.protection import make_access
from sft_cloud.access.tokens import TokenFile
from sft_cloud.admission import reception
from sft_cloud.admission.pace import REFUSAL_SECONDS
from sft_cloud.admission.reception import MAX_STRANGERS, STRANGERS_PER_SECOND, Strangers
from sft_cloud.identity import Limits
from sft_cloud.options import ServerAccess


def test_so_many_strangers_wait_to_be_refused():
    later, done = [], []
    strangers = Strangers(lambda seconds, work: later.append((seconds, work)))
    while len(later) < MAX_STRANGERS:
        strangers.submit(done.append, len(done))
    assert len(done) >= STRANGERS_PER_SECOND
    assert {seconds for seconds, _ in later} == {REFUSAL_SECONDS}
    assert strangers.submit(lambda: 7).result(0) == 7  # more than that are not kept
    refused = len(done)
    later.pop()[1]()
    assert len(done) == refused + 1
    failed = strangers.submit(lambda: 1 / 0)
    later.pop()[1]()
    with pytest.raises(ZeroDivisionError):
        failed.result(0)


def test_a_stranger_that_waited_gets_the_same_answer(start_server, connect, tmp_path, monkeypatch):
    monkeypatch.setattr(reception, "STRANGERS_PER_SECOND", 0.1)
    monkeypatch.setattr(reception, "REFUSAL_SECONDS", 0.01)
    TokenFile(tmp_path / "tokens").create("alice", Limits(), None, sees_all=False)
    stub = connect(start_server(access=make_access(ServerAccess(tokens=tmp_path / "tokens"), "127.0.0.1")).address)
    refusals = {refusal(lambda: stub.Status(pb.StatusRequest(), timeout=SECONDS)) for _ in range(3)}
    assert [code for code, _ in refusals] == [grpc.StatusCode.UNAUTHENTICATED]
