"""The whole cloud behind a transport without sockets: opener, blobs and sessions. For Python 3.10 and later."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import lru_cache
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


@lru_cache(maxsize=None)
def uploads() -> BlobStore:
    """What all clouds of this process hold: hundreds of tests have the same few models, and upload them once."""
    place = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return BlobStore(Path(place) / "blobs")


class CloudInProcess(InMemoryTransport):
    """One session of a cloud that has no model of its own: everything is uploaded."""

    def __init__(self) -> None:
        super().__init__(())
        self._store = uploads()
        nowhere = WeightsFinder(Path("/nowhere/at/all"))
        self._opener = TransformersOpener(torch.device("cpu"), self._store, nowhere)

    def open_session(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        opened = self._opener.open(request, ANONYMOUS, at_once)
        if isinstance(opened, list):
            return pb.OpenSessionResponse(missing_blobs=opened, takes_mixed=True)
        self.session = opened
        return pb.OpenSessionResponse(session_id="in process", device="cpu", takes_mixed=True)

    def upload(self, sha256: str, total_bytes: int, chunks: Iterator[bytes]) -> None:
        self._store.of(ANONYMOUS).add(sha256, total_bytes, chunks)
