"""The seam between the service and an engine: all that crosses it can go to another process, and come back."""

import threading
from pickle import PicklingError

import grpc
import pytest
import torch
from support.calls import SECONDS, Stream, download, open_session, refusal
from support.engine_elsewhere import EngineElsewhere, crossed
from support.tiny_edge import attach

from sft.errors import ServerUnavailableError, SessionLostError, SFTError
from sft.v1 import split_training_pb2 as pb
from sft_cloud.errors import PreconditionError, UnauthenticatedError
from sft_cloud.identity import ANONYMOUS, Identity, Limits
from sft_cloud.observability.metrics import Metrics
from sft_cloud.observability.observer import Observer
from sft_cloud.session.session import Session

RUN = "0123456789abcdef" * 2


def elsewhere(server):
    """The server, with its engine behind the seam."""
    server.engine = server.service._engine = EngineElsewhere(server.engine)
    return server


def train(stream, edge, step):
    """The answer to a forward, as bytes; time aside."""
    result = stream.ask(edge.forward(step)).result
    assert stream.ask(edge.commit(step)).committed.next_step == step + 1
    return result.SerializeToString()


def a_life(server, stub, edge):
    """All that a session does: what came of it, and the checkpoint."""
    session_id = open_session(stub, edge, run_id=RUN)
    stream = Stream(stub, attach(session_id))
    next(stream.call)
    came = [train(stream, edge, step) for step in range(2)]
    saved = stream.ask(pb.EdgeMessage(step=2, save_checkpoint=pb.SaveCheckpoint())).checkpoint_saved
    stream.ask(pb.EdgeMessage(step=2, keep_checkpoints=pb.KeepCheckpoints(steps=[2])))
    came += [download(stub, session_id, kind) for kind in (False, True)]
    stream.end()

    request = edge.request(run_id=RUN, resume_from=[saved.id], weights_sha256="", factors_sha256="")
    response = stub.OpenSession(request, timeout=SECONDS)
    assert response.next_step == 2
    stream = Stream(stub, attach(response.session_id))
    assert next(stream.call).attached.next_step == 2
    came += [download(stub, response.session_id, kind) for kind in (False, True)]
    assert came[2:4] == came[4:]
    came.append(train(stream, edge, 2))
    sent = pb.DownloadWeightsRequest(session_id=response.session_id, offset=100)
    whole = download(stub, response.session_id)
    assert b"".join(part.data for part in stub.DownloadWeights(sent, timeout=SECONDS)) == whole[100:]
    stream.end()
    assert len(server.sessions) == 0
    return came, saved


def test_a_session_lives_its_life_in_messages(start_server, connect, edge):
    """With the bits of one that is beside the service."""
    here = start_server()
    there = elsewhere(start_server())
    came, saved = a_life(there, connect(there.address), edge)
    expected, _ = a_life(here, connect(here.address), edge)
    assert came == expected
    assert not saved.error
    asked = there.engine.asked
    assert asked.keys() >= {"open", "handle", "contents", "read", "save", "keep", "close"}
    assert asked["close"] == 2


def test_what_goes_wrong_crosses_too(start_server, connect, edge):
    stub = connect(elsewhere(start_server()).address)
    session_id = open_session(stub, edge)
    stream = Stream(stub, attach(session_id))
    next(stream.call)
    assert refusal(lambda: stream.ask(pb.EdgeMessage(step=0, save_checkpoint=pb.SaveCheckpoint()))) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "this session was opened without a run_id, or this server saves no checkpoints",
    )
    assert refusal(lambda: stub.OpenSession(edge.request(wire_data_type=99)))[0] is grpc.StatusCode.INVALID_ARGUMENT
    stream = Stream(stub, attach(open_session(stub, edge)))
    next(stream.call)
    code, details = refusal(lambda: stream.ask(edge.forward(5)))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "step 0 is next" in details


@pytest.mark.parametrize(
    "value",
    [torch.zeros(1), [torch.zeros(1)], lambda: 1, download, torch.nn.Linear(1, 1), threading.Lock()],
    ids=["tensor", "in a list", "lambda", "function", "module", "lock"],
)
def test_what_cannot_cross_is_found_out(value):
    with pytest.raises((TypeError, PicklingError)):
        crossed(value)


def every_error(kind=SFTError):
    yield kind
    for below in kind.__subclasses__():
        yield from every_error(below)


@pytest.mark.parametrize("kind", sorted(set(every_error()), key=str))
def test_every_error_of_ours_crosses(kind):
    arrived = crossed(kind("what was wrong"))
    assert (type(arrived), str(arrived)) == (kind, "what was wrong")


def test_so_does_what_is_not_for_the_caller():
    assert crossed(UnauthenticatedError("who are you?", "expired")).reason == "expired"


def test_who_calls_crosses():
    owner = Identity("ann", Limits(max_sessions=2, models=("bert-*",)), sees_all=True)
    assert crossed(owner) == owner


def test_a_message_that_is_refused_is_timed_too(start_server, connect, edge):
    class Told(Metrics):
        def __init__(self):
            self.work = []

        def worked(self, tenant, waited_seconds, worked_seconds):
            self.work.append((tenant, waited_seconds >= 0, worked_seconds > 0))

    told = Told()
    stub = connect(start_server(observer=Observer(told)).address)
    stream = Stream(stub, attach(open_session(stub, edge)))
    next(stream.call)
    refusal(lambda: stream.ask(edge.forward(5)))
    assert told.work == [("anonymous", True, True)]


def test_a_session_that_has_ended_is_nobody_s(server, stub, edge):
    session_id = open_session(stub, edge)
    engine = server.engine
    version, sizes = engine.contents(session_id, False)
    assert len(engine.read(session_id, False, 1, 0, version)) == sizes[1]
    with pytest.raises(PreconditionError, match="trained on"):
        engine.read(session_id, False, 1, 0, version + 1)
    engine.close(session_id)
    engine.close(session_id)
    for ask in (
        lambda: engine.handle(session_id, edge.forward(0), 0),
        lambda: engine.contents(session_id, True),
        lambda: engine.read(session_id, False, 0, 0, version),
        lambda: engine.save(session_id),
        lambda: engine.keep(session_id, [1]),
    ):
        with pytest.raises(SessionLostError):
            ask()


def test_a_request_that_only_checks_makes_no_session(server, stub, edge):
    open_session(stub, edge)
    before = dict(server.engine._sessions)
    response = server.engine.open("new", edge.request(only_check=True), ANONYMOUS)
    assert (response.session_id, list(response.missing_blobs)) == ("", [])
    assert server.engine._sessions == before


@pytest.mark.parametrize("optimizer_state", [False, True])
def test_a_download_lists_its_tensors_once(server, stub, edge, monkeypatch, optimizer_state):
    session_id = open_session(stub, edge)
    stream = Stream(stub, attach(session_id))
    next(stream.call)
    train(stream, edge, 0)
    listed = []
    name = "stored_optimizer_state" if optimizer_state else "stored_parameters"
    original = getattr(Session, name)
    monkeypatch.setattr(Session, name, lambda session: listed.append(session.version) or original(session))
    first = download(stub, session_id, optimizer_state)
    assert download(stub, session_id, optimizer_state) == first
    assert listed == [1]
    train(stream, edge, 1)
    assert download(stub, session_id, optimizer_state) != first
    assert listed == [1, 2]


def test_a_session_that_nobody_will_ask_for_is_closed(server, stub, edge, monkeypatch):
    """One that was made for a caller for whom no entry could be."""

    def no_entry(*_, **__):
        raise KeyError("a bug")

    monkeypatch.setattr("sft_cloud.service.registry.Entry", no_entry)
    weights, factors = edge.request().weights_sha256, edge.request().factors_sha256
    assert {weights, factors} != {""}
    assert refusal(lambda: open_session(stub, edge))[0] is grpc.StatusCode.INTERNAL
    assert server.engine._sessions == {}


def test_an_engine_that_was_shut_down(server, stub, edge):
    session_id = open_session(stub, edge)
    server.engine.shutdown()
    with pytest.raises(ServerUnavailableError):
        server.engine.handle(session_id, edge.forward(0), 0)
