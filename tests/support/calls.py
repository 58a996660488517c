"""Calls of a cloud's service with the generated stubs, as an edge makes them."""

from __future__ import annotations

import queue
import threading
from itertools import count
from typing import Any, Callable, Iterator, List, Tuple

import grpc
import pytest
from support.tiny_edge import TinyEdge

from sft.tensors.stream import CHUNK_BYTES
from sft.v1 import split_training_pb2 as pb
from sft.v1.split_training_pb2_grpc import SplitTrainingStub

SECONDS = 30
"""More than anything here takes; a wait that reaches it has failed."""


class Stream:
    """A stream that a test holds open: `ask` sends, and reads one answer."""

    def __init__(self, stub: SplitTrainingStub, *messages: pb.EdgeMessage) -> None:
        self.outgoing: queue.SimpleQueue = queue.SimpleQueue()
        self._numbers = count(1)
        for message in messages:
            self.send(message)
        self.call = stub.Train(iter(self.outgoing.get, None), timeout=SECONDS)

    def send(self, message: pb.EdgeMessage) -> None:
        """With the number that it has, or the next; every answer so far counts as here."""
        if not message.number and message.WhichOneof("body") not in ("attach", "close"):
            message.number = next(self._numbers)
            message.answered = message.number - 1
        self.outgoing.put(message)

    def ask(self, message: pb.EdgeMessage) -> pb.CloudMessage:
        self.send(message)
        return next(self.call)

    def end(self) -> List[pb.CloudMessage]:
        """In order."""
        self.send(pb.EdgeMessage(close=pb.Close()))
        self.outgoing.put(None)
        return list(self.call)


def chunks_of(sha256: str, content: bytes) -> Iterator[pb.UploadBlobRequest]:
    yield pb.UploadBlobRequest(sha256=sha256, total_bytes=len(content), data=content[:100])
    for start in range(100, len(content), CHUNK_BYTES):
        yield pb.UploadBlobRequest(data=content[start : start + CHUNK_BYTES])


def open_session(stub: SplitTrainingStub, edge: TinyEdge, **overrides: object) -> str:
    """Opens as an edge does, uploading what is missing; returns the id."""
    response = stub.OpenSession(edge.request(**overrides), timeout=SECONDS)
    for sha256 in response.missing_blobs:
        stub.UploadBlob(chunks_of(sha256, edge.blobs()[sha256]), timeout=SECONDS)
    if response.missing_blobs:
        response = stub.OpenSession(edge.request(**overrides), timeout=SECONDS)
    assert response.session_id
    return response.session_id


def download(stub: SplitTrainingStub, session_id: str, optimizer_state: bool = False) -> bytes:
    request = pb.DownloadWeightsRequest(session_id=session_id, optimizer_state=optimizer_state)
    return b"".join(part.data for part in stub.DownloadWeights(request, timeout=SECONDS))


def refusal(call: Callable[[], object]) -> Tuple[grpc.StatusCode, str]:
    """The status code and the sentence with which a call ends."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def wait_until_closed(server: Any, registry_len: int = 0) -> Callable[[], bool]:
    """Returns once the server has that many sessions; closing is announced, not slept for."""
    done = threading.Event()
    registry = server.sessions
    announce = registry._on_close

    def on_close(entry, reason):
        announce(entry, reason)
        done.set()

    registry._on_close = on_close
    return lambda: len(registry) == registry_len or (done.wait(SECONDS) and len(registry) == registry_len)
