"""A silent link is asked for a sign of life as often as was said: of an option given twice gRPC takes the first."""

from collections import Counter
from typing import Any, List, Tuple

import grpc
import pytest

import sft_edge.link.grpc_transport as module
from sft_edge.link.grpc_transport import GrpcTransport, Keepalive


def test_keepalive_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given: List[Tuple[str, int]] = []

    def open_channel(address: str, credentials: Any, options: List[Tuple[str, int]]) -> grpc.Channel:
        given.extend(options)
        return grpc.insecure_channel(address, options)

    monkeypatch.setattr(module, "open_channel", open_channel)
    GrpcTransport("127.0.0.1:1", keepalive=Keepalive(time_seconds=11, timeout_seconds=12)).close()
    assert {"grpc.keepalive_time_ms": 11_000, "grpc.keepalive_timeout_ms": 12_000}.items() <= dict(given).items()
    assert max(Counter(name for name, _ in given).values()) == 1
