"""A transport without sockets: one session of the real cloud, in this process, and no thread but the link's own."""

from __future__ import annotations

from typing import Iterator, Optional, Sequence

import torch

from sft.errors import SessionLostError
from sft.tensor_stream import StoredTensor, safetensors_chunks
from sft.v1 import split_training_pb2 as pb
from sft_cloud.opening import build, check_request, make_session
from sft_cloud.session import Session
from sft_edge.transport import Stream, Transport

_CPU = torch.device("cpu")


class InMemoryTransport(Transport):
    """Calls a session's methods. What net_2 starts from is given, so nothing is ever uploaded."""

    def __init__(self, tensors: Sequence[StoredTensor]) -> None:
        self.session: Optional[Session] = None
        self._tensors = tensors

    def open_session(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        spec = check_request(request)
        self.session = make_session(spec, build(spec, _CPU), self._tensors, _CPU)
        return pb.OpenSessionResponse(session_id="in memory", device="cpu")

    def upload(self, sha256: str, total_bytes: int, chunks: Iterator[bytes]) -> None:
        raise AssertionError("no cloud asked for it")

    def stream(self, messages: Iterator[bytes]) -> Stream:
        return _InMemoryStream(self._opened(), messages)

    def download(self, session_id: str, optimizer_state: bool = False) -> Iterator[bytes]:
        session = self._opened()
        return safetensors_chunks(session.stored_optimizer_state() if optimizer_state else session.stored_parameters())

    def close(self) -> None:
        self.session = None

    def _opened(self) -> Session:
        if self.session is None:
            raise SessionLostError("there is no session")
        return self.session


class _InMemoryStream(Stream):
    def __init__(self, session: Session, messages: Iterator[bytes]) -> None:
        self._session = session
        self._messages = messages
        self._cancelled = False

    def __next__(self) -> bytes:
        data = next(self._messages)
        if self._cancelled:
            raise SessionLostError("the stream was broken off")
        answer: pb.CloudMessage = self._session.handle(pb.EdgeMessage.FromString(data))
        return answer.SerializeToString()

    def cancel(self) -> None:
        self._cancelled = True
