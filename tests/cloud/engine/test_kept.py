"""Sessions that keep activations, by the service: rows cross once, with the bits of rows that cross each time."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from support.calls import SECONDS, Stream, download, open_session, refusal
from support.engine_elsewhere import EngineElsewhere
from support.tiny_edge import TinyEdge, attach

from sft.errors import StorageError
from sft.v1 import split_training_pb2 as pb
from sft_cloud.options import LimitOptions
from sft_cloud.server import CloudServer
from sft_cloud.storage.files import LocalFiles

RUN = "0123456789abcdef" * 2
KEY = bytes(range(32))
KEEP = {"run_id": RUN, "keep_key": KEY}


def keeping(message: pb.EdgeMessage, *numbers: int) -> pb.EdgeMessage:
    getattr(message, message.WhichOneof("body")).activation.keep.extend(numbers)
    return message


def kept(message: pb.EdgeMessage, *numbers: int) -> pb.EdgeMessage:
    """Without its rows."""
    activation = getattr(message, message.WhichOneof("body")).activation
    activation.packed.data = b""
    activation.packed.shape[0] = 0
    activation.kept.extend(numbers)
    return message


class Run:
    """A session that is trained on, each time on the activation of step 0."""

    def __init__(self, stub, edge: TinyEdge, **overrides: object) -> None:
        self.edge, self.stub = edge, stub
        self.session_id = open_session(stub, edge, **overrides)
        self._follow(0)

    def _follow(self, step: int) -> None:
        self.step = step
        self.stream = Stream(self.stub, attach(self.session_id))
        next(self.stream.call)

    def resume(self, stub, saved: pb.CheckpointId, **overrides: object) -> pb.OpenSessionResponse:
        request = self.edge.request(resume_from=[saved], **overrides)
        request.ClearField("weights_sha256")
        request.ClearField("factors_sha256")
        response = stub.OpenSession(request, timeout=SECONDS)
        self.stub, self.session_id = stub, response.session_id
        self._follow(saved.step)
        return response

    def message(self, **fields: object) -> pb.EdgeMessage:
        return self.edge.forward(self.step, activation=self.edge.activation(0), **fields)

    def train(self, message: pb.EdgeMessage) -> bytes:
        answer = self.stream.ask(message)
        assert answer.WhichOneof("body") == "result"
        self.stream.ask(self.edge.commit(self.step))
        self.step += 1
        return answer.result.SerializeToString()

    def save(self) -> pb.CheckpointId:
        saved = self.stream.ask(pb.EdgeMessage(step=self.step, save_checkpoint=pb.SaveCheckpoint())).checkpoint_saved
        assert not saved.error
        return saved.id

    def weights(self) -> bytes:
        return download(self.stub, self.session_id)


@pytest.fixture
def expected(stub, edge: TinyEdge) -> tuple[list[bytes], bytes]:
    """Four steps in which the rows cross each time: the answers, and the weights."""
    run = Run(stub, edge)
    answers = [run.train(run.message()) for _ in range(4)]
    weights = run.weights()
    run.stream.end()
    return answers, weights


def test_rows_that_cross_once(server: CloudServer, stub, edge: TinyEdge, expected) -> None:
    """Behind the seam; and evaluations by number, of rows of both kinds of message."""
    server.engine = server.service._engine = EngineElsewhere(server.engine)
    run = Run(stub, edge, **KEEP)
    answers = [run.train(keeping(run.message(), 1, 2, 3))]
    evaluated = run.stream.ask(keeping(edge.evaluate(), 4, 5, 6))
    assert run.stream.ask(kept(edge.evaluate(), 4, 5, 6)).evaluation == evaluated.evaluation
    answers += [run.train(kept(run.message(), 1, 2, 3)) for _ in range(3)]
    assert (answers, run.weights()) == expected


def test_labels_that_stay(stub, edge: TinyEdge) -> None:
    plain, run = Run(stub, edge, run_id="f" * 32), Run(stub, edge, **KEEP)
    outputs = plain.stream.ask(edge.unlabelled(0))
    assert run.stream.ask(keeping(edge.unlabelled(0), 1, 2, 3)).outputs == outputs.outputs
    assert run.stream.ask(kept(edge.unlabelled(0, 1, activation=edge.activation(0, 0)), 1, 2, 3)).HasField("outputs")


def test_what_the_response_says(stub, edge: TinyEdge, server: CloudServer) -> None:
    for overrides, keeps in (({}, False), (KEEP, True)):
        session_id = open_session(stub, edge, **overrides, request_id="r" * 16 + str(keeps))
        again = stub.OpenSession(edge.request(**overrides, request_id="r" * 16 + str(keeps)), timeout=SECONDS)
        assert (again.session_id, again.keeps_activations, again.kept) == (session_id, keeps, 0)
    code, details = refusal(lambda: open_session(stub, edge, keep_key=b"k" * 31))
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "keep_key has 31 bytes; it has 32, or none")


def test_a_checkpoint_has_them(stub, edge: TinyEdge, tmp_path: Path, connect, start_server, expected) -> None:
    """What was kept after it is not in it; what is kept then has the numbers again."""
    run = Run(stub, edge, **KEEP)
    answers = [run.train(keeping(run.message(), 1, 2, 3)), run.train(kept(run.message(), 1, 2, 3))]
    saved = run.save()
    run.stream.ask(keeping(edge.evaluate(), 4, 5, 6))
    run.stream.end()
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY not in file.read_bytes()
    other = connect(start_server().address)
    response = run.resume(other, saved, **KEEP)
    assert (response.keeps_activations, response.kept, response.next_step) == (True, 3, 2)
    run.stream.ask(keeping(edge.evaluate(1), 4, 5, 6))
    answers += [run.train(kept(run.message(), 1, 2, 3)) for _ in range(2)]
    assert (answers, run.weights()) == expected
    newer = run.save()
    run.stream.end()
    code, details = refusal(lambda: run.resume(other, newer, **{**KEEP, "keep_key": b"x" * 32}))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert details == "the activations in the checkpoint were kept with another keep_key than the one that came"
    response = run.resume(other, newer, run_id=RUN)
    assert not response.keeps_activations
    run.stream.end()
    assert run.resume(other, newer, **KEEP).kept == 6


def test_a_message_that_is_refused_keeps_nothing(stub, edge: TinyEdge) -> None:
    run = Run(stub, edge, **KEEP)
    message = keeping(run.message(), 1, 2, 3)
    message.micro_batch = 5
    assert refusal(lambda: run.stream.ask(message))[0] is grpc.StatusCode.FAILED_PRECONDITION
    run = Run(stub, edge, **KEEP)
    assert refusal(lambda: run.stream.ask(keeping(run.message(), 2, 3, 4)))[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_a_message_that_comes_twice_is_kept_once(stub, edge: TinyEdge, expected) -> None:
    run = Run(stub, edge, **KEEP)
    message = keeping(run.message(), 1, 2, 3)
    first = run.stream.ask(message)
    again = run.stream.ask(message)
    assert first.result == again.result
    run.stream.ask(edge.commit(0))
    run.step = 1
    answers = [first.result.SerializeToString(), run.train(kept(run.message(), 1, 2, 3))]
    assert answers == expected[0][:2]
    assert run.stream.ask(keeping(edge.evaluate(), 4, 5, 6)).HasField("evaluation")


def test_a_session_that_keeps_none(stub, edge: TinyEdge) -> None:
    run = Run(stub, edge)
    code, details = refusal(lambda: run.stream.ask(keeping(run.message(), 1, 2, 3)))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert details.startswith("this session keeps no activations")


def test_a_quota_that_is_full(start_server, connect, edge: TinyEdge, expected) -> None:
    """Every answer says so from then on; a message that counts on more is skipped, with its step, and comes anew."""
    limits = LimitOptions(calls_per_second=10_000, max_kept_bytes=500)
    stub = connect(start_server(limits=limits).address)
    run = Run(stub, edge, **KEEP)
    answers = [run.train(keeping(run.message(), 1, 2, 3))]
    evaluated = run.stream.ask(keeping(edge.evaluate(), 4, 5, 6))
    assert (evaluated.HasField("evaluation"), evaluated.keeps_only) == (True, 3)
    ahead = run.stream.ask(kept(edge.evaluate(), 4, 5, 6))
    assert ahead.step_skipped.reason.startswith("the cloud has no room for more activations: sequence 4")
    assert run.stream.ask(run.message()).HasField("result")
    undone = run.stream.ask(kept(edge.forward(run.step, 1), 4, 5, 6))
    assert (undone.HasField("step_skipped"), undone.keeps_only) == (True, 3)
    answers.append(run.train(kept(run.message(), 1, 2, 3)))  # as the first of its step
    assert run.stream.ask(pb.EdgeMessage(step=2, keep_checkpoints=pb.KeepCheckpoints())).keeps_only == 3
    answers += [run.train(run.message()) for _ in range(2)]
    assert (answers, run.weights()) == expected


def test_a_checkpoint_that_does_not_fit_any_more(stub, start_server, connect, edge: TinyEdge) -> None:
    run = Run(stub, edge, **KEEP)
    run.train(keeping(run.message(), 1, 2, 3))
    saved = run.save()
    run.stream.end()
    smaller = start_server(limits=LimitOptions(calls_per_second=10_000, max_kept_bytes=100))
    response = run.resume(connect(smaller.address), saved, **KEEP)
    assert (response.keeps_activations, response.kept) == (True, 0)
    answer = run.stream.ask(keeping(run.message(), 1, 2, 3))
    assert (answer.HasField("result"), answer.HasField("keeps_only"), answer.keeps_only) == (True, True, 0)


def test_what_is_kept_goes_with_the_session(start_server, connect, edge: TinyEdge) -> None:
    """Its room is there for the next, whether it was closed or another took its place."""
    limits = LimitOptions(calls_per_second=10_000, max_kept_bytes=500)
    stub = connect(start_server(limits=limits).address)
    for end in ("closed", "replaced", "closed"):
        run = Run(stub, edge, **KEEP)
        answer = run.stream.ask(keeping(run.message(), 1, 2, 3))
        assert not answer.HasField("keeps_only")
        if end == "closed":
            run.stream.end()


def test_a_checkpoint_that_has_no_room_for_them(
    stub, edge: TinyEdge, expected, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is saved without them, which is said once, and who goes on from it sends them again."""
    write, tried = LocalFiles.write, []

    def full(self: LocalFiles, name: str, chunks) -> None:
        if name.endswith(".bin"):
            tried.append(name)
            raise StorageError("the cloud's checkpoint store failed: No space left on device")
        write(self, name, chunks)

    monkeypatch.setattr(LocalFiles, "write", full)
    run = Run(stub, edge, **KEEP)
    answers = [run.train(keeping(run.message(), 1, 2, 3))]
    run.save()
    answers.append(run.train(kept(run.message(), 1, 2, 3)))
    saved = run.save()
    assert len(tried) == 1
    assert [record.message for record in caplog.records if "without the activations" in record.message] == [
        "checkpoints are saved without the activations that are kept"
    ]
    run.stream.end()
    monkeypatch.undo()
    assert run.resume(stub, saved, **KEEP).kept == 0
    answers += [run.train(keeping(run.message(), 1, 2, 3)), run.train(kept(run.message(), 1, 2, 3))]
    assert (answers, run.weights()) == expected


def test_the_key_is_in_no_log(server: CloudServer, stub, edge: TinyEdge) -> None:
    """Also of who logs what the server knows of a session."""
    Run(stub, edge, **KEEP)
    known = [*server.sessions.entries(), *server.engine._sessions.values()]
    assert len(known) == 2
    for each in known:
        assert "keep_key" not in repr(each)
