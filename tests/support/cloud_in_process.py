"""The whole cloud behind a transport without sockets: opener, blobs and sessions. For Python 3.10 and later."""

from __future__ import annotations

import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from support.in_memory import InMemoryTransport

from sft.v1 import split_training_pb2 as pb
from sft_cloud.engine.opener import TransformersOpener
from sft_cloud.engine.weights import WeightsFinder
from sft_cloud.identity import ANONYMOUS
from sft_cloud.storage.blobs import BlobStore


class CloudInProcess(InMemoryTransport):
    """One session of a cloud that has no model of its own: everything is uploaded."""

    def __init__(self) -> None:
        super().__init__(())
        self._directory = tempfile.TemporaryDirectory()
        path = Path(self._directory.name)
        self._store = BlobStore(path / "blobs")
        self._opener = TransformersOpener(_AtOnce(), self._store, WeightsFinder(path / "models"))

    def open_session(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        opened = self._opener.open(request, ANONYMOUS)
        if isinstance(opened, list):
            return pb.OpenSessionResponse(missing_blobs=opened)
        self.session = opened
        return pb.OpenSessionResponse(session_id="in process", device="cpu")

    def upload(self, sha256: str, total_bytes: int, chunks: Iterator[bytes]) -> None:
        self._store.of(ANONYMOUS).add(sha256, total_bytes, chunks)

    def close(self) -> None:
        super().close()
        self._directory.cleanup()


class _AtOnce:
    """A worker without a thread."""

    device = torch.device("cpu")

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work())
        return future

    def shutdown(self) -> None:
        pass
