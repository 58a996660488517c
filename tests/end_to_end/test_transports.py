"""The way to the cloud makes no difference to what is trained: a slow network, a broken one, or none at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faults import Fault, FaultyTransport
from support.in_memory import InMemoryTransport
from support.proxy import TcpProxy
from support.servers import start_server
from support.tiny import make_tiny_model
from support.tiny_edge import TinyEdge
from transformers import AutoConfig

from sft.errors import ServerFullError, SessionLostError
from sft_cloud.server import CloudServer
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.link.link import Blob, Link
from sft_edge.link.retries import RetryPolicy
from sft_edge.link.transport import Transport

STEPS = 3


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> TinyEdge:
    directory = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", layers=3)
    config = AutoConfig.from_pretrained(directory, num_labels=2, problem_type="single_label_classification")
    return TinyEdge(directory, config)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[CloudServer]:
    server = start_server(tmp_path / "state", 1)
    yield server
    server.stop(grace_seconds=0)


AT_ONCE = RetryPolicy(backoff_seconds=0.0)


def open_link(edge: TinyEdge, transport: Transport, policy: RetryPolicy = AT_ONCE) -> Link:
    blobs = {sha256: Blob(len(data), lambda data=data: iter([data])) for sha256, data in edge.blobs().items()}
    link = Link(transport, edge.request(), blobs, policy)
    link.open()
    return link


def train(edge: TinyEdge, link: Link) -> tuple[list[float], bytes]:
    """Losses, and net_2's weights at the end."""
    losses = []
    for step in range(STEPS):
        pending = [link.forward(step, index, edge.activation(step, index), edge.labels(), 0.5) for index in range(2)]
        losses += [each.result().message.result.loss for each in pending]
        commit = edge.commit_part(step)
        link.commit(step, commit.learning_rates, commit.clip_scale)
    return losses, b"".join(link.weights())


@pytest.fixture(scope="module")
def expected(edge: TinyEdge) -> tuple[list[float], bytes]:
    with open_link(edge, InMemoryTransport([*edge.weights, *edge.factors])) as link:
        return train(edge, link)


def test_over_a_slow_network(edge: TinyEdge, server: CloudServer, expected: tuple[list[float], bytes]) -> None:
    with TcpProxy(server.address) as proxy, open_link(edge, GrpcTransport(proxy.address)) as link:
        proxy.up.delay_seconds = proxy.down.delay_seconds = 0.005
        assert train(edge, link) == expected
        proxy.up.delay_seconds = proxy.down.delay_seconds = 0.0


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_broken_stream_is_mended_and_keeps_its_place(
    edge: TinyEdge, server: CloudServer, expected: tuple[list[float], bytes], direction: str
) -> None:
    fault = Fault("lose", direction, step=1, micro_batch=1)
    with open_link(edge, FaultyTransport(GrpcTransport(server.address), [fault])) as link:
        with pytest.raises(ServerFullError, match="no room"):
            open_link(edge, GrpcTransport(server.address))
        assert train(edge, link) == expected
        assert link.counts.reconnects == 1
    assert fault.fired == 1


def test_a_server_that_stops_in_the_middle(edge: TinyEdge, server: CloudServer) -> None:
    with open_link(edge, GrpcTransport(server.address), RetryPolicy(reconnect_timeout_seconds=0)) as link:
        link.forward(0, 0, edge.activation(0), edge.labels(), 1.0).result()
        server.stop(grace_seconds=0)
        with pytest.raises(SessionLostError, match=server.address):
            link.forward(0, 1, edge.activation(1), edge.labels(), 1.0).result()
