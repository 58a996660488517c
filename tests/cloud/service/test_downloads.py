"""A download is read in pieces, and what it holds is in the budget until it is over, however that comes."""

from types import SimpleNamespace

import pytest
from support.calls import download, open_session, refusal

from sft.v1 import split_training_pb2 as pb
from sft_cloud.engine import in_process
from sft_cloud.identity import ANONYMOUS
from sft_cloud.memory import Kind
from sft_cloud.service import servicer


@pytest.mark.parametrize("optimizer_state", [False, True])
def test_pieces_and_offsets_give_the_same_bytes(server, stub, edge, monkeypatch, optimizer_state):
    session_id = open_session(stub, edge)
    whole = download(stub, session_id, optimizer_state)
    for module in (servicer, in_process):
        monkeypatch.setattr(module, "PIECE_BYTES", 1024)
    monkeypatch.setattr(servicer, "CHUNK_BYTES", 384)
    for offset in (0, 1, 1023, 1024, 1600, len(whole) - 1, len(whole)):
        request = pb.DownloadWeightsRequest(session_id=session_id, optimizer_state=optimizer_state, offset=offset)
        assert b"".join(answer.data for answer in stub.DownloadWeights(request)) == whole[offset:]


@pytest.mark.parametrize("way", ["read", "cancelled"])
def test_what_a_download_holds_is_charged_until_it_is_over(server, stub, edge, way):
    request = pb.DownloadWeightsRequest(session_id=open_session(stub, edge))
    answers = server.service.DownloadWeights(request, SimpleNamespace(caller=ANONYMOUS))
    next(answers)
    assert server.memory.held()[Kind.DOWNLOADS] == 8 << 20
    list(answers) if way == "read" else answers.close()
    assert server.memory.held()[Kind.DOWNLOADS] == 0


def test_one_for_which_there_is_no_memory_waits_and_is_refused(server, stub, edge, monkeypatch):
    monkeypatch.setattr(servicer, "_ROOM_SECONDS", 0.01)
    session_id = open_session(stub, edge)
    server.memory.total_bytes = server.memory.held_bytes + (8 << 20)  # of which an eighth is for small ones
    code, details = refusal(lambda: list(stub.DownloadWeights(pb.DownloadWeightsRequest(session_id=session_id))))
    assert (code.name, "this download would take 8.39 MB" in details) == ("RESOURCE_EXHAUSTED", True)
