"""Callers that send what they like, and a server whose waits are told."""

import grpc
import pytest
from support.callers import Announcing, Never
from support.calls import SECONDS

from sft.wire.protocol import CLIENT_OPTIONS

SERVICE = "/sft.v1.SplitTraining/"


@pytest.fixture
def never():
    made = []

    def make(*messages):
        made.append(Never(*messages))
        return made[-1]

    yield make
    for one in made:
        one.let_go()


@pytest.fixture
def raw():
    """Calls of a method with bytes, whatever they are; all methods are called as streams."""
    channels = []

    def make(address, method, messages, **options):
        channels.append(
            grpc.insecure_channel(address, options=[*CLIENT_OPTIONS, *options.pop("options", [])], **options)
        )
        return channels[-1].stream_stream(SERVICE + method if "/" not in method else method)(messages, timeout=SECONDS)

    yield make
    for channel in channels:
        channel.close()


@pytest.fixture
def start_server(start_server):
    def start(**values):
        server = start_server(**values)
        server.deadlines._waits = Announcing()
        return server

    return start
