"""The whole cloud behind a transport without sockets: opener, blobs and sessions. For Python 3.10 and later."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Iterator

import torch
from support.in_memory import InMemoryTransport

from sft.v1 import split_training_pb2 as pb
from sft_cloud.engine.opener import TransformersOpener
from sft_cloud.engine.weights import WeightsFinder
from sft_cloud.engine.worker import at_once
from sft_cloud.identity import ANONYMOUS
from sft_cloud.storage.blobs import BlobStore


class CloudInProcess(InMemoryTransport):
    """One session of a cloud that has no model of its own: everything is uploaded."""

    def __init__(self) -> None:
        super().__init__(())
        self._directory = tempfile.TemporaryDirectory()
        path = Path(self._directory.name)
        self._store = BlobStore(path / "blobs")
        self._opener = TransformersOpener(torch.device("cpu"), self._store, WeightsFinder(path / "models"))

    def open_session(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        opened = self._opener.open(request, ANONYMOUS, at_once)
        if isinstance(opened, list):
            return pb.OpenSessionResponse(missing_blobs=opened, takes_mixed=True)
        self.session = opened
        return pb.OpenSessionResponse(session_id="in process", device="cpu", takes_mixed=True)

    def upload(self, sha256: str, total_bytes: int, chunks: Iterator[bytes]) -> None:
        self._store.of(ANONYMOUS).add(sha256, total_bytes, chunks)

    def close(self) -> None:
        super().close()
        self._directory.cleanup()
