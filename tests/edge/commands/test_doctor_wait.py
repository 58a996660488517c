"""`sft-edge doctor --wait`: a server that is absent or full is waited for, and looked at whatever comes of it."""

from __future__ import annotations

import socket
from typing import Callable, List

import grpc
import pytest
from support.scripted_cloud import ScriptedCloud, serving

from sft.v1 import split_training_pb2 as pb
from sft_edge.cli import main

QUICKLY = ["--reconnect-backoff", "10ms", "--idle", "0s"]


class FullCloud(ScriptedCloud):
    """Has room when it is asked for the third time."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: List[bool] = []

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusResponse:
        self.asked.append(True)
        return pb.StatusResponse(max_sessions=1, open_sessions=int(len(self.asked) < 3), caller="anna")


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Callable[..., List[str]]:
    """Of standard output and, in front of it, standard error."""

    def examine(*arguments: str) -> List[str]:
        main(["doctor", *QUICKLY, *arguments])
        told = capsys.readouterr()
        return (told.err + told.out).splitlines()

    return examine


def test_a_full_server_is_waited_for(lines: Callable[..., List[str]]) -> None:
    cloud = FullCloud()
    with serving(cloud) as address:
        told = lines("--server", address, "--wait", "1m")
    assert told[0].startswith(f"{address} has no room: 1 of 1 sessions")
    assert told[0].endswith("waiting for it for up to 1m")
    assert len(cloud.asked) == 4, "and once more, to look at it"


def test_waiting_ends(lines: Callable[..., List[str]]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        told = lines("--server", f"127.0.0.1:{nobody.getsockname()[1]}", "--wait", "100ms")
    assert told[0].endswith("waiting for it for up to 100ms")
    assert told[-1] == "a run would stop: connection"
