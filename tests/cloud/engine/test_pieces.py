"""What a session is given, weights or a checkpoint, is taken in pieces: others have the device in between."""

import hashlib

import grpc
import pytest
import torch
from support.calls import SECONDS, Stream, chunks_of, download, open_session, refusal
from support.tiny_edge import attach

from sft.v1 import split_training_pb2 as pb
from sft_cloud.engine import turns
from sft_cloud.engine.saved_session import parts_of, restore, restore_in_pieces


@pytest.mark.parametrize("optimizer_state", [False, True])
def test_others_have_the_device_while_a_session_loads(server, stub, edge, monkeypatch, optimizer_state):
    monkeypatch.setattr(turns, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(turns, "LONGEST_SLICE_SECONDS", 0.0)  # which a busy machine would make of it
    first, second, other = (open_session(stub, edge) for _ in range(3))
    stream = Stream(stub, attach(first))
    next(stream.call)
    stream.ask(edge.forward(0))
    stream.ask(edge.commit(0))
    content = download(stub, first, optimizer_state)
    sha256 = hashlib.sha256(content).hexdigest()
    stub.UploadBlob(chunks_of(sha256, content), timeout=SECONDS)

    run, beside, refused = server.engine._worker.run, [], []

    def between(work):
        result = run(work)
        if not beside and server.engine._sessions[second].session.is_loading:
            beside.append(None)
            monkeypatch.setattr(server.engine._worker, "run", run)
            refused.append(refusal(lambda: download(stub, second)))
            beside.append(server.engine.handle(other, edge.forward(0), 0))
            monkeypatch.setattr(server.engine._worker, "run", between)
        return result

    monkeypatch.setattr(server.engine._worker, "run", between)
    loading = Stream(stub, attach(second))
    next(loading.call)
    load = pb.LoadState(sha256=sha256, optimizer_state=optimizer_state)
    assert loading.ask(pb.EdgeMessage(load_state=load)).HasField("committed")
    assert beside[1].answer.HasField("result")
    assert refused[0][0] is grpc.StatusCode.FAILED_PRECONDITION
    assert "are being replaced" in refused[0][1]
    assert download(stub, second, optimizer_state) == content


def test_others_have_the_device_while_a_session_is_restored(edge, open_session, tmp_path):
    saved, restored, in_one = (open_session(edge) for _ in range(3))
    saved.handle(edge.forward(0))
    saved.handle(edge.commit(0))
    files = {}
    for name, part in parts_of(saved, edge.request()).items():
        files[name] = tmp_path / name
        files[name].write_bytes(b"".join(part.chunks()))
    pieces = 0
    for _ in restore_in_pieces(restored, files):
        pieces += 1
        assert torch.is_grad_enabled()
    assert pieces > 2 * len(restored.half.all_parameters())
    restore(in_one, files)
    assert restored.next_step == in_one.next_step == 1
    answers = [one.handle(edge.forward(1)).SerializeToString() for one in (saved, restored, in_one)]
    assert answers[0] == answers[1] == answers[2]
