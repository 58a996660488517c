"""Sessions that are saved and made again, by the service: the bits of one that went on, for its owner alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from support.calls import SECONDS, Stream, download, open_session, refusal
from support.servers import start_server as start_server_in
from support.tiny import DECODERS, make_tiny_model
from support.tiny_edge import SEQUENCES, TOKENS, TinyEdge, attach
from transformers import AutoConfig

from sft.models import Cut
from sft.v1 import split_training_pb2 as pb
from sft_cloud.access.protection import Access
from sft_cloud.identity import Identity, Limits
from sft_cloud.server import CloudServer

RUN = "0123456789abcdef" * 2
SAVE = pb.SaveCheckpoint()


class Run:
    """An edge's session on a server, of which checkpoints are saved."""

    def __init__(self, stub, edge: TinyEdge, **overrides: object) -> None:
        self.edge, self.stub = edge, stub
        overrides = {"run_id": RUN, **overrides}
        if "resume_from" in overrides:
            overrides.update(weights_sha256="", factors_sha256="")
            response = stub.OpenSession(edge.request(**overrides), timeout=SECONDS)
            self.session_id, self.step = response.session_id, response.next_step
            assert not response.missing_blobs
        else:
            self.session_id, self.step = open_session(stub, edge, **overrides), 0
        self.stream = Stream(stub, attach(self.session_id))
        assert next(self.stream.call).attached.next_step == self.step

    def train(self, steps: int) -> list[bytes]:
        """The answers, each without what depends on the time."""
        answers = []
        for _ in range(steps):
            answer = self.stream.ask(self.edge.forward(self.step))
            answers.append(answer.result.SerializeToString())
            self.stream.ask(self.edge.commit(self.step))
            self.step += 1
        return answers

    def save(self) -> pb.CheckpointSaved:
        answer = self.stream.ask(pb.EdgeMessage(step=self.step, save_checkpoint=SAVE))
        assert answer.WhichOneof("body") == "checkpoint_saved"
        return answer.checkpoint_saved

    def keep(self, *steps: int) -> None:
        message = pb.EdgeMessage(step=self.step, keep_checkpoints=pb.KeepCheckpoints(steps=steps))
        assert self.stream.ask(message).HasField("committed")

    def content(self) -> list[bytes]:
        return [download(self.stub, self.session_id, kind) for kind in (False, True)]


@pytest.fixture
def other_host(tmp_path: Path, start_server, connect) -> Callable[[], object]:
    """A server that has nothing but the store."""

    def start(**options: object):
        host = start_server_in(tmp_path / "other", checkpoint_store=str(tmp_path / "state" / "checkpoints"), **options)
        servers.append(host)
        return connect(host.address)

    servers: list[CloudServer] = []
    yield start
    for host in servers:
        host.stop(grace_seconds=0)


def check_goes_on(stub, other, edge: TinyEdge, **overrides: object) -> None:
    run = Run(stub, edge, **overrides)
    run.train(2)
    saved = run.save()
    assert saved.id.step == 2
    expected = run.train(2)
    resumed = Run(other, edge, resume_from=[saved.id], **overrides)
    assert resumed.step == 2
    assert resumed.train(2) == expected
    assert resumed.content() == run.content()
    run.stream.end()
    resumed.stream.end()


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    "optimizer", ["AdamW", "SGD", "Adagrad", "NAdam", "RAdam", "Rprop", "Adamax", "ASGD", "RMSprop"]
)
def test_every_optimizer_goes_on(stub, other_host, make_edge, optimizer: str) -> None:
    edge = make_edge()
    edge.optimizer_name = optimizer
    if optimizer == "Rprop":
        for group in edge.groups:
            group.arguments.pop("weight_decay")
    check_goes_on(stub, other_host(), edge)


@pytest.mark.parametrize("mode", ["sl", "low-rank"])
def test_every_cut_goes_on(stub, other_host, make_edge, mode: str) -> None:
    cut = Cut("sl", 2) if mode == "sl" else Cut("sft", 2, 4, "low-rank")
    check_goes_on(stub, other_host(), make_edge(cut=cut))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("family", ["deberta-v2", *DECODERS])
def test_every_family_goes_on(stub, other_host, tmp_path: Path, family: str) -> None:
    """Also where a head was tied to embeddings, and where both halves have something that nobody trains."""
    head = SEQUENCES if family == "deberta-v2" else TOKENS
    directory = make_tiny_model(tmp_path / family, family, layers=3)
    values = {"num_labels": 3, "problem_type": "single_label_classification"} if head == SEQUENCES else {}
    edge = TinyEdge(directory, AutoConfig.from_pretrained(directory, **values), head=head)
    check_goes_on(stub, other_host(), edge)


def test_settings_that_a_schedule_has_changed_go_on(stub, other_host, make_edge) -> None:
    edge = make_edge()
    edge.optimizer_name = "SGD"
    for group in edge.groups:
        group.arguments["momentum"] = 0.9
    run = Run(stub, edge)
    run.stream.ask(edge.forward(0))
    change = pb.GroupArguments(arguments={"momentum": pb.OptimizerArgument(number=0.1)})
    commit = pb.Commit(step=0, learning_rates=[0.5, 0.25], clip_scale=1.0, group_arguments=[change, change])
    run.stream.ask(pb.EdgeMessage(step=0, commit=commit))
    run.step = 1
    saved = run.save()
    expected = run.train(2)
    resumed = Run(other_host(), edge, resume_from=[saved.id])
    assert resumed.train(2) == expected


def test_the_newest_step_that_both_have(stub, other_host, edge: TinyEdge) -> None:
    run = Run(stub, edge)
    ids = []
    for _ in range(3):
        run.train(1)
        ids.append(run.save().id)
    unknown = pb.CheckpointId(step=9, sha256="9" * 64)
    other = other_host()
    for offered, step in (([unknown, *ids], 3), ([ids[0], ids[1], unknown], 2), ([ids[0]], 1)):
        resumed = Run(other, edge, resume_from=offered)
        assert resumed.step == step
        resumed.stream.end()
    run.keep(1)
    assert refusal(lambda: Run(other, edge, resume_from=ids[1:])) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "this server has no whole checkpoint of the run at a step that the edge has (the newest: 2, 3)",
    )
    assert Run(other, edge, resume_from=ids).step == 1


OTHER_REQUESTS = {
    "seed": {"seed": 8},
    "wire_data_type": {"wire_data_type": pb.DATA_TYPE_BFLOAT16},
    "activation_codec": {"activation_codec": pb.DATA_TYPE_INT8},
    "gradient_codec": {"gradient_codec": pb.DATA_TYPE_INT8},
    "cut": {"cut": pb.Cut(mode=pb.MODE_SFT, split_layer=2, split_rank=3, residual=pb.RESIDUAL_NONE)},
    "head": {"head": pb.HEAD_CAUSAL_LM},
}


@pytest.mark.parametrize("field", OTHER_REQUESTS)
def test_halves_that_do_not_belong_together(stub, edge: TinyEdge, field: str) -> None:
    run = Run(stub, edge)
    run.train(1)
    saved = run.save()
    code, details = refusal(lambda: Run(stub, edge, resume_from=[saved.id], **OTHER_REQUESTS[field]))
    assert code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        assert f"was opened with another {field}" in details


def test_another_model_or_optimizer(stub, edge: TinyEdge, make_edge) -> None:
    run = Run(stub, edge)
    run.train(1)
    saved = run.save()
    config = json.loads(edge.request().config_json)
    again = json.dumps({**config, "_name_or_path": "/elsewhere", "transformers_version": "9.9"})
    relu = json.dumps({**config, "hidden_act": "relu"})
    _, details = refusal(lambda: Run(stub, edge, resume_from=[saved.id], config_json=relu))
    assert "was opened with another config_json (its 'hidden_act')" in details
    other = make_edge()
    other.groups[0].arguments["weight_decay"] = 0.5
    _, details = refusal(lambda: Run(stub, other, resume_from=[saved.id]))
    assert "was opened with another optimizer" in details
    assert Run(stub, edge, resume_from=[saved.id], config_json=again, model_name="moved").step == 1


def test_nobody_resumes_the_run_of_another(other_host, edge: TinyEdge) -> None:
    """By a server that knows its callers; the run's id is no secret."""
    callers = iter(["alice"] * 100)

    def identify(context: object) -> Identity:
        return Identity(next(callers))

    stub = other_host(access=Access(identify=identify))
    run = Run(stub, edge)
    run.train(1)
    saved = run.save()
    callers = iter(["mallory"] * 100)
    code, details = refusal(lambda: Run(stub, edge, resume_from=[saved.id]))
    assert (code, details.partition(" (")[0]) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "this server has no whole checkpoint of the run at a step that the edge has",
    )
    callers = iter(["alice"] * 100)
    assert Run(stub, edge, resume_from=[saved.id]).step == 1


def test_not_in_the_middle_of_a_step(stub, edge: TinyEdge) -> None:
    run = Run(stub, edge)
    run.stream.ask(edge.forward(0))
    code, details = refusal(lambda: run.save())
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert details.startswith("a checkpoint is saved between two steps")


def test_a_session_without_a_run(stub, edge: TinyEdge) -> None:
    run = Run(stub, edge, run_id="")
    code, details = refusal(lambda: run.save())
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "opened without a run_id" in details


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"run_id": "../../etc"}, "run_id must be 32 lower-case hexadecimal digits"),
        ({"run_id": "", "resume_from": [pb.CheckpointId(step=1, sha256="0" * 64)]}, "run_id must be 32"),
        ({"resume_from": [pb.CheckpointId(step=1, sha256="../x")]}, "is not a SHA-256"),
        ({"resume_from": [pb.CheckpointId(step=1, sha256="0" * 64)] * 1001}, "resume_from holds 1001 steps"),
        ({"resume_from": [pb.CheckpointId(step=2**64 - 1, sha256="0" * 64)]}, "no whole checkpoint"),
    ],
)
def test_requests_that_make_no_sense(stub, edge: TinyEdge, overrides: dict, said: str) -> None:
    code, details = refusal(lambda: Run(stub, edge, **overrides))
    assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
    assert said in details


def test_what_is_saved_while_others_wait(stub, server: CloudServer, edge: TinyEdge, make_edge, monkeypatch) -> None:
    """The disk keeps nobody from the device: another session trains while files are written."""
    other = Run(stub, make_edge(), run_id="f" * 32)
    run = Run(stub, edge)
    run.train(1)
    store = server.engine._checkpoints._store._files
    trained = []
    write = type(store).write

    def slow(self, name, chunks):
        trained.append(other.train(1))
        write(self, name, chunks)

    monkeypatch.setattr(type(store), "write", slow)
    assert run.save().id.sha256
    assert len(trained) == 5


def test_checkpoints_of_one_caller_take_no_more_than_it_may(start_server, connect, edge: TinyEdge) -> None:
    callers = [Identity("zoe")]
    stub = connect(start_server(access=Access(identify=lambda context: callers[-1])).address)
    without_limit = Run(stub, edge)
    without_limit.train(1)
    size = without_limit.save().total_bytes
    without_limit.stream.end()
    callers.append(Identity("ann", Limits(max_upload_bytes=3 * size - 1)))
    run = Run(stub, edge)
    for _ in range(2):
        run.train(1)
        assert not run.save().error
    run.train(1)
    refused = run.save()
    assert refused.error.startswith(f"your checkpoints take {2 * size} bytes, this one would take {size} more")
    assert not refused.id.sha256
    run.keep(2)
    assert not run.save().error, "there is room again, and the session has gone on"


def test_a_server_that_is_late_deletes_nothing_newer(stub, other_host, edge: TinyEdge) -> None:
    """It was frozen when its edge went on at another server, and wakes up with what it was told to keep then."""
    late = Run(stub, edge)
    late.train(1)
    ids = [late.save().id]
    there = other_host()
    run = Run(there, edge, resume_from=ids)
    for _ in range(2):
        run.train(1)
        ids.append(run.save().id)
    run.keep(2, 3)
    late.keep(1)
    run.stream.end()
    assert Run(there, edge, resume_from=ids[2:]).step == 3
    assert Run(there, edge, resume_from=ids[1:2]).step == 2


def test_a_server_waits_until_the_edge_has_its_half_too(stub, server: CloudServer, edge: TinyEdge) -> None:
    """A half that only the cloud has is nothing to go on from."""
    run = Run(stub, edge)
    run.train(1)

    class Hurry(threading.Event):
        acts = iter([run.save, lambda: run.keep(0), lambda: run.keep(1)])

        def wait(self, timeout: float | None = None) -> bool:
            next(self.acts)()
            return False

    server.wait_for_checkpoints(SECONDS, Hurry())
    assert next(Hurry.acts, None) is None, "each was waited for"


def test_a_request_that_only_checks_makes_no_session_of_a_checkpoint(server, stub, edge, monkeypatch) -> None:
    run = Run(stub, edge)
    run.train(1)
    saved = run.save()
    run.stream.end()
    made: list[object] = []
    monkeypatch.setattr("sft_cloud.engine.opener.session_in_pieces", lambda *arguments: made.append(arguments))
    request = edge.request(run_id=RUN, resume_from=[saved.id], weights_sha256="", factors_sha256="", only_check=True)
    response = stub.OpenSession(request, timeout=SECONDS)
    assert (response.session_id, list(response.missing_blobs), made) == ("", [], [])
    request.resume_from[0].step += 1
    assert refusal(lambda: stub.OpenSession(request))[0] is grpc.StatusCode.FAILED_PRECONDITION
