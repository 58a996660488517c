"""What the link counts is what crosses the wire, as a proxy between edge and cloud sees it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.proxy import TcpProxy
from support.servers import start_server
from support.tiny import make_tiny_model
from support.tiny_edge import TinyEdge
from transformers import AutoConfig

from sft.models import Cut
from sft.wire.protocol import PART_BYTES
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.link.link import Blob, Link

STEPS = 50
# What the count leaves out: headers that open the stream and settings, and with each message window updates and pings.
# Together less than the framing that it must not leave out, which is about 160 bytes a message here.
TOLERANCE_BYTES = 500 + 60 * STEPS


@pytest.fixture
def edge(tmp_path: Path) -> TinyEdge:
    directory = make_tiny_model(tmp_path / "tiny", layers=3)
    config = AutoConfig.from_pretrained(directory, num_labels=2, problem_type="single_label_classification")
    return TinyEdge(directory, config, cut=Cut("sft", 2, 8), lengths=(24,) * 24 + (12,) * 8)


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[TcpProxy]:
    server = start_server(tmp_path / "state", 1)
    with TcpProxy(server.address) as proxy:
        yield proxy
    server.stop(grace_seconds=0)


def test_a_message_that_crosses_in_parts_is_counted_as_such(edge: TinyEdge, proxy: TcpProxy) -> None:
    wide = TinyEdge(edge.directory, edge.config, cut=Cut("sl", 1), lengths=(60,) * 200)
    blobs = {sha256: Blob(len(data), lambda data=data: iter([data])) for sha256, data in wide.blobs().items()}
    with Link(GrpcTransport(proxy.address), wide.request(), blobs) as link:
        link.open()
        sent = proxy.up.forwarded
        assert link.forward(0, 0, wide.activation(0), wide.labels(), 1.0).result().message.result.loss > 0
        total = link.total
    assert total.payload_bytes_sent == 200 * 60 * wide.width * 4 > PART_BYTES
    assert total.bytes_sent == pytest.approx(proxy.up.forwarded - sent, abs=3000)  # window updates among them


def test_the_link_counts_what_a_proxy_counts(edge: TinyEdge, proxy: TcpProxy) -> None:
    blobs = {sha256: Blob(len(data), lambda data=data: iter([data])) for sha256, data in edge.blobs().items()}
    with Link(GrpcTransport(proxy.address), edge.request(), blobs) as link:
        link.open()
        sent, received = proxy.up.forwarded, proxy.down.forwarded
        for step in range(STEPS):
            commit = edge.commit_part(step)
            link.forward(step, 0, edge.activation(step), edge.labels(), 1.0).result()
            link.commit(step, commit.learning_rates, commit.clip_scale)
        link.evaluate(STEPS, 0, edge.activation(STEPS)).result()
        total = link.total
    payload = STEPS * sum(edge.lengths) * 8 * 4
    assert total.payload_bytes_sent == payload + sum(edge.lengths) * 8 * 4
    assert total.payload_bytes_received == payload + len(edge.lengths) * 2 * 4  # gradients, and the logits at the end
    assert total.bytes_sent == pytest.approx(proxy.up.forwarded - sent, abs=TOLERANCE_BYTES)
    assert total.bytes_received == pytest.approx(proxy.down.forwarded - received, abs=TOLERANCE_BYTES)
