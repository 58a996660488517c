"""What a real server holds for a caller counts as that caller's, whichever way it is asked for."""

import grpc
import pytest
from support.callers import As, named
from support.calls import Stream, open_session, refusal
from support.tiny_edge import attach

from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import PART_BYTES
from sft_cloud.access import Access
from sft_cloud.identity import Identity, Limits
from sft_cloud.memory import Kind
from sft_cloud.service import servicer

LIMIT = 64 << 20


def part(total=0):
    return pb.EdgeMessage(part=pb.Part(data=bytes(PART_BYTES), total_bytes=total)).SerializeToString()


def test_all_that_a_caller_asks_for_counts_against_its_token(start_server, connect, raw, edge, monkeypatch):
    monkeypatch.setattr(servicer, "_ROOM_SECONDS", 0.01)
    server = start_server(access=Access(identify=named(max_memory=LIMIT)))
    stub, anonymous = connect(server.address), Identity("anonymous", Limits(max_memory=LIMIT))
    session_id = open_session(stub, edge)
    stream = Stream(stub, attach(session_id))
    next(stream.call)
    stream.ask(edge.unlabelled(0))
    assert server.memory.held_bytes == server.memory._books.total("anonymous") > 0
    with server.memory.charge(Kind.ANSWERS, LIMIT - server.memory.held_bytes, anonymous):
        for what, ask in {
            "building this model": lambda: stub.OpenSession(edge.request()),
            "this download": lambda: list(stub.DownloadWeights(pb.DownloadWeightsRequest(session_id=session_id))),
            "this message": lambda: list(raw(server.address, "Train", iter([part(8 * PART_BYTES), part()]))),
        }.items():
            code, details = refusal(ask)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert details.startswith(f"{what} would take")
            assert "your token is for 67.1 MB of the server's memory (--max-memory): end something" in details
        assert open_session(As(stub, "bob"), edge)


@pytest.mark.parametrize("names", [("anonymous", "bob"), ("anonymous",), ()])
def test_others_are_left_theirs_where_there_may_be_some(start_server, raw, never, names):
    server = start_server(access=Access(identify=named(), names=lambda: names))
    server.memory.total_bytes = 32 << 20
    server.memory.process_bytes += 1 << 30  # what the tests' own process takes does not matter here
    message, is_alone = [part(6 * PART_BYTES), *[part()] * 4], len(names) == 1
    calls = []
    for number in range(5 if is_alone else 3):
        calls.append(raw(server.address, "Train", never(*message)))
        server.deadlines._waits.come("no next part", so_far=5 * (number + 1))
    code, details = refusal(lambda: list(raw(server.address, "Train", never(*message))))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert ("are kept for others" in details) is not is_alone
    for call in calls:
        call.cancel()


def test_a_message_that_could_never_fit_leaves_its_session_alive(start_server, connect, raw, edge):
    server = start_server()
    stub = connect(server.address)
    begun = attach(open_session(stub, edge)).SerializeToString()
    server.memory.total_bytes = 32 << 20
    code, details = refusal(lambda: list(raw(server.address, "Train", iter([begun, part(64 * PART_BYTES)]))))
    assert (code.name, "send smaller batches" in details) == ("INVALID_ARGUMENT", True)
    assert [answer.attached.last_number for answer in stub.Train(iter([pb.EdgeMessage.FromString(begun)]))] == [0]
