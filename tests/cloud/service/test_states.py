"""Weights and optimizer state over a loopback socket, down and up; and a service whose sessions somebody else opens."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch
from support.calls import SECONDS, Stream, chunks_of, download, open_session, refusal
from support.tiny_edge import attach

from sft.v1 import split_training_pb2 as pb
from sft.v1 import split_training_pb2_grpc as pb_grpc
from sft_cloud.engine.in_process import InProcessEngine
from sft_cloud.identity import ANONYMOUS
from sft_cloud.rpc.call import CallInterceptor
from sft_cloud.service.registry import Registry
from sft_cloud.service.servicer import SplitTrainingService
from sft_cloud.storage.blobs import BlobStore


def upload(stub, content):
    """Returns the hash."""
    sha256 = hashlib.sha256(content).hexdigest()
    stub.UploadBlob(chunks_of(sha256, content), timeout=SECONDS)
    return sha256


def test_what_was_learned_goes_down_and_up_again(stub, edge):
    """Weights and the optimizer's state, into a session of its own."""
    first = open_session(stub, edge)
    stream = Stream(stub, attach(first))
    next(stream.call)
    stream.ask(edge.forward(0))
    stream.ask(edge.commit(0))
    files = {kind: download(stub, first, kind) for kind in (False, True)}
    stream.end()

    second = open_session(stub, edge)
    stream = Stream(stub, attach(second))
    next(stream.call)
    for kind, content in files.items():
        assert download(stub, second, kind) != content
        load_state = pb.LoadState(sha256=upload(stub, content), optimizer_state=kind)
        answer = stream.ask(pb.EdgeMessage(micro_batch=int(kind), load_state=load_state))
        assert answer.WhichOneof("body") == "committed"
        assert download(stub, second, kind) == content
    assert stream.ask(edge.forward(0)).HasField("result")
    missing = pb.EdgeMessage(step=1, commit=edge.commit_part(0), load_state=pb.LoadState(sha256="0" * 64))
    code, details = refusal(lambda: stream.ask(missing))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "there is no blob 000" in details


@pytest.mark.parametrize("change", ["a step", "a state that is loaded"])
def test_weights_cannot_be_read_across_a_change(stub, edge, server, change):
    session_id = open_session(stub, edge)
    load_state = pb.LoadState(sha256=upload(stub, download(stub, session_id)))
    messages = [edge.forward(0), edge.commit(0)] if change == "a step" else [pb.EdgeMessage(load_state=load_state)]

    def read(*asked, read=server.engine.read):
        while messages:
            server.engine.handle(session_id, messages.pop(0), 0)
        return read(*asked)

    server.engine.read = read
    code, details = refusal(lambda: download(stub, session_id))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "between two steps" in details


def test_another_opener_serves_what_it_likes(edge, connect, open_session, tmp_path):
    """The service knows no models: a script's host gives it an opener of its own."""

    class Opener:
        device, checkpoints = torch.device("cpu"), None

        def open(self, request, owner, run, gone):
            if request.cut.layer_name != "blocks.5.mlp.fc2":
                return ["f" * 64]
            return open_session(edge)

    engine, executor = InProcessEngine(Opener(), capacity=4, threads=1), ThreadPoolExecutor(4)
    server = grpc.server(executor, interceptors=[CallInterceptor(lambda context: ANONYMOUS)])
    service = SplitTrainingService(engine, BlobStore(tmp_path), Registry(1, 600.0))
    pb_grpc.add_SplitTrainingServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        stub = connect(f"127.0.0.1:{port}")
        assert list(stub.OpenSession(pb.OpenSessionRequest(), timeout=SECONDS).missing_blobs) == ["f" * 64]
        request = pb.OpenSessionRequest(cut=pb.Cut(layer_name="blocks.5.mlp.fc2"))
        session_id = stub.OpenSession(request, timeout=SECONDS).session_id
        forward = edge.forward(0)
        forward.number = 1
        answers = list(stub.Train(iter([attach(session_id), forward]), timeout=SECONDS))
        assert [answer.WhichOneof("body") for answer in answers] == ["attached", "result"]
    finally:
        server.stop(0).wait(SECONDS)
        engine.shutdown()
        executor.shutdown()
