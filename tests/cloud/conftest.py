"""Tiny edges, and servers and sessions for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import torch
from support.servers import start_server as start_server_in
from support.tiny import make_tiny_model
from support.tiny_edge import SEQUENCES, TinyEdge
from support.tls import Certificates, make_certificates
from transformers import AutoConfig

from sft.v1 import split_training_pb2_grpc as pb_grpc
from sft.wire.protocol import CLIENT_OPTIONS
from sft_cloud.engine.build import build, make_session
from sft_cloud.engine.request import check_request
from sft_cloud.server import CloudServer
from sft_cloud.session.session import Session

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "bert", layers=3)


@pytest.fixture
def make_edge(tiny_directory: Path) -> Callable[..., TinyEdge]:
    """`make_edge(num_labels=..., problem_type=..., head=..., cut=..., seed=...)`."""

    def make(num_labels: int = 3, problem_type: str | None = None, **values: object) -> TinyEdge:
        if values.get("head", SEQUENCES) == SEQUENCES and problem_type is None:
            problem_type = "single_label_classification"
        config = AutoConfig.from_pretrained(tiny_directory, num_labels=num_labels, problem_type=problem_type)
        return TinyEdge(tiny_directory, config, **values)

    return make


@pytest.fixture
def edge(make_edge: Callable[..., TinyEdge]) -> TinyEdge:
    """Classification into three classes, mode sft, dropout on."""
    return make_edge()


@pytest.fixture
def open_session() -> Callable[[TinyEdge], Session]:
    """Makes a session as the service does, without a server."""

    def make(edge: TinyEdge) -> Session:
        spec = check_request(edge.request())
        return make_session(spec, build(spec, CPU), [*edge.weights, *edge.factors], CPU)

    return make


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., CloudServer]]:
    """Starts servers on free ports, which end with the test."""
    servers: list[CloudServer] = []

    def start(max_sessions: int = 4, model_dir: Path | None = None, **options: object) -> CloudServer:
        servers.append(start_server_in(tmp_path / "state", max_sessions, model_dir=model_dir, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop(grace_seconds=0)


@pytest.fixture
def server(start_server: Callable[..., CloudServer]) -> CloudServer:
    return start_server()


@pytest.fixture
def connect() -> Iterator[Callable[[str], pb_grpc.SplitTrainingStub]]:
    """Stubs for addresses, whose channels are closed with the test."""
    channels: list[grpc.Channel] = []

    def make(address: str) -> pb_grpc.SplitTrainingStub:
        channels.append(grpc.insecure_channel(address, options=CLIENT_OPTIONS))
        return pb_grpc.SplitTrainingStub(channels[-1])

    yield make
    for channel in channels:
        channel.close()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def stub(server: CloudServer, connect: Callable[[str], pb_grpc.SplitTrainingStub]) -> pb_grpc.SplitTrainingStub:
    """Of the server."""
    return connect(server.address)
