"""A frozen edge does not wait for the cloud, and its run has the bits of one that does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.jobs import Job, read_json, same_bits, weights_of

from sft.v1 import split_training_pb2 as pb
from sft_cloud.session.session import Session
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.systems.split import SplitSystem

FROZEN = {"mode": "sl", "freeze_edge": True, "per_device_train_batch_size": 2, "num_train_epochs": 2, "seed": 7}


def outcome(directory: Path) -> tuple:
    state = read_json(directory / "trainer_state.json")
    timed = ("eval_runtime", "eval_samples_per_second")
    history = [{n: v for n, v in entry.items() if n not in timed} for entry in state.pop("log_history")]
    results = read_json(directory / "all_results.json")
    steps = (directory / "ledger.csv").read_text().splitlines()
    samples = [line.split(",")[:2] for line in steps]
    return history, state, results["train_loss"], results["wire_payload_bytes_sent"], samples


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each training micro-batch that the cloud got: whether it was sent ahead."""
    seen: list[bool] = []
    right = Session.handle_in_pieces

    def handle(self, message: pb.EdgeMessage, *arguments):
        if message.HasField("forward"):
            seen.append(message.ahead)
        return right(self, message, *arguments)

    monkeypatch.setattr(Session, "handle_in_pieces", handle)
    return seen


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3, "max_grad_norm": 0.05},
        {"eval_strategy": "epoch", "activations": "keep-on-edge"},
        {"eval_strategy": "epoch", "activations": "keep-on-cloud"},
        {"mode": "sft", "max_grad_norm": 0.0},
    ],
    ids=["plain", "accumulated", "kept on the edge", "kept on the cloud", "sft"],
)
def test_the_bits_are_those_of_an_edge_that_waits(
    train: Callable[..., Path],
    job: Job,
    model: Path,
    ahead: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
) -> None:
    run = train(job, model=model, **{**FROZEN, **options})
    assert sum(ahead) > len(ahead) / 2
    ahead.clear()
    monkeypatch.setattr(SplitSystem, "sends_ahead", False)
    waiting = train(job, model=model, **{**FROZEN, **options})
    assert ahead
    assert not any(ahead)
    assert outcome(run) == outcome(waiting)
    assert same_bits(weights_of(run), weights_of(waiting))


def test_a_cloud_of_before(
    train: Callable[..., Path], job: Job, model: Path, ahead: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = GrpcTransport.open_session

    def opened(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        response = right(self, request)
        response.takes_ahead = False
        return response

    monkeypatch.setattr(GrpcTransport, "open_session", opened)
    train(job, model=model, **FROZEN)
    assert ahead
    assert not any(ahead)


def test_a_step_that_is_undone_while_others_are_on_their_way(
    train: Callable[..., Path], job: Job, model: Path, ahead: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = train(job, model=model, **FROZEN)
    right = Session._check_forward
    struck = []

    def full(self, message: pb.EdgeMessage, *arguments):
        work = right(self, message, *arguments)
        if message.step != 3 or len(struck) == 2:
            return work
        struck.append(message.ahead)

        def no_memory(answer: pb.CloudMessage) -> None:
            raise torch.cuda.OutOfMemoryError("for a test")

        return no_memory

    monkeypatch.setattr(Session, "_check_forward", full)
    run = train(job, model=model, **FROZEN)
    assert struck == [True, False]
    assert outcome(run)[:3] == outcome(quiet)[:3]
    assert same_bits(weights_of(run), weights_of(quiet))
